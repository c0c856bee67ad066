"""Errors in float32 against float64: they may grow linearly with |mean| / std, never with its square."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import reference
from tests.support.tolerances import EPS, FACTOR

pytestmark = pytest.mark.optimized

OFFSETS = [0.0, 1.0, 1e2, 1e4, 1e5]
SPREADS = [1e-3, 1.0, 1e3]
LAYOUTS = {"NHWC": ((4, 7, 11, 5), -1), "NCHW": ((4, 5, 7, 11), 1), "NC": ((1009, 5), 1), "pair": ((2, 5), 1)}
MASKS = ["none", "rows", "places", "weights", "nan"]


def make(shape, axis, offset, spread, rng):
    """Normal data of the given spread around offset * spread, and a cotangent."""
    x = ((rng.standard_normal(shape) + offset) * spread).astype(np.float32)
    return x, rng.standard_normal(shape).astype(np.float32)


def make_mask(kind, x, axis, rng):
    """A mask, and x with NaN at masked elements."""
    if kind == "none":
        return None, x
    if kind == "rows":
        return (np.arange(len(x)) < max(2, len(x) * 3 // 4)).reshape(-1, *(1,) * (x.ndim - 1)), x
    mask = rng.random(x.shape) < 0.7
    mask[:2] = True  # two valid rows, all there are in the smallest layout
    if kind == "weights":
        return np.where(mask, rng.random(x.shape), 0).astype(np.float32), x
    return mask, np.where(mask, x, np.nan).astype(np.float32) if kind == "nan" else x


@partial(jax.jit, static_argnames=("axis", "epsilon"))
def differentiated(x, scale, bias, g, there, mask, axis, epsilon):
    """Gradients of the sum of g * y over the finite elements of x, output and new state."""
    _, state = bnjax.bn_init(x.shape[axis])

    def loss(x, scale, bias):
        # Without momentum the running statistics are the batch's, with all their digits.
        y, new = bnjax.bn_apply(
            bnjax.BNParams(scale, bias), state, x, True, axis=axis, mask=mask, momentum=0.0, epsilon=epsilon
        )
        return jnp.sum(jnp.where(there, y * g, 0)), (y, new)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)


def assert_accurate(x, g, axis, mask, epsilon=1e-5):
    """Output, state and gradients of bn_apply differ from the oracle's by FACTOR * eps * (condition) at the most."""
    features = x.shape[axis]
    scale = np.linspace(-2, 3, features).astype(np.float32)
    bias = np.linspace(5, -1, features).astype(np.float32)
    there = np.isfinite(x)  # finite masked elements too
    g = np.where(there, g, 0)
    (dx, dscale, dbias), (y, new) = differentiated(x, scale, bias, g, there, mask, axis, epsilon)

    axes = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    _, mean, var = reference.moments(x, axis, mask)
    want_y = reference.normalize(x, mean, var, scale, bias, axis, epsilon)
    want_dx, want_dscale, want_dbias = reference.gradients(x, g, scale, axis, epsilon, mask)
    largest = np.where(there, np.abs(x - np.expand_dims(mean, axes)), 0).max(axes)

    def check(name, got, want, unit, std):
        # The number in the bounds, per feature: 1 + max|x - mean| / std + |mean| / std.
        bound = FACTOR * EPS * (1 + largest / std + np.abs(mean) / std)
        error = np.abs(np.asarray(got, np.float64) - want)
        if error.shape == x.shape:
            assert np.isfinite(np.asarray(got)[there]).all(), name
            error = np.where(there, error, 0).max(axes)
        ratio = error / (bound * unit)
        assert (ratio <= 1).all(), f"{name}: error is {ratio.max():.3g} of the bound"

    # The statistics have no epsilon; rounding the data to float32 gives them this variance, if nothing else does.
    rounding = EPS * np.abs(mean) + np.finfo(np.float32).tiny
    check("mean", new.mean, mean, np.sqrt(var) + rounding, np.sqrt(var) + rounding)
    check("var", new.var, var, var + rounding**2, np.sqrt(var) + rounding)
    std = np.sqrt(var + epsilon)
    check("y", y, want_y, np.abs(scale) + np.abs(bias), std)
    rows = np.sqrt(np.prod([x.shape[a] for a in axes]))
    check("dbias", dbias, want_dbias, rows, std)
    check("dscale", dscale, want_dscale, rows, std)
    check("dx", dx, want_dx, np.maximum(np.abs(scale) / std, 1e-30) * np.abs(g).max(), std)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_apply_matches_the_float64_oracle(layout, kind, rng):
    shape, axis = LAYOUTS[layout]
    for offset, spread in itertools.product(OFFSETS, SPREADS):
        x, g = make(shape, axis, offset, spread, rng)
        mask, x = make_mask(kind, x, axis, rng)
        assert_accurate(x, g, axis, mask)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["first_zero", "sorted", "outlier", "constant"])
def test_bn_apply_matches_the_float64_oracle_on_hard_rows(name, axis, rng):
    x, g = make((4001, 3), 1, 0.0, 1.0, rng)
    if name == "first_zero":
        x[:, :] += 1e4
        x[:400] = 0
    elif name == "sorted":
        x = np.sort(x + np.float32(1e3), axis=0)
    elif name == "outlier":
        x[1234] = 1e6
    else:
        x[:] = np.float32(0.1)
    assert_accurate(np.moveaxis(x, 1, axis).copy(), np.moveaxis(g, 1, axis).copy(), axis, None)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "axis"), [((200_003, 4), 1), ((4, 200_003), 0), ((64, 3, 56, 56), 1)])
def test_bn_apply_matches_the_float64_oracle_on_many_rows(shape, axis, offset, rng):
    x, g = make(shape, axis, offset, 1.0, rng)
    assert_accurate(x, g, axis, None)
    assert_accurate(x, g, axis, rng.random(shape) < 0.5)


def test_bn_apply_normalizes_where_flax_is_off_by_a_thousand(rng):
    # |mean| / std = 1e4: the input's own rounding moves y by 5e-4, E[x^2] - E[x]^2 by 1e3.
    x = (rng.standard_normal((4096, 8)) + 1e4).astype(np.float32)
    params, state = bnjax.bn_init(8)
    y, _ = bnjax.bn_apply(params, state, x, True)
    _, mean, var = reference.moments(x)
    np.testing.assert_allclose(y, reference.normalize(x, mean, var, np.ones(8), np.zeros(8)), atol=1e-3)


@pytest.mark.parametrize("a", [2.0**-4, 3.0, 1e3])
def test_bn_apply_is_independent_of_the_scale_of_the_weights(a, rng):
    # BN(a W u) = BN(W u), and its gradient in W is 1 / a of the other (section 3.3), up to epsilon.
    u, W = rng.standard_normal((257, 6)).astype(np.float32), rng.standard_normal((6, 4)).astype(np.float32)
    g = rng.standard_normal((257, 4)).astype(np.float32)
    params, state = bnjax.bn_init(4)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(W, u):
        y, _ = bnjax.bn_apply(params, state, jnp.dot(u, W), True, epsilon=1e-12)
        return jnp.sum(y * g), y

    (dW, du), y = gradients(W, u)
    (dW_a, du_a), y_a = gradients(np.float32(a) * W, u)
    chex.assert_trees_all_close(y_a, y, atol=2e-6)
    chex.assert_trees_all_close((a * np.asarray(dW_a), du_a), (dW, du), atol=2e-5)
