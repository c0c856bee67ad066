"""Half and double precision, complex data: what is computed in which dtype, and what comes out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import reference
from tests.support.tolerances import CLOSE

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_reduces_in_float32(dtype, rng):
    # 4096 values near 100: their sum overflows float16, and bfloat16 cannot count to it.
    x = jnp.asarray(rng.standard_normal((4096, 3)) + 100, dtype)
    params, state = bnjax.bn_init(3, dtype=dtype)
    assert [p.dtype for p in params] == [dtype] * 2
    assert [s.dtype for s in state] == [jnp.float32, jnp.float32, jnp.int32]
    y, new = bnjax.bn_apply(params, state, x, True, momentum=0.0)
    assert y.dtype == dtype
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(new.mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(new.var, wide.var(0), rtol=1e-5)
    want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=4 * float(jnp.finfo(dtype).eps))
    gradient = jax.grad(lambda x: jnp.sum(bnjax.bn_apply(params, state, x, True)[0].astype(jnp.float32) ** 3))(x)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(("dtype", "spread", "common"), [(jnp.bfloat16, 1.0, 100.0), (jnp.float16, 1e-2, 512.0)])
def test_half_precision_gradients_round_once(dtype, spread, common, rng):
    # dx is the difference of two parts: the cotangent's mean, here large, leaves it before anything is rounded.
    x = jnp.asarray(spread * rng.standard_normal((256, 3)), dtype)
    g = jnp.asarray(common + rng.standard_normal((256, 3)), dtype)
    params, state = bnjax.bn_init(3)
    _, transpose = jax.vjp(lambda x: bnjax.bn_apply(params, state, x, True)[0], x)
    want, _, _ = reference.gradients(x.astype(jnp.float32), g.astype(jnp.float32), np.ones(3))
    got = np.asarray(transpose(g)[0], np.float64)
    np.testing.assert_allclose(got, want, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-3 * np.abs(want).max())


def test_float64_stays_float64_and_state_keeps_its_dtype(rng):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((50, 3)) + 1e6)
        params, state = bnjax.bn_init(3, dtype=jnp.float64)
        y, new = bnjax.bn_apply(params, state, x, True)
        want, mean, var = reference.train(x, np.ones(3), np.zeros(3), np.zeros(3), np.ones(3))
        np.testing.assert_allclose(y, want, atol=1e-8)
        np.testing.assert_allclose(new.mean, mean, rtol=1e-14)
        np.testing.assert_allclose(new.var, var, rtol=1e-9)
        single = jax.tree.map(lambda s: s.astype(jnp.float32) if s.dtype == jnp.float64 else s, state)
        y, new = bnjax.bn_apply(params, single, x, True)
        assert (y.dtype, new.mean.dtype, new.var.dtype) == (jnp.float64, jnp.float32, jnp.float32)


def test_a_float64_state_keeps_its_digits_under_float32_data(rng):
    with jax.enable_x64(True):
        state = bnjax.BNState(jnp.array([1 + 1e-12]), jnp.array([1.0]), jnp.array([0], jnp.int32))
        x = jnp.asarray(rng.standard_normal((5, 1)), jnp.float32)
        y, new = bnjax.bn_apply(bnjax.BNParams(None, None), state, x, True, momentum=1.0)
        assert y.dtype == jnp.float32
        assert new.mean[0] == 1 + 1e-12


def test_complex_data_match_the_oracle(rng):
    x = (rng.standard_normal((20, 3)) + 1j * rng.standard_normal((20, 3)) + 2 - 1j).astype(np.complex64)
    params, state = bnjax.bn_init(3, scale=2 - 1j, bias=1j, dtype=jnp.complex64)
    assert [s.dtype for s in state] == [jnp.complex64, jnp.float32, jnp.int32]
    y, new = bnjax.bn_apply(params, state, x, True, momentum=0.9)
    want, mean, var = reference.train(x, np.full(3, 2 - 1j), np.full(3, 1j), np.zeros(3), np.ones(3), momentum=0.9)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(new.var, var, rtol=1e-5)
    assert new.var.dtype == jnp.float32
    y, _ = bnjax.bn_apply(params, new, x, False)
    np.testing.assert_allclose(y, (2 - 1j) * (x - mean) / np.sqrt(var + 1e-5) + 1j, **CLOSE)


def test_complex_data_synchronize_and_keep_a_complex_variance_state(rng):
    x = (rng.standard_normal((4, 5, 3)) + 1j * rng.standard_normal((4, 5, 3))).astype(np.complex64)
    params, state = bnjax.bn_init(3, dtype=jnp.complex64)
    state = state._replace(var=state.var.astype(jnp.complex64))
    y, new = jax.vmap(lambda x: bnjax.bn_apply(params, state, x, True, axis_name="i"), axis_name="i")(x)
    want_y, want = bnjax.bn_apply(params, state, x.reshape(20, 3), True)
    chex.assert_trees_all_close((y.reshape(20, 3), new.mean[1], new.var[1]), (want_y, *want[:2]), rtol=1e-5, atol=1e-6)
    assert new.var.dtype == jnp.complex64
