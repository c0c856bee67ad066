"""bn_init and bn_apply: the formula, every option, and the defined results for bad data."""

import itertools
from functools import partial

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bnjax
from tests.support import reference
from tests.support.tolerances import CLOSE


def fresh(shape, rng):
    """Parameters and state that are not their initial values."""
    params = bnjax.BNParams(*rng.standard_normal((2, *shape)).astype(np.float32))
    mean, var = rng.standard_normal(shape).astype(np.float32), rng.random(shape).astype(np.float32)
    return params, bnjax.BNState(mean, var, np.zeros(shape, np.int32))


# The formula, in training and in evaluation


@hypothesis.given(st.data())
def test_bn_apply_matches_the_oracle_for_any_shape_axis_and_mask(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5))
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    axis = tuple(a - len(shape) if data.draw(st.booleans()) else a for a in axes)
    mask_shape = tuple(data.draw(st.sampled_from([1, n])) for n in shape)
    kind = data.draw(st.sampled_from(["none", "bool", "weights"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape).astype(np.float32)
    mask = None if kind == "none" else rng.random(mask_shape) < 0.7
    if kind == "weights":
        mask = (mask * rng.random(mask_shape)).astype(np.float32)
    unbiased = data.draw(st.booleans())
    features = tuple(shape[a] for a in sorted(axes))
    params, state = fresh(features, rng)

    y, new = bnjax.bn_apply(params, state, x, True, axis=axis, mask=mask, momentum=0.8, unbiased_var=unbiased)

    weight, mean, var = reference.moments(x, axis, mask)
    reduced = tuple(a for a in range(x.ndim) if a not in axes)
    valid = (reference.weights(x, mask) > 0).sum(reduced)
    used_mean, used_var = np.where(valid > 0, mean, state.mean), np.where(valid > 0, var, state.var)
    want = reference.normalize(x, used_mean, used_var, *params, axis=axis)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=2e-4)
    square = (reference.weights(x, mask) ** 2).sum(reduced)
    with np.errstate(invalid="ignore", divide="ignore"):
        absorbed = var * weight / (weight - square / weight) if unbiased else var
        moved = [0.8 * old + 0.2 * batch for old, batch in ((state.mean, mean), (state.var, absorbed))]
    np.testing.assert_allclose(new.mean, np.where(valid >= 2, moved[0], state.mean), **CLOSE)
    np.testing.assert_allclose(new.var, np.where(valid >= 2, moved[1], state.var), **CLOSE)
    np.testing.assert_array_equal(new.count, valid >= 2)


@pytest.mark.parametrize("axis", [-1, 1, 0, (1, 3), [-1, 0], (0, 1, 2, 3)])
def test_bn_apply_in_evaluation_matches_the_oracle(axis, rng):
    x = rng.standard_normal((3, 4, 5, 6)).astype(np.float32)
    features = tuple(x.shape[a] for a in sorted(a % 4 for a in np.atleast_1d(axis)))
    params, state = fresh(features, rng)
    y, same = bnjax.bn_apply(params, state, x, False, axis=axis, epsilon=1e-3)
    want = reference.normalize(x, state.mean, state.var, *params, axis=axis, epsilon=1e-3)
    np.testing.assert_allclose(y, want, **CLOSE)
    chex.assert_trees_all_equal(same, state)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("with_scale", "with_bias"), itertools.product([True, False], repeat=2))
def test_absent_scale_and_bias_are_one_and_zero(with_scale, with_bias, train, rng):
    x = rng.standard_normal((9, 4)).astype(np.float32)
    params, state = fresh((4,), rng)
    given = bnjax.BNParams(params.scale if with_scale else None, params.bias if with_bias else None)
    full = bnjax.BNParams(
        params.scale if with_scale else np.ones(4, "f"), params.bias if with_bias else np.zeros(4, "f")
    )
    total = jax.value_and_grad(lambda p: loss(bnjax.bn_apply(p, state, x, train)), has_aux=True)
    (y, _), gradient = jax.jit(total)(given)
    want = reference.normalize(x, *(reference.moments(x)[1:] if train else state[:2]), *full)
    np.testing.assert_allclose(y, np.sum(want**2), rtol=1e-4)
    assert (gradient.scale is None, gradient.bias is None) == (not with_scale, not with_bias)


def loss(result):
    y, state = result
    return jnp.sum(y**2), state


