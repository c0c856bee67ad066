"""Ghost, renormalized and indexed batch normalization against oracles written from their papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import reference

EPSILON = 1e-3
OPTIONS = {"momentum": 0.8, "epsilon": EPSILON}


def variables(shape, rng, dtype=np.float32):
    params = bnjax.BNParams(*(rng.normal(1, 0.5, shape).astype(dtype) for _ in range(2)))
    state = bnjax.BNState(
        rng.normal(size=shape).astype(dtype), rng.random(shape).astype(dtype) + 0.5, np.zeros(shape, np.int32)
    )
    return params, state


def assert_close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def ghost_oracle(params, state, x, size, axis, mask=None):
    """Each group separately, the whole batch for the running statistics, in float64."""
    features = {a % x.ndim for a in np.atleast_1d(axis)}
    batch_axis = min(a for a in range(x.ndim) if a not in features)
    mask = reference.weights(x, mask)
    cuts = range(size, x.shape[batch_axis], size)
    parts = (np.split(v, cuts, batch_axis) for v in (x, mask))
    y = [reference.train(part, *params, *state[:2], axis, 0.8, EPSILON, m)[0] for part, m in zip(*parts, strict=True)]
    _, mean, var = reference.train(x, *params, *state[:2], axis, 0.8, EPSILON, mask)
    return np.concatenate(y, batch_axis), mean, var


GHOSTS = {
    "even": ((12, 5), -1, 4),
    "a smaller last group": ((11, 5), -1, 4),
    "groups of one fewer": ((7, 3, 5), -1, 6),
    "channels first": ((9, 4, 3, 2), 1, 2),
    "features before the batch": ((3, 10, 4), 0, 4),
    "two feature axes": ((8, 3, 2, 4), (1, 3), 3),
}


@pytest.mark.parametrize("masked", ["no", "bool", "weights"])
@pytest.mark.parametrize("name", GHOSTS)
def test_ghost_bn_apply_matches_the_oracle(name, masked, rng):
    shape, axis, size = GHOSTS[name]
    x = rng.normal(2, 3, shape).astype(np.float32)
    params, state = variables([shape[a] for a in sorted(np.atleast_1d(axis) % len(shape))], rng)
    mask = {"no": None, "bool": rng.random(shape) < 0.8, "weights": rng.random(shape).astype(np.float32)}[masked]
    y, new = bnjax.ghost_bn_apply(params, state, x, True, ghost_size=size, axis=axis, mask=mask, **OPTIONS)
    expected, mean, var = ghost_oracle(params, state, x, size, axis, mask)
    one = 1 if name == "a smaller last group" or masked != "no" else 0  # groups of a value or two magnify rounding
    assert_close(y, expected, 2e-5 if not one else 2e-4)
    assert_close(new.mean, mean)
    assert_close(new.var, var)
    np.testing.assert_array_equal(new.count, 1)
    evaluated, kept = bnjax.ghost_bn_apply(params, state, x, False, ghost_size=size, axis=axis, mask=mask, **OPTIONS)
    assert_close(evaluated, bnjax.bn_apply(params, state, x, False, axis=axis, **OPTIONS)[0], 0)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


@pytest.mark.parametrize("size", [12, 13, 1000])
def test_a_ghost_of_the_whole_batch_is_bn_apply(size, rng):
    x = rng.normal(2, 3, (12, 5)).astype(np.float32)
    params, state = variables((5,), rng)
    ghost = bnjax.ghost_bn_apply(params, state, x, True, ghost_size=size, **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, ghost, bnjax.bn_apply(params, state, x, True, **OPTIONS))


def test_ghosts_take_conditional_parameters_no_parameters_and_no_state(rng):
    x = rng.normal(2, 3, (10, 3, 4)).astype(np.float32)
    scale = rng.normal(size=(10, 1, 4)).astype(np.float32)
    y, state = bnjax.ghost_bn_apply(bnjax.BNParams(scale, None), None, x, True, ghost_size=4, epsilon=EPSILON)
    assert state is None
    parts = [reference.train(part, np.ones(4), np.zeros(4), 0, 1, epsilon=EPSILON)[0] for part in np.split(x, [4, 8])]
    assert_close(y, scale * np.concatenate(parts))
    assert_close(
        bnjax.ghost_bn_apply(bnjax.BNParams(scale, None), None, x, False, ghost_size=4, epsilon=EPSILON)[0], y, 0
    )


def test_a_ghost_without_valid_values_is_normalized_by_the_running_statistics(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    params, state = variables((3,), rng)
    mask = (np.arange(8) < 4)[:, None]
    y, new = bnjax.ghost_bn_apply(params, state, x, True, ghost_size=4, mask=mask, **OPTIONS)
    assert_close(y[4:], bnjax.bn_apply(params, state, x[4:], False, **OPTIONS)[0])
    assert_close(new.mean, 0.8 * state.mean + 0.2 * x[:4].mean(0))


def test_ghost_statistics_merge_over_a_named_axis_and_stay_local_in_the_output(rng):
    x = rng.normal(2, 3, (4, 6, 3)).astype(np.float32)
    params, state = variables((3,), rng)
    mask = np.arange(6)[None, :, None] < np.array([6, 3, 0, 5])[:, None, None]

    def apply(x, mask):
        return bnjax.ghost_bn_apply(params, state, x, True, ghost_size=2, mask=mask, axis_name="data", **OPTIONS)

    y, new = jax.vmap(apply, axis_name="data")(x, mask)
    flat = x.reshape(24, 3), mask.reshape(24, 1)
    expected, whole = bnjax.ghost_bn_apply(params, state, flat[0], True, ghost_size=2, mask=flat[1], **OPTIONS)
    assert_close(y.reshape(24, 3), expected, 1e-4)
    for device in range(4):
        jax.tree.map(lambda a, b, d=device: assert_close(a[d], b), new, whole)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P("data")), "out_specs": (P("data"), P())}
    mapped = jax.jit(jax.shard_map(apply, mesh=mesh, **specs))(*flat)
    assert_close(mapped[0], expected, 1e-4)
    jax.tree.map(assert_close, mapped[1], whole)


@pytest.mark.parametrize("size", [6, 100])
def test_a_named_axis_leaves_ghosts_of_all_that_a_device_has_to_themselves(size, rng):
    x = rng.normal(2, 3, (24, 3)).astype(np.float32)
    params, state = variables((3,), rng)

    def apply(x):
        return bnjax.ghost_bn_apply(params, state, x, True, ghost_size=size, axis_name="data", **OPTIONS)

    y, new = jax.vmap(apply, axis_name="data", out_axes=(0, None))(x.reshape(4, 6, 3))
    expected, mean, var = ghost_oracle(params, state, x, 6, -1)
    assert_close(y.reshape(24, 3), expected)
    assert_close(new.mean, mean)
    assert_close(new.var, var)


@pytest.mark.parametrize("shape", [(8, 0, 3), (8, 0), (0, 3)])
def test_ghosts_of_nothing_change_nothing(shape):
    params, state = bnjax.bn_init(shape[-1])
    y, new = bnjax.ghost_bn_apply(params, state, jnp.ones(shape), True, ghost_size=2)
    assert y.shape == shape
    jax.tree.map(np.testing.assert_array_equal, new, state)


@pytest.mark.optimized
def test_a_ghost_on_one_device_needs_no_communication_for_its_output(rng):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(rng.normal(size=(32, 5, 3)).astype(np.float32), NamedSharding(mesh, P("data")))
    params, state = jax.device_put(variables((3,), rng), NamedSharding(mesh, P()))

    def loss(x, out):
        return jnp.sum(bnjax.ghost_bn_apply(params, state, x, True, ghost_size=4, **OPTIONS)[out][0] ** 2)

    output = jax.jit(lambda x: bnjax.ghost_bn_apply(params, state, x, True, ghost_size=4, **OPTIONS)[0])
    for f in output, jax.jit(jax.grad(lambda x: jnp.sum(output(x) ** 3))):
        text = f.lower(x).compile().as_text()
        assert not [word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if word in text]
    both = jax.jit(lambda x: bnjax.ghost_bn_apply(params, state, x, True, ghost_size=4, **OPTIONS))
    assert "all-" in both.lower(x).compile().as_text()  # the state is everyone's
    expected = ghost_oracle(params, state, np.asarray(x), 4, -1)
    assert_close(both(x)[0], expected[0])
    assert_close(both(x)[1].var, expected[2])


def renorm_oracle(params, state, x, r_max, d_max, momentum=0.8, mask=None, average="std"):
    """Algorithm 1 of Ioffe (2017), in float64; its sigma is sqrt(var + epsilon). Or the variance is averaged."""
    params, state = jax.tree.map(lambda v: np.asarray(v, np.float64), (params, state))
    _, mean, var = reference.moments(x, -1, mask)
    sigma, running = np.sqrt(var + EPSILON), np.sqrt(state.var + EPSILON)
    r = np.clip(sigma / running, 1 / r_max, r_max)
    d = np.clip((mean - state.mean) / running, -d_max, d_max)
    y = params.scale * ((x - mean) / sigma * r + d) + params.bias
    std = momentum * running + (1 - momentum) * sigma
    new_var = momentum * state.var + (1 - momentum) * var if average == "var" else std**2 - EPSILON
    return y, momentum * state.mean + (1 - momentum) * mean, new_var


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("r_max", "d_max", "average"), [(1.0, 0.0, "std"), (1.5, 0.3, "std"), (1.5, 0.3, "var"), (100.0, 100.0, "std")]
)
def test_renorm_bn_apply_matches_the_oracle_over_steps(r_max, d_max, average, masked, rng):
    params, state = variables((4,), rng)
    for step in range(5):
        x = rng.normal(step, 1 + step, (6, 4)).astype(np.float32)
        mask = rng.random((6, 1)) < 0.8 if masked else None
        limits = {"r_max": r_max, "d_max": d_max, "mask": mask, "average": average}
        y, new = bnjax.renorm_bn_apply(params, state, x, True, **limits, **OPTIONS)
        expected, mean, var = renorm_oracle(params, state, x, **limits)
        assert_close(y, expected, 1e-4)
        assert_close(new.mean, mean)
        assert_close(new.var, var)
        state = new
    np.testing.assert_array_equal(state.count, 5)


def test_renorm_with_the_least_bounds_is_bn_apply_and_without_bounds_is_evaluation(rng):
    x = rng.normal(2, 3, (8, 4)).astype(np.float32)
    params, state = variables((4,), rng)
    least, _ = bnjax.renorm_bn_apply(params, state, x, True, r_max=1, d_max=0, **OPTIONS)
    assert_close(least, bnjax.bn_apply(params, state, x, True, **OPTIONS)[0])
    evaluated, _ = bnjax.bn_apply(params, state, x, False, **OPTIONS)
    unbounded, _ = bnjax.renorm_bn_apply(params, state, x, True, r_max=1e9, d_max=1e9, **OPTIONS)
    assert_close(unbounded, evaluated, 1e-4)
    assert_close(bnjax.renorm_bn_apply(params, state, x, False, r_max=2, d_max=2, **OPTIONS)[0], evaluated, 0)


def test_renorm_corrections_are_constants_to_the_gradient(rng):
    """Plain autodiff of the paper's formula with r and d held, in float64."""
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(2, 3, (8, 4)))
        params, state = variables((4,), rng, np.float64)
        g = jnp.asarray(rng.normal(size=x.shape))
        running = jnp.sqrt(state.var + EPSILON)
        r = jnp.clip(jnp.sqrt(x.var(0) + EPSILON) / running, 1 / 2, 2)
        d = jnp.clip((x.mean(0) - state.mean) / running, -0.5, 0.5)

        def oracle(params, x):
            xhat = (x - x.mean(0)[None]) / jnp.sqrt(x.var(0) + EPSILON)[None]
            return jnp.sum(g * (params.scale[None] * (xhat * r[None] + d[None]) + params.bias[None]))

        def renorm(params, x):
            return jnp.sum(g * bnjax.renorm_bn_apply(params, state, x, True, r_max=2, d_max=0.5, **OPTIONS)[0])

        def squared(f):
            return lambda params, x: jnp.sum(jax.grad(f, 1)(params, x) ** 2)

        for order in range(2):
            actual, expected = (
                jax.jit(jax.grad(f if order == 0 else squared(f), (0, 1)))(params, x) for f in (renorm, oracle)
            )
            jax.tree.map(lambda a, b: assert_close(a, b, 1e-8), actual, expected)


