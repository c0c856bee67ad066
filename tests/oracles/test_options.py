"""Options of layers are compared exactly: a conversion is refused if, and only if, the outputs would differ.

PyTorch's and Keras's own layers decide. If only arrays are passed, which have no options, all are converted.
"""

import itertools

import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import interop
from tests.oracles.layers import promotion
from tests.oracles.torch_arrays import array, tensor

rng = np.random.default_rng(0)


def last(x):
    return np.moveaxis(x, 1, -1)


def agree(library, theirs, model, x):
    """Whether the layer is converted with its options. It must be if, and only if, the outputs are equal without."""
    if isinstance(model, nn.Module):
        apply, variables = model.apply, model.init(jax.random.key(0), x)
    else:
        apply, variables = bnjax.nnx.functional(model)
    convert = getattr(interop, f"from_{library}_model")
    back = getattr(interop, f"to_{library}_model")
    arrays = theirs.state_dict() if library == "torch" else [(w.path, w) for w in theirs.weights]
    how = {"model": model, "inputs": x}
    if "Group" in type(model).__name__:  # which does not tell what its features are, if no layer is before it
        how["flatten"] = {"": ()}
    moved, _ = convert(arrays, variables, **how)
    if library == "torch":
        with torch.no_grad():
            want = last(array(theirs.eval()(tensor(np.moveaxis(x, -1, 1)))))
    else:
        with promotion():
            want = np.asarray(theirs(x, training=False))
    y = np.asarray(apply(moved, x))
    equal = y.shape == want.shape and np.allclose(y, want, rtol=1e-4, atol=1e-4)
    calls = [lambda: convert(theirs, variables, **how)]
    calls.append(
        (lambda: back(variables, state_dict=theirs, **how))
        if library == "torch"
        else (lambda: back(variables, theirs, **how))
    )
    for call in calls:
        if equal:
            assert call()[1].unread == ()
        else:
            with pytest.raises(ValueError, match="options of layers differ"):
                call()
    return equal


PADDINGS = ["SAME", "VALID", "CIRCULAR", "REFLECT", 0, 1, ((0, 1),), ((1, 0),), ((2, 2),)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_convolutions_of_pytorch(kernel):
    """Of all combinations of options, 60 drawn at random."""
    everything = itertools.product(
        (8, 7), (1, 2, 3), (1, 2), (0, 1, 2, "same"), ("zeros", "circular", "reflect"), PADDINGS
    )
    everything = [options for options in everything if options[3] != "same" or options[1] == 1]
    found, rng = [], np.random.default_rng(kernel)
    for i in rng.permutation(len(everything))[:60]:
        size, stride, dilation, padding, mode, own = everything[i]
        theirs = torch.nn.Conv1d(2, 2, kernel, stride, padding, dilation, padding_mode=mode)
        how = {"strides": stride if i % 9 else 2, "padding": own, "kernel_dilation": dilation if i % 7 else 2}
        ours = nn.Conv(2, (kernel,), **how) if i % 2 else nnx.Conv(2, 2, (kernel,), rngs=nnx.Rngs(0), **how)
        found.append(agree("torch", theirs, ours, rng.normal(size=(2, size, 2)).astype("float32")))
    assert 0 < sum(found) < 60


@pytest.mark.parametrize("kernel", [2, 3])
def test_transposed_convolutions_of_pytorch(kernel):
    found = []
    for stride, dilation, padding, more in itertools.product((1, 2, 4), (1, 2), (0, 1), (0, 1)):
        if more >= max(stride, dilation):
            continue
        theirs = torch.nn.ConvTranspose1d(2, 2, kernel, stride, padding, more, dilation=dilation)
        x = rng.normal(size=(2, 5, 2)).astype("float32")
        low = dilation * (kernel - 1) - padding
        for own in ("SAME", "VALID", ((low, low + more),)):
            model = nn.ConvTranspose(2, (kernel,), (stride,), own, (dilation,))
            found.append(agree("torch", theirs, model, x))
    assert 3 < sum(found) < len(found) - 3


NORMS = [
    (torch.nn.BatchNorm2d(4), bnjax.linen.BatchNorm(use_running_average=True, epsilon=1e-5), True),
    (torch.nn.BatchNorm2d(4, eps=1e-2), bnjax.linen.BatchNorm(use_running_average=True), False),
    (torch.nn.BatchNorm2d(4), nn.BatchNorm(use_running_average=True, epsilon=1e-2), False),
    (torch.nn.BatchNorm2d(4), bnjax.nnx.BatchNorm(4, use_running_average=True, epsilon=1e-2, rngs=nnx.Rngs(0)), False),
    (torch.nn.GroupNorm(2, 4), nn.GroupNorm(2, epsilon=1e-5), True),
    (torch.nn.GroupNorm(2, 4), nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=nnx.Rngs(0)), True),
    (torch.nn.GroupNorm(2, 4), nn.GroupNorm(4, epsilon=1e-5), False),
    (torch.nn.GroupNorm(2, 4, eps=1e-2), nn.GroupNorm(None, 2, epsilon=1e-2), True),
    (torch.nn.GroupNorm(1, 4), nn.LayerNorm(epsilon=1e-5), False),
    (torch.nn.GroupNorm(4, 4), nn.InstanceNorm(epsilon=1e-5), True),
    (torch.nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(4, epsilon=1e-5), True),
]