@pytest.mark.parametrize("shape", [(6, 1, 3), (6, 5, 3), (1, 5, 1), (6, 1, 1)])
def test_conditional_scale_and_bias_match_the_oracle(shape, rng):
    x = rng.standard_normal((6, 5, 3)).astype(np.float32)
    scale, bias = rng.standard_normal((2, *shape)).astype(np.float32)
    _, state = bnjax.bn_init(3)
    y, _ = bnjax.bn_apply(bnjax.BNParams(scale, bias), state, x, True)
    _, mean, var = reference.moments(x)
    np.testing.assert_allclose(y, scale * (x - mean) / np.sqrt(var + 1e-5) + bias, **CLOSE)


def test_bn_apply_in_evaluation_ignores_mask_and_axis_name(rng):
    x = rng.standard_normal((9, 4)).astype(np.float32)
    params, state = fresh((4,), rng)
    plain, _ = bnjax.bn_apply(params, state, x, False)
    masked, _ = bnjax.bn_apply(params, state, x, False, mask=np.arange(9)[:, None] < 3, axis_name="not mapped")
    np.testing.assert_array_equal(plain, masked)


@pytest.mark.parametrize("train", [True, False])
def test_without_state_the_batch_serves_training_and_evaluation(train, rng):
    x = rng.standard_normal((9, 4)).astype(np.float32)
    params, _ = fresh((4,), rng)
    y, state = bnjax.bn_apply(params, None, x, train)
    assert state is None
    np.testing.assert_allclose(y, reference.normalize(x, *reference.moments(x)[1:], *params), **CLOSE)


def test_bn_init_gives_the_values_asked_for():
    params, state = bnjax.bn_init((2, 3), scale=0.0, bias=np.arange(3), dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(params.scale, jnp.zeros((2, 3), jnp.bfloat16))
    chex.assert_trees_all_equal(params.bias, jnp.asarray([[0, 1, 2]] * 2, jnp.bfloat16))
    chex.assert_trees_all_equal(state, bnjax.BNState(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.zeros((2, 3), jnp.int32)))
    assert bnjax.bn_init(3, scale=None, bias=None)[0] == bnjax.BNParams(None, None)


def test_a_fresh_layer_is_the_identity_in_evaluation(rng):
    x = rng.standard_normal((5, 3)).astype(np.float32)
    y, _ = bnjax.bn_apply(*bnjax.bn_init(3), x, False)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


# Running statistics


def run(momentum, batches, **options):
    params, state = bnjax.bn_init(batches.shape[-1])
    for x in batches:
        _, state = bnjax.bn_apply(params, state, x, True, momentum=momentum, **options)
    return state


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1, np.float32(0.5), jnp.float32(0.5)])
def test_momentum_weighs_the_old_value(momentum, rng):
    batches = (rng.standard_normal((4, 8, 3)) + 3).astype(np.float32)
    state = run(momentum, batches)
    mean, var = np.zeros(3), np.ones(3)
    for x in batches:
        _, mean, var = reference.train(x, np.ones(3), np.zeros(3), mean, var, momentum=float(momentum))
    np.testing.assert_allclose(state.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.var, var, rtol=1e-6)