def test_ghost_gradients_match_plain_autodiff(rng):
    with jax.enable_x64(True):
        x = rng.normal(2, 3, (7, 4))
        params, state = variables((4,), rng, np.float64)
        g = rng.normal(size=x.shape)

        def oracle(params, x):
            parts = [(p - p.mean(0)[None]) / jnp.sqrt(p.var(0) + EPSILON)[None] for p in (x[:3], x[3:6], x[6:])]
            return jnp.sum(g * (params.scale[None] * jnp.concatenate(parts) + params.bias[None]))

        def ghost(params, x):
            return jnp.sum(g * bnjax.ghost_bn_apply(params, state, x, True, ghost_size=3, **OPTIONS)[0])

        actual, expected = (jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (ghost, oracle))
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-8), actual, expected)

        def statistics(x):
            return bnjax.ghost_bn_apply(params, state, x, True, ghost_size=3, **OPTIONS)[1].var.sum()

        expected = jax.jit(jax.grad(lambda x: 0.2 * x.var(0).sum()))(x)
        assert_close(jax.jit(jax.grad(statistics))(x), expected, 1e-8)


@pytest.mark.parametrize("mapping", ["vmap", "shard_map"])
def test_renorm_over_a_named_axis_is_one_device(mapping, rng):
    x = rng.normal(2, 3, (8, 5, 3)).astype(np.float32)
    params, state = variables((3,), rng)
    limits = {"r_max": 1.5, "d_max": 0.4, **OPTIONS}
    expected = bnjax.renorm_bn_apply(params, state, x, True, **limits)

    def apply(x):
        return bnjax.renorm_bn_apply(params, state, x, True, axis_name="data", **limits)

    if mapping == "vmap":
        y, new = jax.jit(jax.vmap(apply, axis_name="data", out_axes=(0, None)))(x)
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        y, new = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())))(x)
    assert_close(y, expected[0], 1e-4)
    jax.tree.map(assert_close, new, expected[1])