@pytest.mark.parametrize("case", range(len(NORMS)))
def test_normalizations_of_pytorch(case):
    theirs, ours, equal = NORMS[case]
    x = rng.normal(size=(2, 3, 3, 4)).astype("float32") / 4
    assert agree("torch", theirs, ours, x) == equal


@pytest.mark.parametrize("kind", ["Conv1D", "DepthwiseConv1D", "SeparableConv1D", "Conv1DTranspose"])
def test_convolutions_of_keras(kind):
    found = []
    options = itertools.product((8, 7), ("same", "valid"), ({}, {"strides": 2}, {"dilation_rate": 2}))
    for size, padding, how in options:
        for more in (None, 1) if kind == "Conv1DTranspose" and how == {"strides": 2} else (None,):
            extra = {} if more is None else {"output_padding": more}
            layer = getattr(keras.layers, kind)(
                *(() if kind == "DepthwiseConv1D" else (2,)), 3, padding=padding, **how, **extra
            )
            x = rng.normal(size=(2, size, 2)).astype("float32")
            with promotion():
                theirs = keras.Sequential([keras.Input((size, 2)), layer])
            for own in ("SAME", "VALID", 1, ((2, 3),)):
                strides, dilation = (how.get("strides", 1),), (how.get("dilation_rate", 1),)
                conv = nn.Conv(2, (3,), strides, own, kernel_dilation=dilation)
                if kind == "DepthwiseConv1D":
                    model = conv.clone(feature_group_count=2)
                elif kind == "SeparableConv1D":
                    model = nn.Sequential([conv.clone(feature_group_count=2, use_bias=False), nn.Conv(2, (1,))])
                elif kind == "Conv1D":
                    model = conv
                else:
                    model = nn.ConvTranspose(2, (3,), strides, own, dilation)
                found.append(agree("keras", theirs, model, x))
    assert 3 < sum(found) < len(found) - 3


def test_padding_in_a_layer_of_its_own():
    """Keras's ZeroPadding2D is known; what PyTorch's models pad is not, and the report says so."""
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    with promotion():
        theirs = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.ZeroPadding2D(1), keras.layers.Conv2D(2, 3, 2)])
    for padding, equal in ((1, True), ("SAME", False), ("VALID", False)):
        assert agree("keras", theirs, nn.Conv(2, (3, 3), 2, padding=padding), x) == equal
    theirs = torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), torch.nn.Conv2d(3, 2, 3, 2))
    model = nn.Conv(2, (3, 3), 2)
    _, report = interop.from_torch_model(theirs, model.init(jax.random.key(0), x), model=model, inputs=x)
    assert str(report).splitlines()[-1].startswith("not compared: the padding of PyTorch's '1' and ''")