def test_momentum_zero_keeps_nothing_and_one_everything(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    params, state = fresh((3,), rng)
    state = state._replace(mean=jnp.zeros(3))  # which batch_moments reads around too
    batch = bnjax.batch_moments(x)
    _, new = bnjax.bn_apply(params, state, x, True, momentum=0.0)
    chex.assert_trees_all_equal((new.mean, new.var), (batch.mean, batch.var))
    _, new = bnjax.bn_apply(params, state, x, True, momentum=1.0)
    chex.assert_trees_all_equal((new.mean, new.var), (state.mean, state.var))


def test_momentum_may_be_traced(rng):
    batches = rng.standard_normal((3, 8, 2)).astype(np.float32)
    states = jax.jit(jax.vmap(lambda m: run(m, batches)))(jnp.array([0.1, 0.9]))
    for i, momentum in enumerate((0.1, 0.9)):
        want = run(momentum, batches)
        np.testing.assert_allclose(states.mean[i], want.mean, rtol=1e-5, atol=1e-7)


def test_cumulative_average_is_the_mean_over_all_batches(rng):
    batches = (rng.standard_normal((50, 8, 3)) + 2).astype(np.float32)
    state = run(bnjax.cumulative_average, batches)
    np.testing.assert_allclose(state.mean, batches.astype(np.float64).mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(state.var, batches.astype(np.float64).var(1).mean(0), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.99999, 1.0])
def test_debiased_weighs_batches_by_age_and_forgets_the_initial_value(momentum, rng):
    batches = (rng.standard_normal((20, 8, 3)) + 2).astype(np.float32)
    state = run(bnjax.debiased(momentum), batches)
    weight = float(momentum) ** np.arange(20)[::-1]
    np.testing.assert_allclose(state.mean, np.average(batches.mean(1), axis=0, weights=weight), rtol=1e-5)
    np.testing.assert_allclose(state.var, np.average(batches.var(1), axis=0, weights=weight), rtol=1e-5)


def test_momentum_functions_hash_and_compare_by_value(rng):
    assert bnjax.debiased(0.9) == bnjax.debiased(0.9) != bnjax.debiased(0.8)
    assert hash(bnjax.debiased(0.9)) == hash(bnjax.debiased(0.9))
    from bnjax.core.layer import batch_norm

    batches = jnp.asarray(rng.standard_normal((3, 8, 3)), jnp.float32)
    run(bnjax.debiased(0.9), batches)
    size = batch_norm._cache_size()
    run(bnjax.debiased(0.9), batches)
    assert batch_norm._cache_size() == size


def test_a_schedule_of_the_count_sees_each_features_own(rng):
    x = rng.standard_normal((8, 2)).astype(np.float32)
    _, state = bnjax.bn_init(2)
    state = state._replace(count=jnp.array([0, 3], jnp.int32))
    _, new = bnjax.bn_apply(
        bnjax.BNParams(None, None), state, x, True, momentum=lambda count: count.astype(jnp.float32) / 4
    )
    mean = x.mean(0, dtype=np.float64)
    np.testing.assert_allclose(new.mean, mean * [1, 0.25], rtol=1e-5)
    np.testing.assert_array_equal(new.count, [1, 4])


def test_unbiased_var_matches_numpy_and_leaves_the_output(rng):
    x = rng.standard_normal((7, 3)).astype(np.float32)
    params, state = bnjax.bn_init(3)
    y, biased = bnjax.bn_apply(params, state, x, True, momentum=0.0)
    same, unbiased = bnjax.bn_apply(params, state, x, True, momentum=0.0, unbiased_var=True)
    np.testing.assert_array_equal(y, same)
    np.testing.assert_allclose(biased.var, x.var(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(unbiased.var, x.var(0, ddof=1, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.7])
def test_running_statistics_of_a_constant_batch_are_its_own(momentum):
    # Rounded weights of old and new that do not add up to 1 would move the fixed point by 1e-6.
    x = np.array([[1.0], [3.0]], np.float32)
    state = bnjax.BNState(jnp.array([2.0]), jnp.array([1.0]), jnp.array([0], jnp.int32))

    def step(state, _):
        return bnjax.bn_apply(bnjax.BNParams(None, None), state, x, True, momentum=momentum)[1], None

    state, _ = jax.lax.scan(step, state, length=3000)
    np.testing.assert_array_equal((state.mean, state.var), ([2.0], [1.0]))


# Masks


def test_integer_and_boolean_masks_agree_with_weights_and_rows(rng):
    x = rng.standard_normal((6, 3)).astype(np.float32)
    params, state = fresh((3,), rng)
    counts = np.array([[2], [0], [1], [3], [1], [0]])
    y, new = bnjax.bn_apply(params, state, x, True, mask=counts)
    rows, want = bnjax.bn_apply(params, state, np.repeat(x, counts[:, 0], 0), True)
    chex.assert_trees_all_close((y[counts[:, 0] > 0], new), (rows[np.array([0, 2, 3, 6])], want), rtol=1e-5, atol=1e-6)
    negative = np.where(counts == 0, -1.0, counts).astype(np.float32)
    with pytest.raises(ValueError, match=r"bn_apply\(mask=...\): expected booleans or weights of 0 or more, got -1.0"):
        bnjax.bn_apply(params, state, x, True, mask=negative)
    unknown = jax.jit(lambda mask: bnjax.bn_apply(params, state, x, True, mask=mask))(negative)
    chex.assert_trees_all_close(unknown, (y, new), rtol=1e-6)


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def masked_total(params, x, state, g, mask):
    y, new = bnjax.bn_apply(params, state, x, True, mask=mask)
    return jnp.sum(jnp.where(g == 0, 0, y) * g) + jnp.sum(new.mean + new.var**2), (y, new)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("real", [False, True])
def test_masked_places_change_nothing_elsewhere(poison, real, rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    g = rng.standard_normal((8, 3)).astype(np.float32)
    keep = np.arange(8) < 5
    mask = keep[:, None].astype(np.float32) * np.float32(0.5) if real else keep[:, None]
    x[~keep] = poison
    params, state = fresh((3,), rng)

    got = masked_total(params, x, state, np.where(keep[:, None], g, 0), mask)
    want = masked_total(params, x[keep], state, g[keep], mask[keep])
    (_, (y, new)), (dparams, dx) = got
    (_, (want_y, want_new)), (want_dparams, want_dx) = want
    chex.assert_trees_all_close((y[keep], new, dparams, dx[keep]), (want_y, want_new, want_dparams, want_dx), **CLOSE)
    np.testing.assert_array_equal(dx[~keep], 0)


def test_masked_nan_leaves_the_gradients_of_evaluation(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    keep = np.arange(8)[:, None] < 5
    params, state = fresh((3,), rng)

    def total(params, x, mask):
        return jnp.sum(jnp.where(mask, bnjax.bn_apply(params, state, x, False, mask=mask)[0], 0))

    gradient = jax.jit(jax.grad(total))
    got = gradient(params, np.where(keep, x, np.float32(np.nan)), keep)
    chex.assert_trees_all_close(got, gradient(params, x[:5], keep[:5]), rtol=1e-6)


def test_the_mask_is_not_differentiated(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    params, state = fresh((3,), rng)
    total = jax.jit(jax.grad(lambda m: jnp.sum(bnjax.bn_apply(params, state, x, True, mask=m)[0] ** 2)))
    gradient = total(np.ones((8, 1), np.float32))
    np.testing.assert_array_equal(gradient, 0)


# Too little data, bad data


def test_one_valid_value_becomes_bias_and_leaves_the_state(rng):
    params, state = fresh((3,), rng)
    x = rng.standard_normal((1, 3)).astype(np.float32) * 1e4
    y, new = bnjax.bn_apply(params, state, x, True, unbiased_var=True)
    np.testing.assert_array_equal(y[0], params.bias)
    chex.assert_trees_all_equal(new, state)
    weight = np.array([[0.0], [0.3], [0.0]], np.float32)
    y, new = bnjax.bn_apply(params, state, np.repeat(x, 3, 0), True, mask=weight)
    np.testing.assert_array_equal(y[1], params.bias)
    chex.assert_trees_all_equal(new, state)
    gradient = jax.grad(lambda x: jnp.sum(bnjax.bn_apply(params, state, x, True, unbiased_var=True)[0]))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_nothing_valid_normalizes_by_the_running_statistics(rng):
    params, state = fresh((3,), rng)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    mask = np.array([[True, False, True]] * 4)
    y, new = bnjax.bn_apply(params, state, x, True, mask=mask)
    evaluated, _ = bnjax.bn_apply(params, state, x, False)
    trained, moved = bnjax.bn_apply(params, state, x, True)
    np.testing.assert_allclose(y, np.where(mask, trained, evaluated), rtol=1e-6)
    chex.assert_trees_all_close(new, jax.tree.map(lambda a, b: jnp.where(mask[0], a, b), moved, state), rtol=1e-6)
    nothing, _ = bnjax.bn_apply(params, None, x, True, mask=np.zeros((4, 1), bool))
    np.testing.assert_allclose(nothing, reference.normalize(x, np.zeros(3), np.ones(3), *params), **CLOSE)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (0, 0, 3)])
def test_an_empty_batch_is_legal(shape, rng):
    params, state = fresh((3,), rng)

    def total(x):
        y, new = bnjax.bn_apply(params, state, x, True)
        return jnp.sum(y), (y, new)

    dx, (y, new) = jax.grad(total, has_aux=True)(np.zeros(shape, np.float32))
    assert y.shape == dx.shape == shape
    chex.assert_trees_all_equal(new, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("unbiased", [False, True])
def test_a_value_that_is_not_finite_keeps_back_its_feature_alone(bad, unbiased, rng):
    params, state = fresh((3,), rng)
    x = (100 + rng.standard_normal((6, 3))).astype(np.float32)  # beyond the guard, as with the bad value
    want_y, want = bnjax.bn_apply(params, state, x, True, unbiased_var=unbiased)
    x[2, 1] = bad
    y, new = bnjax.bn_apply(params, state, x, True, unbiased_var=unbiased)
    assert np.isnan(y[:, 1]).all()
    good = np.array([True, False, True])
    np.testing.assert_allclose(y[:, good], want_y[:, good], rtol=1e-6)
    for leaf, moved, old in zip(new, want, state, strict=True):
        np.testing.assert_array_equal(leaf, np.where(good, moved, old))