def test_the_renorm_schedule_is_that_of_the_paper():
    """Section 4: r_max 1 and d_max 0 for 5000 steps, then rising to 3 at 40,000 and to 5 at 25,000."""
    counts = jnp.array([0, 5_000, 15_000, 25_000, 40_000, 10**6])
    assert_close(bnjax.RENORM_D_MAX(counts), [0, 0, 2.5, 5, 5, 5], 1e-6)
    assert_close(bnjax.RENORM_R_MAX(counts), [1, 1, 1 + 2 * 10 / 35, 1 + 2 * 20 / 35, 3, 3], 1e-6)
    assert bnjax.linear_ramp(1.0, 3.0, 5_000, 40_000) == bnjax.RENORM_R_MAX


def test_a_ramp_from_a_count_to_itself_is_a_step_with_a_finite_derivative():
    step = bnjax.linear_ramp(1.0, 3.0, 40, 40)
    assert step(jnp.array([0, 39, 40, 41])).tolist() == [1, 1, 3, 3]
    assert (jax.grad(step)(40.0), jax.grad(step)(39.0)) == (0, 0)
    assert step == bnjax.linear_ramp(1.0, 3.0, 40, 40)


def test_ramps_and_steps_are_exact_beyond_the_integers_of_float32():
    counts = 2**24 + jnp.arange(5)
    assert bnjax.linear_ramp(0.0, 1.0, 2**24 + 1, 2**24 + 1)(counts).tolist() == [0, 1, 1, 1, 1]
    assert bnjax.linear_ramp(0.0, 1.0, 2**24, 2**24 + 4)(counts).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_one_count_may_serve_all_features(rng):
    """As in PyTorch: an update of any feature counts, and the count stays a scalar, as a scan's carry must."""
    x = rng.normal(2, 3, (8, 2)).astype(np.float32)
    params, state = variables((2,), rng)
    mask = np.array([[True, False]])
    limits = {"r_max": bnjax.linear_ramp(1.0, 3.0, 9, 9), "d_max": bnjax.linear_ramp(0.0, 5.0, 9, 9)}
    for count, (r_max, d_max) in {8: (1.0, 0.0), 9: (3.0, 5.0)}.items():
        counted = state._replace(count=jnp.int32(count))
        y, new = bnjax.renorm_bn_apply(params, counted, x, True, **limits, **OPTIONS)
        assert_close(y, renorm_oracle(params, state, x, r_max, d_max)[0], 1e-4)
        assert (new.count.shape, int(new.count)) == ((), count + 1)
    momentum = {"momentum": bnjax.cumulative_average}
    for apply in bnjax.bn_apply, partial(bnjax.ghost_bn_apply, ghost_size=8):
        _, new = apply(params, state._replace(count=jnp.int32(3)), x, True, mask=mask, **momentum)
        assert int(new.count) == 4
        assert_close(new.mean, [0.75 * state.mean[0] + 0.25 * x[:, 0].mean(), state.mean[1]])
        _, same = apply(params, state._replace(count=jnp.int32(3)), x[:1], True, **momentum)
        assert int(same.count) == 3


