"""Masks of the Flax layers: by NumPy's broadcasting, but never of features by mistake; weights are 0 or more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from tests.support import reference

SQUARE = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(np.float32)
WIDE = np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)


def linen_mean(x, mask, axis=-1):
    layer = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.0, axis=axis)
    variables = layer.init(jax.random.key(0), x)
    return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]["mean"]


def nnx_mean(x, mask, axis=-1):
    layer = bnjax.nnx.BatchNorm(x.shape[axis], momentum=0.0, axis=axis, rngs=nnx.Rngs(0))
    layer(x, mask=mask)
    return layer.mean[...]


@pytest.fixture(params=[linen_mean, nnx_mean], ids=["linen", "nnx"])
def mean(request):
    return request.param


# Shape of x, the feature axis, and shape of the mask; the shape with which it masks examples or positions.
MISTAKES = {
    "examples": ((3, 3), -1, (3,), "mask[..., None]", (3, 1)),
    "examples of sequences": ((3, 3, 3), -1, (3,), "mask.reshape(3, 1, 1)", (3, 1, 1)),
    "positions": ((3, 3, 3), -1, (3, 3), "mask[..., None]", (3, 3, 1)),
    "pixels": ((3, 3, 3, 3), -1, (3, 3, 3), "mask[..., None]", (3, 3, 3, 1)),
    "pixels of all examples": ((2, 3, 3, 3), -1, (3, 3), "mask.reshape(1, 3, 3, 1)", (1, 3, 3, 1)),
    "positions, channels first": ((3, 3, 3), 1, (3, 3), "mask.reshape(3, 1, 3)", (3, 1, 3)),
    "pixels, channels first": ((3, 3, 3, 3), 1, (3, 3, 3), "mask.reshape(3, 1, 3, 3)", (3, 1, 3, 3)),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mask_that_would_mask_features_is_refused_with_the_shape_to_pass(case, mean):
    shape, axis, mask_shape, spelled, fitting = MISTAKES[case]
    x, mask = (
        SQUARE.reshape(-1)[: np.prod(shape)].reshape(shape),
        np.arange(np.prod(mask_shape)).reshape(mask_shape) != 1,
    )
    with pytest.raises(ValueError, match=r"^BatchNorm\(mask=...\): .*masks features, axis") as caught:
        mean(x, mask, axis)
    assert f"pass {spelled}, of shape {fitting}." in str(caught.value)
    remedy = mask.reshape(fitting)
    np.testing.assert_allclose(mean(x, remedy, axis), reference.moments(x, axis, remedy)[1], atol=1e-6)


def test_a_mask_of_examples_that_does_not_broadcast_is_shown_its_shape(mean):
    with pytest.raises(ValueError, match=r"does not broadcast.*pass mask\.reshape\(2, 1, 1, 1\)"):
        mean(WIDE, np.ones(2, bool))
    with pytest.raises(ValueError, match=r"does not broadcast.*Reshape it so that its last axes"):
        mean(WIDE, np.ones((2, 2), bool))


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_a_mask_of_features_alone_is_refused_below_the_rank_of_x(shape, mean):
    with pytest.raises(
        ValueError, match=r"masks features, axis 3 of x\. To mask features pass mask\.reshape\(1, 1, 1, 5\)"
    ):
        mean(WIDE, np.ones(shape, bool))
    mask = np.arange(5).reshape(1, 1, 1, 5) < 4
    np.testing.assert_array_equal(np.asarray(mean(WIDE, mask)) != 0, mask.reshape(-1))  # momentum 0, from mean 0


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((), -1), ((1,), -1), ((4, 1), -1), ((3, 4, 1), -1), ((4, 5), -1), ((4, 5), 1), ((5,), 1), ((5,), 0)],
)
def test_what_numpy_broadcasts_without_a_doubt_passes(shape, axis, mean):
    mask = np.random.default_rng(2).random(shape) < 0.8 if shape else np.array(True)
    want = reference.moments(WIDE, axis, np.broadcast_to(mask, WIDE.shape))[1]
    np.testing.assert_allclose(mean(WIDE, mask, axis), want, atol=1e-6)


PARAMS, STATE = bnjax.bn_init(3)
X = SQUARE[0, 0]
CALLS = {
    "bn_apply": lambda mask: bnjax.bn_apply(PARAMS, STATE, X, True, mask=mask)[1],
    "batch_moments": lambda mask: bnjax.batch_moments(X, mask=mask),
    "ghost_bn_apply": lambda mask: bnjax.ghost_bn_apply(PARAMS, STATE, X, True, ghost_size=2, mask=mask)[1],
    "renorm_bn_apply": lambda mask: bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=1, d_max=0, mask=mask)[1],
    "indexed_bn_apply": lambda mask: bnjax.indexed_bn_apply(
        PARAMS, bnjax.indexed_bn_init(3, 2)[1], X, True, index=0, mask=mask
    )[1],
    "linen": lambda mask: linen_mean(X, mask),
    "nnx": lambda mask: nnx_mean(X, mask),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_a_known_weight_that_is_no_weight_is_an_error_and_an_unknown_one_masks(call, wrong):
    name = "BatchNorm" if call in ("linen", "nnx") else call
    weights = np.array([[1.0], [2.0], [wrong]], np.float32)
    for mask in (weights, jnp.asarray(weights)):
        with pytest.raises(
            ValueError, match=rf"^{name}\(mask=...\): expected booleans or finite weights >= 0, got {wrong}"
        ):
            CALLS[call](mask)
    if not wrong > 0:
        got, want = (jax.jit(CALLS[call])(np.where(weights >= 0, weights, value)) for value in (wrong, 0))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_negative_integer_weight_is_an_error():
    with pytest.raises(ValueError, match=r"^bn_apply\(mask=...\): .*got -2 among them"):
        CALLS["bn_apply"](np.array([[1], [0], [-2]]))
