"""`expected=` with PyTorch's and Keras's own models: what passes, and which layer is named as the first to differ."""

import flax.linen as linen
import jax
import keras
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bnjax.linen
import bnjax.nnx
from bnjax import interop
from tests.oracles.layers import promotion
from tests.oracles.torch_arrays import array, tensor

X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype("float32")


def torch_model():
    """In training, with statistics of its own, and a ReLU in place, which overwrites what the norm before returned."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.Flatten()]
    model = nn.Sequential(*parts, nn.Linear(144, 5), nn.BatchNorm1d(5))
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6) + 1)
    return model


class Linen(linen.Module):
    activation: str = "relu"
    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(4, (3, 3))(x)
        x = bnjax.linen.BatchNorm(use_running_average=not train, epsilon=self.epsilon)(x)
        x = linen.Conv(4, (1, 1))(getattr(linen, self.activation)(x))
        return bnjax.linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(x.reshape(len(x), -1)))


class NNX(nnx.Module):
    def __init__(self, activation="relu", epsilon=1e-5):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Conv(4, 4, (1, 1), rngs=rngs)
        self.norm, self.last = (bnjax.nnx.BatchNorm(n, epsilon=e, rngs=rngs) for n, e in ((4, epsilon), (5, 1e-5)))
        self.dense, self.activation = nnx.Linear(144, 5, rngs=rngs), activation

    def __call__(self, x):
        x = self.second(getattr(nnx, self.activation)(self.norm(self.first(x))))
        return self.last(self.dense(x.reshape(len(x), -1)))


LAYERS = {Linen: ("BatchNorm_0", "Conv_1"), NNX: ("norm", "second")}


def variables(model, x=X):
    return model.init(jax.random.key(0), x) if isinstance(model, linen.Module) else bnjax.nnx.functional(model)[1]


@pytest.mark.parametrize("make", [Linen, NNX])
def test_outputs_of_pytorch_verify_a_model(make):
    theirs, model = torch_model(), make()
    modes = [part.training for part in theirs.modules()]
    how = {"model": model, "inputs": X}
    in_training = array(theirs(tensor(np.moveaxis(X, -1, 1))))
    theirs = torch_model().eval()
    want = theirs(tensor(np.moveaxis(X, -1, 1)))
    theirs.train()
    new, _ = interop.from_torch_model(theirs, variables(model), expected=want, **how)
    apply = model.apply if make is Linen else bnjax.nnx.functional(model)[0]
    np.testing.assert_allclose(apply(new, X), array(want), rtol=1e-4, atol=1e-5)
    interop.from_torch_model(theirs.state_dict(), variables(model), expected=array(want), **how)
    with pytest.raises(ValueError, match=r"In evaluation, the PyTorch model returns what the Flax model returns"):
        interop.from_torch_model(theirs, variables(model), expected=in_training, **how)
    assert [part.training for part in theirs.modules()] == modes
    assert not any(part._forward_hooks for part in theirs.modules())


@pytest.mark.parametrize("make", [Linen, NNX])
def test_the_first_layer_that_differs_from_pytorch_is_named(make):
    theirs = torch_model().eval()
    want = array(theirs(tensor(np.moveaxis(X, -1, 1))))
    norm, second = LAYERS[make]

    def message(model, given=theirs, expected=want, **how):
        with pytest.raises(ValueError, match=r"from_torch_model\(expected=\.\.\.\): the outputs") as caught:
            interop.from_torch_model(given, variables(model), model=model, inputs=X, expected=expected, **how)
        return str(caught.value)

    epsilon = message(make(epsilon=0.5))
    assert f"The first layers that differ are PyTorch's '1' and '{norm}'; their inputs agree." in epsilon
    assert f"PyTorch's '1' has epsilon 1e-05, '{norm}' has epsilon=0.5" in epsilon
    gelu = message(make(activation="gelu"))
    assert f"PyTorch's '3' and '{second}', and their inputs: look between '{norm}' and them" in gelu
    assert "Pass the PyTorch model itself as state_dict=" in message(make(epsilon=0.5), theirs.state_dict())
    assert "does not return expected either" in message(make(epsilon=0.5), expected=want + 1)


def test_a_layer_that_flattens_in_another_order_is_the_first_that_differs():
    theirs, model = torch_model().eval(), Linen()
    want = array(theirs(tensor(np.moveaxis(X, -1, 1))))
    dense = "Dense_0"
    with pytest.raises(ValueError, match=f"PyTorch's '5' and '{dense}'; their inputs agree"):
        interop.from_torch_model(theirs, variables(model), model=model, inputs=X, expected=want, flatten={dense: ()})


def test_expected_in_another_layout_or_of_a_call_in_training_is_told():
    theirs = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)).eval()
    model = linen.Sequential([linen.Conv(5, (1, 1)), bnjax.linen.BatchNorm(use_running_average=False)])
    want = theirs(tensor(np.moveaxis(X, -1, 1)))
    with pytest.raises(ValueError, match=r"the call updates running statistics.*train=False"):
        interop.from_torch_model(theirs, variables(model), model=model, inputs=X, expected=want)
    model = linen.Sequential([linen.Conv(5, (1, 1)), bnjax.linen.BatchNorm(use_running_average=True)])
    with pytest.raises(ValueError, match=r"axes in another order.*Transpose its arrays by \[\(0, 2, 3, 1\)\]"):
        interop.from_torch_model(theirs, variables(model), model=model, inputs=X, expected=want)


class Shortcut(nn.Module):
    """Defines its norms in another order than it calls them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.skip = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(3, 8, 1, bias=False)
        self.skip_bn, self.bn1 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.skip_bn(self.skip(x))


