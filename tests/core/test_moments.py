"""batch_moments and merge."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import bnjax
from tests.support import reference

pytestmark = pytest.mark.optimized


def moments_of(rows, rng, offset=0.0):
    return bnjax.batch_moments((rng.standard_normal((rows, 3)) + offset).astype(np.float32))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("axis", [-1, 0, (0, 2)])
@pytest.mark.parametrize("kind", ["none", "bool", "weights"])
def test_batch_moments_match_the_oracle(kind, axis, offset, rng):
    x = (rng.standard_normal((5, 6, 4)) + offset).astype(np.float32)
    mask = {"none": None, "bool": rng.random((5, 6, 1)) < 0.6, "weights": rng.random((5, 6, 1)).astype(np.float32)}[
        kind
    ]
    got = bnjax.batch_moments(x, axis=axis, mask=mask)
    weight, mean, var = reference.moments(x, axis, mask)
    np.testing.assert_allclose(got.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.var, var, rtol=1e-5 + 1e-7 * offset)
    chex.assert_equal_shape(got)


@hypothesis.given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.sampled_from([0.0, 1e3]), st.integers(0, 99))
def test_merge_equals_one_batch(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((sum(sizes), 3)) + offset).astype(np.float32)
    got = bnjax.merge_moments(*(bnjax.batch_moments(part) for part in np.split(x, np.cumsum(sizes)[:-1])))
    weight, mean, var = reference.moments(x)
    np.testing.assert_array_equal(got.weight, weight)
    np.testing.assert_allclose(got.mean, mean, rtol=2e-6, atol=1e-6)
    # The parts' means carry the rounding of the data, |mean| eps, and the variance around them that times std.
    np.testing.assert_allclose(got.var, var, rtol=1e-5, atol=1e-6 * (1 + offset))


def test_merge_is_associative_and_commutative(rng):
    a, b, c = (moments_of(rows, rng, rows) for rows in (3, 8, 21))
    left = bnjax.merge_moments(bnjax.merge_moments(a, b), c)
    chex.assert_trees_all_close(left, bnjax.merge_moments(a, bnjax.merge_moments(b, c)), rtol=1e-6)
    chex.assert_trees_all_close(left, bnjax.merge_moments(c, b, a), rtol=1e-6)


def test_merge_with_nothing_changes_nothing(rng):
    a, nothing = moments_of(7, rng), bnjax.batch_moments(jnp.zeros((0, 3)))
    chex.assert_trees_all_equal(nothing, bnjax.Moments(*(jnp.zeros(3),) * 3))
    chex.assert_trees_all_close(bnjax.merge_moments(nothing, a), a, rtol=1e-6)
    chex.assert_trees_all_close(bnjax.merge_moments(a), a, rtol=1e-6)


def test_merge_compiles_and_differentiates(rng):
    x, y = rng.standard_normal((2, 6, 3)).astype(np.float32)

    def merged(x, y):
        m = bnjax.merge_moments(bnjax.batch_moments(x), bnjax.batch_moments(y))
        return jnp.sum(m.mean**2 * m.var)

    def whole(x, y):
        m = bnjax.batch_moments(jnp.concatenate([x, y]))
        return jnp.sum(m.mean**2 * m.var)

    got, want = (jax.jit(jax.grad(f, (0, 1)))(x, y) for f in (merged, whole))
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_merge_rejects_other_shapes_and_nothing(rng):
    with pytest.raises(ValueError, match=r"merge_moments\(\.\.\.\): expected one or more moments of one shape, got 2"):
        bnjax.merge_moments(moments_of(3, rng), bnjax.batch_moments(jnp.zeros((2, 4))))
    with pytest.raises(ValueError, match=r"got 0 with shapes \[\]"):
        bnjax.merge_moments()


@pytest.mark.parametrize("weights", [False, True])
def test_synchronized_moments_equal_one_batch_with_unequal_counts(weights, rng):
    x = (rng.standard_normal((4, 5, 3)) + 10).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [0], [1], [3]])
    mask = (mask * rng.random((4, 5)) if weights else mask)[..., None].astype(np.float32 if weights else bool)
    got = jax.vmap(lambda x, m: bnjax.batch_moments(x, mask=m, axis_name="i"), axis_name="i")(x, mask)
    want = reference.moments(x.reshape(20, 3), mask=mask.reshape(20, 1))
    for leaf, value in zip(got, want, strict=True):
        np.testing.assert_allclose(leaf, np.broadcast_to(value, (4, 3)), rtol=1e-5)


def test_moments_count_beyond_the_integers_of_float32():
    # 2^24 + 1 ones: added one by one in float32 they stop at 2^24.
    rows = 2**24 + 1000
    got = bnjax.batch_moments(jnp.ones((rows, 1)), mask=jnp.ones((rows, 1), bool))
    np.testing.assert_allclose(got.weight, rows, rtol=1e-7)
    np.testing.assert_allclose(got.mean, 1, rtol=1e-6)
