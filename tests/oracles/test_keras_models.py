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


FIRST = "channels_first"


def first_or_last(way):
    """An image model of square images, in either format, with `way` to flatten: "plain", "moved" or "last"."""
    layers, rng = keras.layers, np.random.default_rng(0)
    kept = {"data_format": "channels_last" if way == "last" else FIRST}
    inputs = keras.Input((8, 8, 3) if way == "last" else (3, 8, 8))
    axis = -1 if way == "last" else 1
    x = layers.BatchNormalization(axis=axis)(layers.DepthwiseConv2D(3, depth_multiplier=2, **kept)(inputs))
    x = layers.LayerNormalization(axis=axis)(layers.SeparableConv2D(4, 2, **kept)(x))
    x = layers.multiply([x, squeeze(x, way, kept)])
    x = layers.MaxPooling2D(2, **kept)(layers.Conv2D(4, 2, groups=2, **kept)(x))
    x = layers.BatchNormalization()(layers.Flatten(FIRST if way == "moved" else None)(x))
    x = layers.Dense(30)(x)
    if way == "plain":
        x = layers.Conv2DTranspose(4, 3, strides=2, **kept)(layers.Reshape((5, 2, 3))(x))
    model = keras.Model(inputs, x)
    model.set_weights([w + 0.1 + 0.1 * rng.random(w.shape, "float32") for w in model.get_weights()])
    return model


def squeeze(x, way, kept):
    layers = keras.layers
    s = layers.Dense(4, "sigmoid")(layers.GlobalAveragePooling2D(**kept)(x))
    return layers.Reshape((1, 1, 4) if way == "last" else (4, 1, 1))(s)


class LinenFirst(nn.Module):
    """The model of `first_or_last`; with `image` its last part forms an image."""

    image: bool

    @nn.compact
    def __call__(self, x):
        norm = partial(bnjax.linen.BatchNorm, use_running_average=True, **NORM)
        conv = partial(nn.Conv, padding="VALID")
        x = norm()(conv(6, (3, 3), feature_group_count=3)(x))
        x = conv(4, (1, 1))(conv(6, (2, 2), feature_group_count=6, use_bias=False)(x))
        x = nn.LayerNorm(epsilon=1e-3)(x)
        x = x * nn.sigmoid(nn.Dense(4)(x.mean((1, 2))))[:, None, None]
        x = nn.max_pool(conv(4, (2, 2), feature_group_count=2)(x), (2, 2), (2, 2))
        x = nn.Dense(30)(norm()(x.reshape(len(x), -1)))
        if self.image:
            x = nn.ConvTranspose(4, (3, 3), (2, 2), padding="VALID", transpose_kernel=True)(x.reshape(-1, 2, 3, 5))
        return x


@pytest.mark.parametrize("way", ["plain", "moved", "last"])
def test_a_model_with_channels_first_computes_as_in_keras_and_back(agree, way):
    with promotion():
        theirs = first_or_last(way)
        x = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype("float32")
        wanted = np.asarray(theirs(x if way == "last" else np.moveaxis(x, -1, 1), training=False))
    model = LinenFirst(way == "plain")
    variables, how = model.init(jax.random.key(0), x), {"model": model, "inputs": x}
    moved, _ = interop.from_keras_model(theirs, variables, **how)
    agree("output", jax.jit(model.apply)(moved, x), np.moveaxis(wanted, 1, -1) if way == "plain" else wanted)
    weights, _ = interop.to_keras_model(moved, theirs, **how)
    for ours, weight in zip(weights, theirs.weights, strict=True):
        agree("round trip", ours, np.asarray(weight), growth=0)


def two_formats(first, last):
    """A convolution in each of two formats, and a Flatten after the second."""
    layers = keras.layers
    parts = [keras.Input((3, 6, 7) if first == FIRST else (6, 7, 3)), layers.Conv2D(5, 3, data_format=first)]
    parts += [layers.BatchNormalization(axis=1 if first == FIRST else -1)]
    if first != last:
        parts += [layers.Permute((2, 3, 1) if first == FIRST else (3, 1, 2))]
    return keras.Sequential([*parts, layers.Conv2D(4, 2, data_format=last), layers.Flatten(), layers.Dense(3)])


class LinenTwo(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, padding="VALID")
        x = bnjax.linen.BatchNorm(use_running_average=True, **NORM)(conv(5, (3, 3))(x))
        return nn.Dense(3)(conv(4, (2, 2))(x).reshape(len(x), -1))


@pytest.mark.parametrize("formats", [(FIRST, "channels_last"), ("channels_last", FIRST)])
def test_a_model_of_two_formats_is_refused_and_the_remedy_keeps_its_outputs(agree, formats):
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    with promotion():
        theirs, remedy = two_formats(*formats), two_formats(formats[1], formats[1])
        remedy.set_weights(theirs.get_weights())
        wanted = np.asarray(theirs(np.moveaxis(x, -1, 1) if formats[0] == FIRST else x, training=False))
    variables, how = LinenTwo().init(jax.random.key(0), x), {"model": LinenTwo(), "inputs": x}
    with pytest.raises(ValueError, match=r"\['conv2d.*in every layer, and set the same weights"):
        interop.from_keras_model(theirs, variables, **how)
    moved, _ = interop.from_keras_model(remedy, variables, **how)
    agree("output", LinenTwo().apply(moved, x), wanted)