class LinenShortcut(linen.Module):
    names: tuple[str, ...] = ("bn1", "skip_bn")

    @linen.compact
    def __call__(self, x):
        first, second = (bnjax.linen.BatchNorm(use_running_average=True, epsilon=1e-5, name=n) for n in self.names)
        x, y = (
            linen.Conv(8, (3, 3), use_bias=False, name="conv1")(x),
            linen.Conv(8, (1, 1), use_bias=False, name="skip")(x),
        )
        return first(x) + second(y)


def test_norms_of_the_same_names_in_another_order_verify_and_of_other_names_do_not():
    theirs = Shortcut()
    for i in range(3):
        theirs(torch.from_numpy(np.moveaxis(X * (i + 1), -1, 1)))
    with torch.no_grad():
        theirs.skip_bn.weight.fill_(3)
    want = np.moveaxis(array(theirs.eval()(tensor(np.moveaxis(X, -1, 1)))), 1, -1)
    for wrapped in (theirs, nn.DataParallel(theirs)):
        model = LinenShortcut()
        _, report = interop.from_torch_model(wrapped, variables(model), model=model, inputs=X, expected=want)
        assert {row.by for row in report.tensors} == {"same name"}
    model = LinenShortcut(("norm_a", "norm_b"))
    with pytest.raises(ValueError, match=r"The first layers that differ are PyTorch's 'skip_bn' and 'norm_a'"):
        interop.from_torch_model(theirs, variables(model), model=model, inputs=X, expected=want)


class LinenKeras(linen.Module):
    epsilon: float = 1e-3
    strides: int = 1

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(4, (3, 3), self.strides)(x))
        x = bnjax.linen.BatchNorm(use_running_average=True, epsilon=self.epsilon)(x)
        return linen.Dense(2)(x)


def test_outputs_of_keras_verify_a_model_and_its_first_layer_that_differs_is_named():
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="c"),
        keras.layers.BatchNormalization(name="n"),
    ]
    with promotion():
        theirs = keras.Sequential([keras.Input((6, 6, 3)), keras.Sequential(layers), keras.layers.Dense(2, name="d")])
        theirs.set_weights(
            [w + 0.1 * np.random.default_rng(0).random(w.shape, "float32") for w in theirs.get_weights()]
        )
        want = theirs(X, training=False)
        model = LinenKeras()
        how = {"model": model, "inputs": X}
        new, _ = interop.from_keras_model(theirs, variables(model), expected=want, **how)
        np.testing.assert_allclose(model.apply(new, X), want, rtol=1e-4, atol=1e-5)
        wrong = LinenKeras(epsilon=0.5)
        with pytest.raises(
            ValueError, match=r"differ are Keras's '.*n' and 'BatchNorm_0'; their inputs agree.*epsilon"
        ):
            interop.from_keras_model(theirs, variables(wrong), model=wrong, inputs=X, expected=want)
        wrong = LinenKeras(strides=2)
        with pytest.raises(
            ValueError, match=r"entirely.*differ are Keras's '.*c' and 'Conv_0'; their inputs agree.*strides"
        ):
            interop.from_keras_model(theirs, variables(wrong), model=wrong, inputs=X, expected=want)
        assert not any("call" in vars(layer) for layer in layers)
        np.testing.assert_array_equal(theirs(X, training=False), want)