def test_renorm_bounds_follow_each_features_count(rng):
    x = rng.normal(2, 3, (8, 2)).astype(np.float32)
    params, state = variables((2,), rng)
    state = state._replace(count=jnp.array([0, 100]))
    limits = {"r_max": bnjax.linear_ramp(1.0, 3.0, 0, 100), "d_max": bnjax.linear_ramp(0.0, 5.0, 0, 100)}
    y, _ = jax.jit(lambda s: bnjax.renorm_bn_apply(params, s, x, True, **limits, **OPTIONS))(state)
    for feature, (r_max, d_max) in enumerate([(1.0, 0.0), (3.0, 5.0)]):
        assert_close(y[:, feature], renorm_oracle(params, state, x, r_max, d_max)[0][:, feature], 1e-4)


@pytest.mark.parametrize("indexed", [False, True])
def test_indexed_bn_apply_moves_one_index_alone(indexed, rng):
    params, state = bnjax.indexed_bn_init(3, 4, indexed_params=indexed)
    assert params.scale.shape == ((4, 3) if indexed else (3,))
    if indexed:
        params = params._replace(scale=jnp.arange(12.0).reshape(4, 3))
    own = [bnjax.bn_init(3)[1] for _ in range(4)]
    apply = jax.jit(lambda s, x, i: bnjax.indexed_bn_apply(params, s, x, True, index=i, **OPTIONS))
    for index in (2, 0, 2, 3):
        x = rng.normal(index, 2, (9, 3)).astype(np.float32)
        y, state = apply(state, x, index)
        here = bnjax.BNParams(params.scale[index], params.bias[index]) if indexed else params
        expected, own[index] = bnjax.bn_apply(here, own[index], x, True, **OPTIONS)
        assert_close(y, expected, 1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), state, stacked)
    y, kept = bnjax.indexed_bn_apply(params, state, x, False, index=2, **OPTIONS)
    here = bnjax.BNParams(params.scale[2], params.bias[2]) if indexed else params
    assert_close(y, bnjax.bn_apply(here, own[2], x, False, **OPTIONS)[0], 1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_an_index_known_at_run_time_is_clamped_in_a_scan(rng):
    x = rng.normal(2, 3, (6, 9, 3)).astype(np.float32)
    params, state = bnjax.indexed_bn_init(3, 4)

    def step(state, inputs):
        index, x = inputs
        return bnjax.indexed_bn_apply(params, state, x, True, index=index, **OPTIONS)[::-1]

    state, _ = jax.lax.scan(step, state, (jnp.arange(6) - 1, x))
    np.testing.assert_array_equal(state.count[:, 0], [2, 1, 1, 2])
    mean = 0.8 * 0.2 * x[4].mean(0) + 0.2 * x[5].mean(0)
    assert_close(state.mean[3], mean)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_an_index_of_a_narrow_dtype_finds_its_place(dtype):
    x = jnp.arange(6.0).reshape(2, 3)
    _, state = bnjax.indexed_bn_apply(*bnjax.indexed_bn_init(3, 300), x, True, index=dtype(100))
    assert state.count[:, 0].argmax() == 100


def test_renorm_keeps_a_wider_state_whole(rng):
    with jax.enable_x64(True):
        params, state = bnjax.bn_init(2, dtype=jnp.float64)
        state = state._replace(var=jnp.full(2, 1 / 3))
        x = rng.normal(size=(8, 2)).astype(np.float32)
        params = jax.tree.map(lambda v: v.astype(jnp.float32), params)
        _, new = bnjax.renorm_bn_apply(params, state, x, True, r_max=2, d_max=2, momentum=1.0)
        np.testing.assert_allclose(new.var, 1 / 3, rtol=1e-15)