@pytest.mark.parametrize("kind", ["BatchNormalization", "LayerNormalization", "GroupNormalization", "Dense"])
def test_a_layer_on_the_width_of_a_square_image_is_refused(kind):
    flax = {
        "BatchNormalization": bnjax.linen.BatchNorm(use_running_average=True),
        "LayerNormalization": nn.LayerNorm(),
        "GroupNormalization": nn.GroupNorm(2),
        "Dense": nn.Dense(4),
    }[kind]
    make, x = getattr(keras.layers, kind), np.ones((1, 4, 4, 3), np.float32)
    model = nn.Sequential([nn.Conv(4, (1, 1)), flax])
    variables = model.init(jax.random.key(0), x)
    options = {"groups": 2} if kind == "GroupNormalization" else {"units": 4} if kind == "Dense" else {}
    layers = [keras.layers.Conv2D(4, 1, data_format=FIRST), make(**options, name="on_width")]
    models = [keras.Sequential([keras.Input((3, 4, 4)), *layers])]
    if kind != "Dense":
        layers = [keras.layers.Conv2D(4, 1), make(**options, axis=1, name="on_height")]
        models += [keras.Sequential([keras.Input((4, 4, 3)), *layers])]
    places = r"axis -1 of 4, which is axis -2 with", r"axis 1 of 4, which is axis -3 with"
    for theirs, words in zip(models, places, strict=False):
        with pytest.raises(ValueError, match=words):
            interop.from_keras_model(theirs, variables, model=model, inputs=x)


def test_a_renormalized_model_evaluates_as_in_keras_and_goes_back(agree):
    layers = keras.layers
    clipping = {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0}
    norm = layers.BatchNormalization(renorm=True, renorm_clipping=clipping)
    theirs = keras.Sequential([keras.Input((20,)), layers.Dense(5), norm])
    x = np.random.default_rng(0).normal(size=(16, 20)).astype("float32")
    with promotion():
        for _ in range(3):
            theirs(x, training=True)
        wanted = np.asarray(theirs(x, training=False))
    model = nn.Sequential([nn.Dense(5), bnjax.linen.RenormBatchNorm(use_running_average=True, **NORM)])
    variables, how = model.init(jax.random.key(0), x), {"model": model, "inputs": x}
    moved, report = interop.from_keras_model(theirs, variables, **how)
    agree("output", model.apply(moved, x), wanted)
    assert [row.theirs for row in report.tensors] == [*(weight.path for weight in theirs.weights), ""]
    assert report.tensors[-1].done == "0: not counted there"
    weights, _ = interop.to_keras_model(moved, theirs, **how)
    params, state = interop.from_keras(norm)
    for ours, single in zip(weights[2:], interop.to_keras(params, state, norm), strict=True):
        agree("round trip", ours, single, growth=0)
    theirs.set_weights(weights)
    # Keras's momentum of its variance is that of its standard deviation, so both statistics agree after any training.
    agree("running std", np.asarray(norm.moving_stddev), np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon))
    agree("running mean", np.asarray(norm.renorm_mean), np.asarray(norm.moving_mean), growth=0)
    with promotion():
        agree("output", np.asarray(theirs(x, training=False)), wanted)


class LinenPermuted(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID")(x).transpose(0, 3, 1, 2)
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.mark.parametrize("way", ["layers", "operations"])
def test_a_flatten_of_permuted_axes_is_refused_and_the_remedy_keeps_the_outputs(agree, way):
    layers, inputs = keras.layers, keras.Input((6, 7, 3))
    y = layers.Conv2D(4, 3)(inputs)
    if way == "layers":
        y = layers.Flatten()(layers.Permute((3, 1, 2))(y))
    else:
        y = keras.ops.reshape(keras.ops.transpose(y, (0, 3, 1, 2)), (-1, 80))
    theirs = keras.Model(inputs, layers.Dense(3)(y))
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    variables, how = LinenPermuted().init(jax.random.key(0), x), {"model": LinenPermuted(), "inputs": x}
    with pytest.raises(ValueError, match=r"\['(flatten|reshape).*'\] flatten axes that were permuted.*flatten="):
        interop.from_keras_model(theirs, variables, **how)
    arrays = [(weight.path, weight) for weight in theirs.weights]
    moved, _ = interop.from_keras_model(arrays, variables, **how, flatten={"Dense_0": ()})
    with promotion():
        wanted = np.asarray(theirs(x))
    agree("output", LinenPermuted().apply(moved, x), wanted)


def test_permuted_tokens_that_a_dense_layer_mixes_are_no_flatten(agree):
    layers, inputs = keras.layers, keras.Input((8, 8, 3))
    tokens = layers.Reshape((4, 6))(layers.Conv2D(6, 4, 4)(inputs))
    mixed = layers.Permute((2, 1))(layers.Dense(4)(layers.Permute((2, 1))(tokens)))
    theirs = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.add([tokens, mixed]))))

    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (4, 4), (4, 4), padding="VALID")(x).reshape(len(x), 4, 6)
            x += nn.Dense(4)(x.swapaxes(1, 2)).swapaxes(1, 2)
            return nn.Dense(2)(x.reshape(len(x), -1))

    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    moved, _ = interop.from_keras_model(theirs, Mixer().init(jax.random.key(0), x), model=Mixer(), inputs=x)
    with promotion():
        agree("output", Mixer().apply(moved, x), np.asarray(theirs(x)))
