"""Features that are the elements of an image, in PyTorch's order and in ours. No PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import interop
from tests.support.torch_arrays import CLASSIFIER, IMAGE, LAST, conv, norm, normalized, state_dict


class Classifier(nn.Module):
    """Convolution, flatten, BatchNorm, Dense, the flatten in some way."""

    way: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)(x)
        if self.way == "jit":
            x = jax.jit(lambda x: jax.nn.gelu(x, approximate=False).reshape(len(x), -1))(x)
        elif self.way == "remat":
            x = jax.checkpoint(lambda x: jax.nn.gelu(x.reshape(len(x), -1), approximate=False))(x)
        elif self.way == "channels first":
            x = jax.nn.gelu(x, approximate=False).transpose(0, 3, 1, 2).reshape(len(x), -1)
        elif self.way == "one example":
            x = jax.vmap(lambda x: jax.nn.gelu(x, approximate=False).ravel())(x)
        elif self.way == "two steps":
            x = jax.nn.gelu(x, approximate=False).reshape(len(x), 2, 12).reshape(len(x), -1)
        else:
            x = jax.nn.gelu(x, approximate=False).reshape(len(x), -1)
        return nn.Dense(5, use_bias=False)(norm()(x))


class NNXClassifier(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.z = nnx.Conv(3, 4, (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.b = bnjax.nnx.BatchNorm(24, use_running_average=True, rngs=rngs)
        self.a = nnx.Linear(24, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.gelu(self.z(x), approximate=False)
        return self.a(self.b(x.reshape(len(x), -1)))


@pytest.mark.parametrize("way", ["reshape", "jit", "remat", "channels first", "one example", "two steps", "nnx"])
def test_a_flatten_between_convolution_and_dense_keeps_the_outputs(way):
    x = jax.nn.gelu(conv(IMAGE, CLASSIFIER["features.0.weight"]), approximate=False).reshape(2, -1)
    want = normalized(x, CLASSIFIER, "bn") @ CLASSIFIER["fc.weight"].T
    if way == "nnx":
        model = NNXClassifier()
        apply, variables = bnjax.nnx.functional(model)
    else:
        model = Classifier(way)
        apply, variables = model.apply, model.init(jax.random.key(0), LAST)
    new, report = interop.from_torch_model(CLASSIFIER, variables, model=model, inputs=LAST)
    np.testing.assert_allclose(apply(new, LAST), want, rtol=1e-5, atol=1e-5)
    back, again = interop.to_torch_model(new, state_dict=CLASSIFIER, model=model, inputs=LAST)
    assert report == again
    for key, value in CLASSIFIER.items():
        np.testing.assert_array_equal(back[key], 0 if key.endswith("tracked") else value)


def test_a_dense_layer_whose_features_become_an_image_keeps_the_outputs():
    arrays = state_dict(fc=(24, 6), bn=24, conv=(2, 4, 2, 2))
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    hidden = normalized(x @ arrays["fc.weight"].T, arrays, "bn").reshape(3, 4, 2, 3)
    model = nn.Sequential(
        [
            nn.Dense(24, use_bias=False),
            norm(),
            lambda x: x.reshape(-1, 2, 3, 4),
            nn.Conv(2, (2, 2), padding="VALID", use_bias=False),
        ]
    )
    variables, _ = interop.from_torch_model(
        arrays, model.init(jax.random.key(0), x), model=model, inputs=jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    want = conv(hidden, arrays["conv.weight"]).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model.apply(variables, x), want, rtol=1e-5, atol=1e-5)


class Joined(nn.Module):
    """A flattened image, and the features of a dense layer that are added to it."""

    @nn.compact
    def __call__(self, x):
        flat = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)(x).reshape(len(x), -1)
        return nn.Dense(5, use_bias=False)(flat + nn.Dense(24, use_bias=False)(x.mean((1, 2))))


def test_features_added_to_those_of_a_flattened_image_have_their_order():
    arrays = state_dict(conv=(4, 3, 3, 3), other=(24, 3), fc=(5, 24))
    variables = Joined().init(jax.random.key(0), LAST)
    new, _ = interop.from_torch_model(arrays, variables, model=Joined(), inputs=LAST)
    flat = conv(IMAGE, arrays["conv.weight"]).reshape(2, -1) + IMAGE.mean((2, 3)) @ arrays["other.weight"].T
    np.testing.assert_allclose(Joined().apply(new, LAST), flat @ arrays["fc.weight"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("library", ["torch", "keras"])
def test_a_transposed_convolution_is_the_transpose_of_one(swapped, library):
    kernel = np.random.default_rng(0).normal(size=(3, 4, 2, 3)).astype("float32")  # PyTorch's (in, out, height, width)
    model = nn.ConvTranspose(4, (2, 3), (2, 2), padding="VALID", use_bias=False, transpose_kernel=swapped)
    variables = model.init(jax.random.key(0), LAST)
    how = {"model": model, "inputs": LAST}
    if library == "torch":
        new, report = interop.from_torch_model({"up.weight": kernel}, variables, **how)
        back, _ = interop.to_torch_model(new, state_dict={"up.weight": kernel}, **how)
        np.testing.assert_array_equal(back["up.weight"], kernel)
    else:
        theirs = kernel.transpose(2, 3, 1, 0)  # Keras's (height, width, out, in)
        new, report = interop.from_keras_model({"up/kernel": theirs}, variables, **how)
        (back,), _ = interop.to_keras_model(new, {"up/kernel": theirs}, **how)
        np.testing.assert_array_equal(back, theirs)
    assert report.tensors[0].done.endswith("flipped along (0, 1)") == (not swapped)
    want, pullback = jax.vjp(lambda x: conv(x, kernel, window_strides=(2, 2)), np.zeros((2, 4, 8, 11), np.float32))
    assert want.shape == IMAGE.shape
    np.testing.assert_allclose(model.apply(new, LAST), pullback(IMAGE)[0].transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


class Unclear(nn.Module):
    """Features whose order in PyTorch is not determined."""

    what: str

    @nn.compact
    def __call__(self, x):
        if self.what == "input":
            return nn.Dense(5)(x.reshape(len(x), -1))
        if self.what == "shuffle":
            x = nn.Conv(12, (1, 1))(x).reshape(2, 4, 5, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
            return nn.Conv(5, (1, 1))(x.reshape(2, 8, 10, 3))
        x = nn.Conv(3, (1, 1))(x)
        if self.what == "tokens":
            return nn.Dense(5)(x.reshape(2, 20, 3).reshape(2, -1))
        flat = x.reshape(len(x), -1)
        joined = jnp.concatenate([flat, flat], 1)
        others = jnp.concatenate([x.mean((1, 2)), flat], 1)
        return nn.Dense(5)(
            {"joined": joined, "joined with others": others, "sorted": jnp.sort(flat), "backwards": flat[:, ::-1]}[
                self.what
            ]
        )


@pytest.mark.parametrize("what", ["input", "shuffle", "tokens", "joined", "joined with others", "sorted", "backwards"])
def test_features_in_an_order_that_cannot_be_told_are_ambiguous(what):
    model = Unclear(what)
    variables = model.init(jax.random.key(0), LAST)
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        layer, name = (key.key for key in path)
        transposed = jnp.moveaxis(leaf, (-1, -2), (0, 1)) if leaf.ndim > 1 else leaf
        arrays[f"{layer}.{'weight' if name == 'kernel' else name}"] = transposed
    arrays = {key: arrays[key] for key in sorted(arrays)}
    layer = "Conv_0" if what == "shuffle" else "Dense_0"
    how = {"model": model, "inputs": LAST}
    with pytest.raises(
        ValueError, match=rf"from_torch_model.*ambiguous.*'{layer}'.*Pass flatten=\{{'{layer}': \(height"
    ):
        interop.from_torch_model(arrays, variables, **how)
    everything = dict.fromkeys(["Conv_0", "Conv_1", "Dense_0"] if what == "shuffle" else [layer], ())
    everything = {path: () for path in everything if path in variables["params"]}
    new, _ = interop.from_torch_model(arrays, variables, flatten=everything, **how)
    for ours, before in zip(jax.tree.leaves(new), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(ours, before)


def test_an_image_flattened_into_the_first_layer_is_told_by_flatten():
    arrays = state_dict(fc=(5, 60))
    model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(5, use_bias=False)])
    variables = model.init(jax.random.key(0), LAST)
    for how in ({}, {"model": model, "inputs": LAST}):  # without the model too
        new, report = interop.from_torch_model(arrays, variables, flatten={"layers_1": (4, 5, 3)}, **how)
        want = IMAGE.reshape(2, -1) @ arrays["fc.weight"].T
        np.testing.assert_allclose(model.apply(new, LAST), want, rtol=1e-5, atol=1e-5)
    assert report.tensors[0].done == "reshaped to (5, 3, 4, 5), transposed (2, 3, 1, 0), reshaped"
    with pytest.raises(ValueError, match=r"flatten=\{'layers_1': \(4, 5\)\}.*has 60 features, the image 20 elements"):
        interop.from_torch_model(arrays, variables, flatten={"layers_1": (4, 5)})
    with pytest.raises(ValueError, match=r"flatten=\.\.\.\): the model has no \['fc'\], but \['layers_1'\]"):
        interop.from_torch_model(arrays, variables, flatten={"fc": ()})


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 3, 4)])
def test_groups_of_the_input_itself_have_the_order_of_the_input(shape):
    model = nn.Sequential([nn.GroupNorm(2), nn.Dense(3, use_bias=False)])
    x = np.ones(shape, "float32")
    arrays = {"0.weight": np.arange(4.0), "0.bias": np.arange(4.0, 8), "1.weight": np.arange(12.0).reshape(3, 4)}
    new, _ = interop.from_torch_model(arrays, jax.eval_shape(model.init, jax.random.key(0), x), model=model, inputs=x)
    np.testing.assert_array_equal(new["params"]["layers_0"]["scale"], np.arange(4.0))
    np.testing.assert_array_equal(new["params"]["layers_1"]["kernel"], arrays["1.weight"].T)


@pytest.mark.parametrize("axis", [1, -1, "transposed"])
def test_a_batch_normalization_of_the_rows_of_a_square_image_is_refused(axis):
    norms = [norm() if axis == -1 else bnjax.linen.BatchNorm(use_running_average=True, axis=1)]
    if axis == "transposed":
        norms = [lambda x: x.transpose(0, 3, 1, 2), *norms]
    model = nn.Sequential([nn.Conv(4, (1, 1), use_bias=False), *norms])
    x = np.ones((1, 4, 4, 3), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    arrays = state_dict(conv=(4, 3, 1, 1), bn=4)
    if axis == 1:
        with pytest.raises(ValueError, match="'bn' normalizes channels, but the features of 'layers_1' are on axis -3"):
            interop.from_torch_model(arrays, variables, model=model, inputs=x)
    else:
        new, _ = interop.from_torch_model(arrays, variables, model=model, inputs=x)
        np.testing.assert_array_equal(new["batch_stats"][f"layers_{len(norms)}"]["mean"], arrays["bn.running_mean"])
