"""Whole models of Keras, and the Flax models that their weights are moved to, and back."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import interop
from tests.oracles.layers import promotion

RATE = 0.125
NORM = {"momentum": 0.99, "epsilon": 1e-3}


def dense():
    """Dense, ReLU and BatchNormalization, twice, with a shortcut between layers of one shape."""
    inputs = keras.Input((20,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(64, "relu")(inputs))
    y = keras.layers.BatchNormalization(scale=False)(keras.layers.Dense(64, "relu", use_bias=False)(x))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.add([x, y])))


class LinenDense(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = partial(bnjax.linen.BatchNorm, use_running_average=not train, **NORM)
        x = norm()(nn.relu(nn.Dense(64)(x)))
        y = norm(use_scale=False)(nn.relu(nn.Dense(64, use_bias=False)(x)))
        return nn.Dense(3)(x + y)


class NNXDense(nnx.Module):
    def __init__(self, rngs):
        self.last = nnx.Linear(64, 3, rngs=rngs)
        self.second = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
        self.first = nnx.Linear(20, 64, rngs=rngs)
        self.norms = nnx.List([bnjax.nnx.BatchNorm(64, use_scale=scale, rngs=rngs, **NORM) for scale in (True, False)])

    def __call__(self, x):
        x = self.norms[0](nnx.relu(self.first(x)))
        return self.last(x + self.norms[1](nnx.relu(self.second(x))))


def image():
    layers = keras.layers
    block = [layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(4, 3, strides=2, use_bias=False),
            keras.Sequential(block),
            layers.SeparableConv2D(6, 2),
            layers.Conv2D(8, 1, groups=2),
            layers.Flatten(),
            layers.Dense(2 * 3 * 5),
            layers.BatchNormalization(),
            layers.Reshape((2, 3, 5)),
            layers.Conv2DTranspose(4, 3, strides=2),
        ]
    )


class LinenImage(nn.Module):
    swapped: bool

    @nn.compact
    def __call__(self, x, train):
        norm = partial(bnjax.linen.BatchNorm, use_running_average=not train, **NORM)
        conv = partial(nn.Conv, padding="VALID")
        x = conv(4, (3, 3), 2, use_bias=False)(x)
        x = nn.relu(norm()(conv(8, (3, 3), feature_group_count=4, use_bias=False)(x)))
        x = conv(6, (1, 1))(conv(8, (2, 2), feature_group_count=8, use_bias=False)(x))
        x = conv(8, (1, 1), feature_group_count=2)(x).reshape(len(x), -1)
        x = norm()(nn.Dense(30)(x)).reshape(-1, 2, 3, 5)
        return nn.ConvTranspose(4, (3, 3), (2, 2), padding="VALID", transpose_kernel=self.swapped)(x)


def text():
    layers = [keras.layers.Embedding(11, 6), keras.layers.LayerNormalization(), keras.layers.Conv1D(5, 3)]
    return keras.Sequential([keras.Input((7,)), *layers, keras.layers.BatchNormalization()])


class LinenText(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.LayerNorm(epsilon=1e-3)(nn.Embed(11, 6)(x))
        x = nn.Conv(5, (3,), padding="VALID")(x)
        return bnjax.linen.BatchNorm(use_running_average=not train, **NORM)(x)


MODELS = {
    "dense": (dense, LinenDense, (16, 20)),
    "dense nnx": (dense, NNXDense, (16, 20)),
    "image": (image, partial(LinenImage, False), (8, 12, 12, 3)),
    "image swapped": (image, partial(LinenImage, True), (8, 12, 12, 3)),
    "text": (text, LinenText, (8, 7)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_computes_as_in_keras_and_back(agree, name):
    make, flax, shape = MODELS[name]
    keras.utils.set_random_seed(0)
    theirs, other = make(), make()
    theirs.compile(optimizer=keras.optimizers.SGD(RATE), loss="mse")
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3, *shape)).astype("float32")
    if name == "text":
        inputs = rng.integers(0, 11, inputs.shape)
    with promotion():
        theirs.set_weights([w + 0.1 * rng.random(w.shape, "float32") for w in theirs.get_weights()])
        wanted = np.asarray(theirs(inputs[0], training=False))
    if flax is NNXDense:
        model = NNXDense(nnx.Rngs(0))
        (apply, variables), options = bnjax.nnx.functional(model), ({}, {})
    else:
        model, options = flax(), ({"train": False}, {"train": True})
        apply, variables = model.apply, model.init(jax.random.key(0), inputs[0], False)
    how = {"model": model, "inputs": inputs[0], **options[0]}
    moved, report = interop.from_keras_model(theirs, variables, **how)
    assert [row.theirs for row in report.tensors] == [weight.path for weight in theirs.weights]
    agree("output", jax.jit(partial(apply, **options[0]))(moved, inputs[0]), wanted)

    target = rng.normal(size=wanted.shape).astype("float32")
    with promotion():
        loss = theirs.train_on_batch(inputs[1], target)
        wanted = np.asarray(theirs(inputs[2], training=False))

    def mse(params):
        y, updates = apply({**moved, "params": params}, inputs[1], mutable=["batch_stats"], **options[1])
        return jnp.mean((y - target) ** 2), updates

    (value, updates), gradients = jax.jit(jax.value_and_grad(mse, has_aux=True))(moved["params"])
    agree("loss", value, loss)
    params = jax.tree.map(lambda p, g: p - RATE * g, moved["params"], gradients)
    moved = {**moved, "params": params, **updates}
    weights, report = interop.to_keras_model(moved, other, **how)
    assert [row.theirs for row in report.tensors] == [weight.path for weight in other.weights]
    for ours, weight in zip(weights, theirs.weights, strict=True):
        agree("running var" if "moving" in weight.path else "parameter", ours, weight)
    with promotion():
        other.set_weights(weights)
        agree("output", np.asarray(other(inputs[2], training=False)), wanted)
    back, _ = interop.from_keras_model([(w.path, w.numpy()) for w in other.weights], variables, **how)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(moved), strict=True):
        agree("round trip", new, old, growth=0)


def test_from_keras_model_rejects_channels_first():
    inner = keras.layers.Conv2D(4, 1, data_format="channels_first", name="inner")
    theirs = keras.Sequential([keras.Input((3, 8, 8)), keras.Sequential([inner])])
    with pytest.raises(ValueError, match=r"from_keras_model\(weights=\.\.\.\): \['inner'\] have data_format"):
        interop.from_keras_model(theirs, {"params": {}})
