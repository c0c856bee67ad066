"""The experiments' networks: against Flax's convolutions, and what their variables are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import data
from experiments.models import networks
from experiments.models.networks import Layer
from tests.support import reference

SHAPE = (7, 6)  # one side is odd, as those of a halved image may be


def dataset(*shape, classes=3):
    images = np.zeros((classes, *shape), np.float32)
    return data.Dataset("none", images, np.arange(classes, dtype=np.int32), images, np.arange(classes, dtype=np.int32))


def flax_convolution(x, kernel, stride):
    """`flax.linen.Conv` with a pixel of zeros around the image."""
    features = kernel.shape[-1]
    conv = nn.Conv(features, (3, 3), (stride, stride), padding=1, use_bias=False, dtype=x.dtype)
    return conv.apply({"params": {"kernel": kernel.reshape(3, 3, x.shape[-1], features)}}, x)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-4), (np.float64, 1e-11)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_convolutional_matches_flax(dtype, rtol, batch_norm, rng, flax_promotion):
    init, apply = networks.convolutional(dataset(*SHAPE), batch_norm)
    with jax.enable_x64(dtype == np.float64):
        params, state = init(jax.random.key(0))
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
        x = rng.standard_normal((5, *SHAPE)).astype(dtype)
        logits, new = jax.jit(apply, static_argnums=3)(params, state, x.reshape(5, -1), True)
        # Flax's padding of 1 on both sides, for both strides, is that of patches.
        hidden = x[..., None]
        for i, layer in enumerate(params[:-1]):
            hidden = flax_convolution(jnp.asarray(hidden), layer["kernel"], 2 if i in (2, 4) else 1)
            if batch_norm:
                _, mean, var = reference.moments(np.asarray(hidden, np.float64))
                hidden = reference.normalize(hidden, mean, var, 1, 0).astype(dtype)
                np.testing.assert_allclose(new[i].mean, 0.1 * mean, rtol=1e-3, atol=1e-5)
            else:
                hidden = hidden + layer["bias"]
            hidden = np.maximum(hidden, 0)
        wanted = np.asarray(hidden).mean((1, 2)) @ params[-1]["kernel"] + params[-1]["bias"]
    assert logits.shape == (5, 3)
    assert len(new) == 8 * batch_norm
    # Batch statistics are of float32, so with them float64 is no more exact.
    rtol = max(rtol, 1e-4) if batch_norm else rtol
    np.testing.assert_allclose(logits, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_neighbourhoods_with_zeros_outside(stride, rng):
    x = rng.standard_normal((2, 5, 4, 3)).astype(np.float32)
    found = networks.patches(jnp.asarray(x), stride).reshape(2, -(-5 // stride), -(-4 // stride), 3, 3, 3)
    around = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for row, column in np.ndindex(found.shape[1:3]):
        top, left = stride * row, stride * column
        np.testing.assert_array_equal(found[:, row, column], around[:, top : top + 3, left : left + 3])


def test_a_mask_leaves_padding_out_of_all_convolutions(rng):
    init, apply = networks.convolutional(dataset(8, 8), True)
    variables = init(jax.random.key(0))
    x = rng.standard_normal((6, 64)).astype(np.float32)
    mask = np.arange(6)[:, None] < 4
    call = jax.jit(apply, static_argnums=3)
    padded, new = call(*variables, x, True, mask=mask)
    alone, expected = call(*variables, x[:4], True, mask=np.ones((4, 1), bool))
    np.testing.assert_allclose(padded[:4], alone, rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), new, expected)


def test_images_with_channels_are_read_as_such(rng):
    layers, x = (Layer(4, 1), Layer(2)), rng.standard_normal((3, 5, 4, 2)).astype(np.float32)
    params, state = networks.init(jax.random.key(0), 2, layers, networks.he, False)
    logits, _ = networks.apply(params, state, x.reshape(3, -1), False, layers=layers, shape=(5, 4, 2))
    first, last = params
    hidden = np.maximum(flax_convolution(jnp.asarray(x), np.asarray(first["kernel"]), 1), 0)
    np.testing.assert_allclose(logits, hidden.mean((1, 2)) @ last["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (20, 20)])
def test_orthogonal_kernels_are_orthogonal(shape, rng):
    kernel = np.asarray(networks.orthogonal(jnp.asarray(rng.standard_normal(shape), jnp.float32)), np.float64)
    gram = kernel.T @ kernel if shape[0] >= shape[1] else kernel @ kernel.T
    np.testing.assert_allclose(gram, 2 * np.eye(min(shape)), atol=1e-5)


def test_orthogonal_kernels_have_no_preferred_direction(rng):
    normal = jnp.asarray(rng.standard_normal((2000, 4, 4)), jnp.float32)
    drawn = np.asarray(jax.jit(jax.vmap(networks.orthogonal))(normal)) / np.sqrt(2)
    # Each element of a uniform rotation of 4 dimensions has mean 0 and variance 1 / 4.
    np.testing.assert_allclose(drawn.mean(0), 0, atol=4 * 0.5 / np.sqrt(2000))
    np.testing.assert_allclose(drawn.var(0), 0.25, atol=0.03)


@pytest.mark.parametrize(
    ("weights", "variance"), [(networks.he, 2 / 50), (networks.lecun, 1 / 50), (networks.constant(0.3), 0.09)]
)
def test_kernels_have_their_variance(weights, variance, rng):
    kernel = weights(jnp.asarray(rng.standard_normal((50, 4000)), jnp.float32))
    np.testing.assert_allclose(np.var(kernel), variance, rtol=0.02)


@pytest.mark.parametrize(
    ("placement", "names"),
    [("before", {"kernel", "bn"}), ("after", {"kernel", "bn_after"}), ("both", {"kernel", "bn", "bn_after"})],
)
def test_a_normalized_layer_has_no_bias_wherever_the_normalization_is(placement, names):
    init, _ = networks.mlp(dataset(8, 8), (5, 4), True, placement=placement)
    params, state = init(jax.random.key(0))
    assert [set(layer) for layer in params] == [names, names, {"kernel", "bias"}]
    features = [5, 4] if placement != "both" else [5, 5, 4, 4]
    assert [each.mean.shape for each in state] == [(number,) for number in features]
    plain, nothing = networks.mlp(dataset(8, 8), (5, 4), False, placement=placement)[0](jax.random.key(0))
    assert [set(layer) for layer in plain] == [{"kernel", "bias"}] * 3
    assert nothing == []


@pytest.mark.parametrize("placement", ["before", "after", "both"])
def test_normalization_has_its_place(placement, rng):
    init, apply = networks.mlp(dataset(2, 3), (5,), True, placement=placement)
    params, state = init(jax.random.key(0))
    x = rng.standard_normal((9, 6)).astype(np.float32)

    def normalized(x):
        _, mean, var = reference.moments(x)
        return reference.normalize(x, mean, var, 1, 0)

    hidden = x @ np.asarray(params[0]["kernel"], np.float64)
    hidden = np.maximum(normalized(hidden) if placement != "after" else hidden, 0)
    hidden = normalized(hidden) if placement != "before" else hidden
    logits, _ = apply(params, state, x, True)
    np.testing.assert_allclose(logits, hidden @ params[1]["kernel"], rtol=1e-3, atol=1e-4)


def test_a_network_has_the_kernels_of_its_key_with_and_without_normalization():
    both = [networks.convolutional(dataset(8, 8), batch_norm)[0](jax.random.key(3))[0] for batch_norm in (True, False)]
    for normalized, plain in zip(*both, strict=True):
        np.testing.assert_array_equal(normalized["kernel"], plain["kernel"])
    scaled, _ = networks.convolutional(dataset(8, 8), False)[0](jax.random.key(3), scale=0.5)
    np.testing.assert_allclose(scaled[4]["kernel"], 0.5 * both[1][4]["kernel"], rtol=1e-6)
