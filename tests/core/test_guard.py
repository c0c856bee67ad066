"""Moments in one read around the running mean: as exact as in two, for every running mean.

One CPU device has its own lowering. Arrays on several devices take the lowering of TPUs and GPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.core import reading
from tests.support import reference
from tests.support.collecting import apply_and_collect
from tests.support.tolerances import EPS, FACTOR

pytestmark = pytest.mark.optimized

ROWS, FEATURES = 4096, 5
PARAMS, FRESH = bnjax.bn_init(FEATURES, scale=2.0, bias=0.5)
# How far the running mean is from the batch's, in standard deviations: inside the guard, at its edge of sqrt(8), and
# far outside of it; and what no mean can be.
OFFSETS = [0.0, 1.0, 2.7, 3.0, 30.0, 1e4, 1e12, np.inf, np.nan]


@jax.jit
def step(x, state, mask=None):
    return bnjax.bn_apply(PARAMS, state, x, True, momentum=0.0, mask=mask)


@jax.jit
def collect(x, mask, state):  # what a state absorbs that is not itself NaN
    return apply_and_collect(PARAMS, state, x, mask=mask)[2].moments


@jax.jit
def both(params, x, state, g):
    y, pullback, new = jax.vjp(lambda p, x: bnjax.bn_apply(p, state, x, True), params, x, has_aux=True)
    return y, pullback(g), new


@pytest.fixture
def everywhere():
    """A sharding that puts the rows of an array on eight devices."""
    return NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), P("data"))


def batch(mean, std, rng, dtype=np.float32):
    return (mean + std * rng.standard_normal((ROWS, FEATURES))).astype(dtype)


def state_at(mean):
    return FRESH._replace(mean=np.full(FEATURES, mean, np.float32))


def assert_exact(x, mean, var, mask=None, axis=-1):
    """The mean and the variance equal those in float64, within the bound of `test_accuracy`."""
    axes = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    _, want_mean, want_var = reference.moments(x, axis, mask)
    std = np.sqrt(want_var) + EPS * np.abs(want_mean) + np.finfo(np.float32).tiny
    largest = np.where(reference.weights(x, mask) > 0, np.abs(x - np.expand_dims(want_mean, axes)), 0).max(axes)
    bound = FACTOR * EPS * (1 + largest / std + np.abs(want_mean) / std)
    assert (np.abs(np.asarray(mean, float) - want_mean) <= bound * std).all()
    assert (np.abs(np.asarray(var, float) - want_var) <= bound * std**2).all()


@pytest.mark.parametrize("masked", [None, "bool", "weights"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("offset", OFFSETS)
def test_moments_are_exact_wherever_the_running_mean_is(offset, mean, masked, everywhere, rng):
    x = batch(mean, 1.0, rng)
    mask = None if masked is None else rng.random((ROWS, 1)) < 0.6
    mask = mask if masked != "weights" else (mask * rng.random((ROWS, 1))).astype(np.float32)
    found = collect(jax.device_put(x, everywhere), mask, state_at(mean + offset))
    assert_exact(x, found.mean, found.var, mask)


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_output_and_its_gradients_are_exact_wherever_the_running_mean_is(offset, everywhere, rng):
    x, g = batch(3.0, 1.0, rng), batch(0.0, 1.0, rng)
    scale, bias = np.asarray(PARAMS.scale, float), np.asarray(PARAMS.bias, float)
    y, (dparams, dx), _ = both(
        PARAMS, jax.device_put(x, everywhere), state_at(3.0 + offset), jax.device_put(g, everywhere)
    )
    _, mean, var = reference.moments(x)
    np.testing.assert_allclose(y, reference.normalize(x, mean, var, scale, bias), atol=2e-5)
    want_dx, want_dscale, want_dbias = reference.gradients(x, g, scale)
    np.testing.assert_allclose(dx, want_dx, atol=2e-5)
    np.testing.assert_allclose(dparams.scale, want_dscale, atol=2e-3)
    np.testing.assert_allclose(dparams.bias, want_dbias, atol=2e-3)


def test_only_features_outside_the_guard_make_the_others_wait(everywhere, rng):
    # One feature of five jumps: all are exact, and the next steps find the running mean near again.
    x = batch(0.0, 1.0, rng)
    x[:, 2] += 1e4
    state = FRESH
    for _ in range(2):
        _, state = step(jax.device_put(x, everywhere), state)
        assert_exact(x, state.mean, state.var)


@pytest.mark.parametrize("running", [0.0, 1e4, 1e4 + 1 / 1024, 1e4 * (1 + 50 * EPS), -1e4])
def test_a_constant_feature_has_no_variance(running, everywhere):
    x = np.full((ROWS, FEATURES), 1e4, np.float32)
    y, new = step(jax.device_put(x, everywhere), state_at(running))
    np.testing.assert_array_equal(new.mean, 1e4)
    assert (new.var <= (EPS * 1e4) ** 2).all()  # what rounding the mean does to it
    np.testing.assert_allclose(y, 0.5, atol=1e-6)


@pytest.mark.parametrize("running", [0.0, 3.0, 1e4, np.nan])
def test_one_valid_value_becomes_the_bias(running, everywhere, rng):
    x, mask = batch(1e4, 1.0, rng), np.arange(ROWS)[:, None] == 7
    y, _ = step(jax.device_put(x, everywhere), state_at(running), mask)
    np.testing.assert_array_equal(y[7], PARAMS.bias)


def test_squares_that_overflow_around_the_shift_are_taken_around_the_mean(everywhere, rng):
    x = batch(1e20, 1e15, rng)
    _, new = step(jax.device_put(x, everywhere), FRESH)
    assert_exact(x, new.mean, new.var)


def test_a_value_that_is_not_finite_shows_in_its_feature_alone(everywhere, rng):
    x = batch(0.0, 1.0, rng)
    x[5, 1], x[9, 3] = np.nan, np.inf
    y, new = step(jax.device_put(x, everywhere), FRESH)
    np.testing.assert_array_equal(np.isnan(y).all(0), [False, True, False, True, False])
    np.testing.assert_array_equal(new.count, [1, 0, 1, 0, 1])
    assert_exact(x[:, ::2], new.mean[::2], new.var[::2])


def test_complex_moments_are_exact_wherever_the_running_mean_is(everywhere, rng):
    x = (batch(0.0, 1.0, rng) + 1j * batch(0.0, 2.0, rng) + 40 - 30j).astype(np.complex64)
    params, state = bnjax.bn_init(FEATURES, dtype=jnp.complex64)
    step = jax.jit(lambda x, s: bnjax.bn_apply(params, s, x, True, momentum=0.0))
    for running in 0, 40 - 30j, 1e4j:
        _, new = step(jax.device_put(x, everywhere), state._replace(mean=np.full(FEATURES, running, np.complex64)))
        _, mean, var = reference.moments(x)
        np.testing.assert_allclose(new.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(new.var, var, rtol=5e-6)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_groups_are_exact_without_a_guard(size, everywhere, rng):
    x = batch(1e3, 1.0, rng)
    y, new = jax.jit(lambda x: bnjax.ghost_bn_apply(PARAMS, FRESH, x, True, ghost_size=size, momentum=0.0))(
        jax.device_put(x, everywhere)
    )
    assert_exact(x, new.mean, new.var)
    whole = ROWS // size * size
    groups = x[:whole].astype(float).reshape(-1, size, FEATURES)
    want = 2 * (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5) + 0.5
    # Rounding the mean of a group to float32 moves what is divided by a standard deviation that may be near 0.
    error = np.abs(np.asarray(y[:whole]).reshape(groups.shape) - want) * np.sqrt(groups.var(1, keepdims=True) + 1e-5)
    assert error.max() <= 2 * FACTOR * EPS * 1e3


def some(kind, shape, rng):
    """A mask of one kind for an array of this shape; the first eighth of its examples has no valid element."""
    if kind is None:
        return None
    each = {
        "examples": (1,) * (len(shape) - 1),
        "elements": (*shape[1:-1], 1),
        "features": (*(1,) * len(shape[2:]), shape[-1]),
    }
    mask = rng.random((shape[0], *each.get(kind, each["elements"]))) < 0.7
    mask[: shape[0] // 8] = False
    mask[-1] = True
    return mask if kind != "weights" else (mask * rng.random(mask.shape) * 1e-30).astype(np.float32)


MASKS = [None, "examples", "elements", "weights", "features"]


@pytest.mark.lowerings
@pytest.mark.parametrize("mask", MASKS)
def test_gpus_have_no_conditional_and_tpus_have_the_guard(mask, everywhere, rng):
    # The host of a GPU waits for the predicate of a conditional. Lowering for a GPU needs none.
    for where in None, everywhere:
        x = jax.device_put(np.zeros((ROWS, FEATURES), "f"), where)
        traced = step.trace(x, FRESH, some(mask, x.shape, rng))
        gpu, tpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu"))
        assert "stablehlo.case" not in gpu
        assert tpu.count("stablehlo.case") == 1


@pytest.mark.lowerings
def test_each_gpu_of_a_shard_map_has_no_conditional(everywhere):
    apply = functools.partial(bnjax.bn_apply, PARAMS, FRESH, train=True, axis_name="data")
    mapped = jax.shard_map(apply, mesh=everywhere.mesh, in_specs=P("data"), out_specs=(P("data"), P()))
    lowered = jax.jit(mapped).trace(np.zeros((ROWS, FEATURES), "f")).lower(lowering_platforms=("cuda",))
    # A choice by platform, of how the devices' moments are merged, leaves two cases of a constant, which XLA removes.
    assert lowered.as_text().count("stablehlo.case") == 2


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments_around_a_part_are_exact_where_the_part_is_as_far_off_as_can_be(mean, rng):
    # A sixteenth at sqrt(15) standard deviations, and the rest at as many as make up for it.
    x = np.where(np.arange(ROWS)[:, None] < ROWS // 16, 15**0.5, -(15**-0.5)) + mean + np.zeros(FEATURES)
    x = (x + 1e-3 * rng.standard_normal(x.shape)).astype(np.float32)
    _, found, var = jax.jit(reading.part_look, static_argnames="axes")(x, np.zeros((1, FEATURES), "f"), axes=(0,))
    assert_exact(x, found, var)


LOOKS = {
    "part": reading.part_look,
    "part, jointly": functools.partial(reading.part_look, jointly=1),
    "groups": functools.partial(reading.group_look, devices=8),
    "groups, jointly": functools.partial(reading.group_look, devices=8, on_gpus=True),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("left", ["first", "last", "between", "every sixteenth", "one", "none"])
def test_moments_around_a_part_are_exact_whatever_a_mask_leaves(look, mean, left, rng):
    # 4,097 rows in groups of one, and 4,096 in groups of 512, whose sixteenths have 257 and 32 rows. What is masked is
    # far away, or no number at all.
    rows = ROWS + (not look.startswith("groups"))
    here = np.arange(rows)
    mask = {
        "first": here < 3,
        "last": here >= rows - 3,
        "between": (here > 1000) & (here < 1030),
        "every sixteenth": here % 16 == 5,
        "one": here == 777,
        "none": here < 0,
    }[left][:, None]
    x = mean + rng.standard_normal((rows, FEATURES))
    x = np.where(mask, x, np.where(here[:, None] % 2, 1e8, np.nan)).astype(np.float32)
    look = jax.jit(LOOKS[look], static_argnames="axes")
    for weights in mask, np.where(mask, 1e-20 * (1 + here[:, None] % 7), 0).astype(np.float32):
        total, found, var = look(x, np.zeros((1, FEATURES), "f"), weights, axes=(0,))
        np.testing.assert_allclose(total, np.broadcast_to(weights.sum(dtype=float), total.shape), rtol=1e-5)
        assert_exact(np.where(mask, x, 0), found, var, weights)


@pytest.mark.lowerings
def test_models_under_vmap_share_one_conditional(everywhere, rng):
    # As a select both branches would run, three reads for one.
    x = jnp.asarray(np.stack([batch(0.0, 1.0, rng), batch(1e4, 1.0, rng)]))
    states = jax.tree.map(lambda *v: jnp.stack(v), FRESH, state_at(7.0))
    for axes in (None, 0), (0, None), (0, 0):
        args = (states if axes[0] == 0 else FRESH), (x if axes[1] == 0 else x[1])
        f = jax.jit(jax.vmap(lambda s, x: bnjax.bn_apply(PARAMS, s, x, True, momentum=0.0)[1], axes))
        sharding = NamedSharding(everywhere.mesh, P(None, "data") if axes[1] == 0 else P("data"))
        args = args[0], jax.device_put(args[1], sharding)
        tpu = f.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        assert tpu.count("stablehlo.case") == 1
        new = f(*args)
        for i in range(2):
            assert_exact(np.asarray(args[1][i] if axes[1] == 0 else args[1]), new.mean[i], new.var[i])


def test_the_guess_of_the_mean_changes_neither_moments_nor_derivatives(rng):
    x = batch(1.0, 1.0, rng)[:64]

    def f(guess, x):
        y, new = bnjax.bn_apply(PARAMS, state_at(0.0)._replace(mean=guess), x, True, momentum=0.9)
        return jnp.sum(y**3), new

    gradient = jax.jit(jax.grad(lambda guess, x: f(guess, x)[0]))
    np.testing.assert_array_equal(gradient(jnp.ones(FEATURES), x), 0)
    kept = jax.jit(jax.jacobian(lambda guess, x: f(guess, x)[1].mean))(jnp.ones(FEATURES), x)
    np.testing.assert_allclose(kept, 0.9 * np.eye(FEATURES), rtol=1e-6)


def test_the_guard_is_what_its_comment_says(rng):
    # eps (1 + NEAR) is inside the bound of test_accuracy, which is 16 eps at the least.
    assert 1 + reading.NEAR < 2 * FACTOR
    x = np.concatenate([batch(0.0, 1.0, rng)] * 48)  # about 200,000 rows
    worst = np.sqrt(reading.NEAR) * 0.99
    guarded = jax.jit(reading.guarded_look, static_argnames="axes")
    _, mean, var = guarded(x, np.full((1, FEATURES), worst, "f"), axes=(0,))
    assert_exact(x, mean, var)


# Images with rows to slice and without, and examples of numbers; the last batch does not divide.
GROUPED = [(96, 6), (48, 8, 3, 6), (40, 2, 2, 6), (8, 6), (12, 6)]


@pytest.mark.lowerings
@pytest.mark.parametrize("shape", GROUPED)
@pytest.mark.parametrize(("far", "kind"), [(0.0, None), (1e4, None), *((1e4, kind) for kind in MASKS[1:])])
def test_devices_have_exact_moments_however_x_is_divided(shape, far, kind, rng):
    # Each example has a mean of its own, and the first device's jump; the running mean is far from all of them.
    x = far + rng.standard_normal(shape) + 10 * rng.standard_normal((shape[0], *(1,) * (len(shape) - 1)))
    x[: shape[0] // 8] += 1e3
    x = x.astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inner = (None,) * (len(shape) - 2)
    specs = [P(), P("a"), P("a", *inner, "b"), P(None, *inner, "b")]
    specs += [P(("a", "b"))] * (shape[0] % 8 == 0) + [P(None, "a"), P("b", "a")] * (shape[1] == 8)
    params, state = bnjax.bn_init(6)
    mask = some(kind, shape, rng)
    statistics = jax.jit(lambda x: bnjax.bn_apply(params, state, x, True, momentum=0.0, mask=mask)[1])
    whole = None if mask is None else np.broadcast_to(mask, shape).reshape(-1, 6)
    for spec in specs:
        mean, var, _ = statistics(jax.device_put(x, NamedSharding(mesh, spec)))
        assert_exact(x.reshape(-1, 6), mean, var, whole)


@pytest.mark.lowerings
@pytest.mark.parametrize("shape", [(64, 16, 16, 6), (60, 8, 8, 6), (7, 8, 8, 8, 6)])
def test_devices_add_up_images_of_few_values_with_few_roundings(shape, everywhere, rng):
    # All squares are equal. XLA on CPU takes a sum of complex numbers one by one, whose roundings are then alike.
    x = np.where(rng.random(shape) < 0.5, 0.1, -0.1).astype(np.float32)
    spec = everywhere.spec if shape[0] % 8 == 0 else P()
    moments = jax.jit(bnjax.batch_moments)(jax.device_put(x, NamedSharding(everywhere.mesh, spec)))
    assert_exact(x, moments.mean, moments.var)


@pytest.mark.parametrize("size", [1e-35, 1.0, 1e37])
def test_devices_with_weights_near_the_ends_of_the_range_have_exact_moments(size, everywhere, rng):
    # Their sum overflows. The weights of one device may also be far from those of another.
    x = batch(3.0, 1.0, rng)
    weights = (size * (0.5 + rng.random((ROWS, 1)))).astype(np.float32)
    for mask in weights, np.where(np.arange(ROWS)[:, None] < ROWS // 8, weights, weights * np.float32(0.1)):
        moments = jax.jit(lambda x, mask: bnjax.batch_moments(x, mask=mask))(jax.device_put(x, everywhere), mask)
        assert_exact(x, moments.mean, moments.var, mask)
