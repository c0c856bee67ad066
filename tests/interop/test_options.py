"""Options of other libraries' layers compared with Flax's, and outputs that verify a conversion. No PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import interop
from tests.support.torch_arrays import IMAGE, LAST, conv, norm, normalized, state_dict


class Fake:
    """A PyTorch module with options."""

    def __init__(self, **options):
        vars(self).update(options)

    def forward(self, x):
        return x

    forward.__module__ = "torch.nn.modules"


def torch_class(name, **options):
    return type(name, (Fake,), {"__module__": "torch.nn.modules"} | options)


CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
_ConvNd = torch_class("_ConvNd", **CONV, transposed=False, kernel_size=(3, 3))
_NormBase = torch_class("_NormBase", eps=1e-5)
ARRAYS = state_dict(conv=(4, 3, 3, 3), bn=4)


class Model(Fake):
    """A PyTorch model of a convolution and a norm."""

    def state_dict(self):
        return ARRAYS

    def named_modules(self, remove_duplicate):
        return [("", self), ("conv", self.conv), ("bn", self.bn), *getattr(self, "more", [])]


def theirs(more=(), kind=_ConvNd, eps=1e-5, **options):
    return Model(conv=kind(**options), bn=_NormBase(eps=eps), more=[(str(i), part) for i, part in enumerate(more)])


class Own(_ConvNd):
    def forward(self, x):
        return x


class Linen(nn.Module):
    how: dict
    epsilon: float = 1e-5
    pad: bool = False

    @nn.compact
    def __call__(self, x):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) if self.pad else x
        return norm(epsilon=self.epsilon)(nn.Conv(4, (3, 3), use_bias=False, **self.how)(x))


class NNX(nnx.Module):
    def __init__(self, how, epsilon=1e-5, pad=False):
        rngs, self.pad = nnx.Rngs(0), pad
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs, **how)
        self.norm = bnjax.nnx.BatchNorm(4, use_running_average=True, epsilon=epsilon, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) if self.pad else x))


def shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


def converted(other, model, **options):
    variables = shapes(model, LAST) if isinstance(model, nn.Module) else bnjax.nnx.functional(model)[1]
    return interop.from_torch_model(other, variables, model=model, inputs=LAST, **options)


# Images are of 4 by 5 pixels: with stride 2, "SAME" pads 4 by (0, 1) and 5 by (1, 1).
@pytest.mark.parametrize("make", [Linen, NNX])
@pytest.mark.parametrize(
    ("other", "how", "words"),
    [
        (theirs(), {"padding": "SAME"}, None),
        (theirs(), {"padding": 1}, None),
        (theirs(stride=(2, 2)), {"padding": 1, "strides": 2}, None),
        # The last row of padding is not read: the two windows over 4 pixels after it end with the last pixel.
        (theirs(stride=(2, 2)), {"padding": ((1, 0), (1, 1)), "strides": 2}, None),
        (theirs(stride=(2, 2)), {"strides": 2}, r"has padding \[\(1, 1\), .*='SAME', which is \[\(0, 1\), \(1, 1\)"),
        (theirs(stride=(2, 1)), {"padding": 1}, r"'conv' has strides \(2, 1\), '.*' has strides=\(1, 1\)"),
        (theirs(dilation=(2, 2), padding=(2, 2)), {"kernel_dilation": 2}, None),
        (theirs(dilation=(2, 2), padding=(2, 2)), {}, r"has dilation \(2, 2\), '.*' has kernel_dilation=\(1, 1\)"),
        (theirs(padding="same"), {}, None),
        (theirs(padding=(0, 0)), {"padding": "VALID"}, None),
        (theirs(padding_mode="circular"), {"padding": "CIRCULAR"}, None),
        (theirs(padding_mode="circular"), {}, r"has padding mode circular, '.*' has zeros"),
        (theirs(eps=1e-3), {}, r"PyTorch's 'bn' has epsilon 0.001, '.*' has epsilon=1e-05.*pass expected=.*or pass"),
    ],
)  # fmt: skip
def test_options_that_differ_are_refused_if_the_outputs_would(make, other, how, words):
    model = make(how)
    if words is None:
        assert converted(other, model)[1].unread == ()
    else:
        with pytest.raises(ValueError, match=words):
            converted(other, model)
        converted(other.state_dict(), model)


@pytest.mark.parametrize("make", [Linen, NNX])
def test_what_is_not_compared_is_in_the_report(make):
    _, report = converted(theirs(kind=Own, padding=(0, 0)), make({}))
    assert str(report).splitlines()[-1] == "not compared: PyTorch's 'conv' (Own has a forward of its own)"
    _, report = converted(theirs(), make({"padding": "VALID"}, pad=True))
    assert "the padding of PyTorch's 'conv' and" in report.unread[0]
    _, report = converted(theirs([torch_class("ZeroPad2d")()], padding=(0, 0)), make({}))
    assert "the padding of PyTorch's 'conv' and" in report.unread[0]


class Evaluating(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x, use_running_average=True)


def test_a_subclass_that_calls_its_base_is_one_layer():
    model = nn.Sequential([nn.Conv(4, (3, 3), use_bias=False), Evaluating()])
    _, report = converted(theirs(), model)
    assert report.unread == ("'layers_1' (Evaluating has a __call__ of its own)",)


def test_options_are_compared_on_the_way_back():
    model = Linen({}, epsilon=1e-3)
    variables = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), shapes(model, LAST))
    how = {"model": model, "inputs": LAST}
    words = r"to_torch_model\(state_dict=\.\.\.\): options .*epsilon.*way, pass state_dict=model.state_dict\(\), which"
    with pytest.raises(ValueError, match=words):
        interop.to_torch_model(variables, state_dict=theirs(), **how)
    interop.to_torch_model(variables, state_dict=theirs().state_dict(), **how)


WANT = normalized(
    np.moveaxis(conv(IMAGE, ARRAYS["conv.weight"], padding=((1, 1), (1, 1))), 1, -1), ARRAYS, "bn"
)  # fmt: skip


@pytest.mark.parametrize("make", [Linen, NNX])
def test_expected_outputs_verify_a_conversion(make):
    new, _ = converted(ARRAYS, make({}), expected=WANT)
    apply = make({}).apply if make is Linen else bnjax.nnx.functional(make({}))[0]
    np.testing.assert_allclose(apply(new, LAST), WANT, rtol=1e-4, atol=1e-5)
    # The same in another way: options do not matter if the outputs agree.
    converted(theirs(padding=(1, 1)), make({"padding": "VALID"}, pad=True), expected=WANT)
    for values, words in (
        (np.moveaxis(WANT, -1, 1), r"its axes in another order.*Transpose its arrays by \[\(0, 2, 3, 1\)\]"),
        (WANT * (1 + 1e-2), r"differ from expected.*by 9.9e-03 of the largest value, and rounding explains 3.5e-04"),
        (
            np.where(WANT > 1, np.nan, WANT),
            r"differ from expected.*entirely. Pass the PyTorch model itself as state_di",
        ),
        ((WANT, WANT), r"the model returns shapes \[\(2, 4, 5, 4\)\], expected has \[\(2, 4, 5, 4\), \(2, 4, 5, 4\)\]"),
    ):
        with pytest.raises(ValueError, match=words):
            converted(ARRAYS, make({}), expected=values)
    with pytest.raises(
        ValueError, match=r"differ from expected.* Options of layers differ: PyTorch's 'bn' has epsilon 1"
    ):
        converted(theirs(eps=1.0), make({}), expected=WANT * 2)


def test_expected_needs_a_model_in_evaluation_and_inputs_with_values():
    variables = {"params": {"kernel": jnp.ones((3, 3))}}
    arrays = state_dict(fc=(3, 3))
    with pytest.raises(ValueError, match=r"model=None, expected=\.\.\.\): pass model= and inputs= too"):
        interop.from_torch_model(arrays, variables, expected=np.ones(3))
    with pytest.raises(ValueError, match=r"model=None, expected=\.\.\.\)"):
        interop.from_keras_model({"fc/kernel": np.ones((3, 3))}, variables, expected=np.ones(3))
    model = nn.Dense(3, use_bias=False)
    shape = jax.ShapeDtypeStruct((1, 3), np.float32)
    with pytest.raises(ValueError, match=r"expected=\.\.\.\): inputs has only shapes"):
        interop.from_torch_model(arrays, variables, model=model, inputs=shape, expected=np.ones((1, 3)))
    model = bnjax.linen.BatchNorm(use_running_average=False)
    x = np.ones((4, 3), np.float32)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"the call updates running statistics. Pass .*train=False"):
        interop.from_torch_model(state_dict(bn=3), variables, model=model, inputs=x, expected=x)
