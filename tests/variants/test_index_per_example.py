"""`indexed_bn_apply` with an index for each example, against `bn_apply` on only each index's examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import reference

OPTIONS = {"momentum": 0.8, "epsilon": 1e-3}
NUMBER = 4
INDEX = np.array([0, 3, 2, 2, 0, 3, 0, 0, 3, 2, 2, 3, 0, 2, 0, 3])  # no example has index 1


def assert_close(actual, expected, tolerance=2e-5):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, actual, expected)


def of_index(v, k, axis):
    return None if v is None else np.compress(k == INDEX, v, axis)


def far_apart(shape, batch_axis, rng):
    """Data of index k around 100 k, with a standard deviation of 3."""
    means = 100.0 * np.expand_dims(INDEX, [a for a in range(len(shape)) if a != batch_axis])
    return (rng.normal(2, 3, shape) + means).astype(np.float32)


def by_itself(params, state, x, mask=None):
    """`bn_apply` on the examples of each index, along the first axis, and each index's row of params."""
    y, rows = jnp.zeros_like(x), []
    for k in range(NUMBER):
        at = np.flatnonzero(k == INDEX)
        row = jax.tree.map(lambda v, k=k: v[k], state)
        if at.size:
            own = jax.tree.map(lambda v, k=k: v[k] if v.shape == state.mean.shape else v, params)
            own_mask = None if mask is None else mask[at]
            part, row = bnjax.bn_apply(own, row, x[at], True, mask=own_mask, **OPTIONS)
            y = y.at[at].set(part)
        rows.append(row)
    return y, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


CASES = {
    "features": ((16, 5), -1, None, False),
    "images with weights": ((16, 3, 4, 5), -1, "weights", False),
    "channels first with a boolean mask": ((16, 3, 4, 5), 1, "bool", True),
    "features before the batch": ((3, 16), 0, "weights", True),
    "two feature axes": ((16, 3, 2, 4), (1, 3), None, True),
    "complex": ((16, 3, 2), -1, None, False),
    "bfloat16": ((16, 3, 2), -1, None, False),
}


SLOW = ("channels first with a boolean mask", "two feature axes", "bfloat16")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_each_index_matches_the_oracle_on_its_own_examples(name, rng):
    shape, axis, masked, unbiased = CASES[name]
    features = np.atleast_1d(axis) % len(shape)
    batch_axis = min(set(range(len(shape))) - set(features.tolist()))
    x, dtype = far_apart(shape, batch_axis, rng), jnp.float32
    if name == "complex":
        x, dtype = x + 1j * rng.normal(5, 2, shape).astype(np.float32), jnp.complex64
    if name == "bfloat16":
        x = np.asarray(x.astype(jnp.bfloat16))
    mask = {None: None, "bool": rng.random(shape) < 0.8, "weights": rng.random(shape).astype(np.float32)}[masked]
    params, state = bnjax.indexed_bn_init([shape[a] for a in features], NUMBER, dtype=dtype)
    params = bnjax.BNParams(params.scale + 1, params.bias - 3)
    step = {"index": INDEX, "axis": axis, "mask": mask, **OPTIONS}
    y, new = bnjax.indexed_bn_apply(params, state, x, True, unbiased_var=unbiased, **step)
    assert y.dtype == x.dtype
    for k in 0, 2, 3:
        own_x, own_mask = of_index(x, k, batch_axis), of_index(mask, k, batch_axis)
        running = state.mean[k], state.var[k], axis, 0.8, 1e-3, own_mask, unbiased
        expected, mean, var = reference.train(own_x, *params, *running)
        own_y = of_index(np.asarray(y), k, batch_axis)
        assert_close(np.asarray(own_y, expected.dtype), expected, 1e-4 if name != "bfloat16" else 2**-7)
        assert_close((new.mean[k], new.var[k]), (mean, var))
        np.testing.assert_array_equal(new.count[k], 1)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[1], old[1]), new, state)


def test_means_of_ten_thousand_standard_deviations_that_differ_by_index_cost_no_accuracy(rng):
    images = (rng.normal(size=(16, 6, 3)) + 1e4 * (INDEX[:, None, None] - 1.5)).astype(np.float32)
    params, state = bnjax.indexed_bn_init(3, NUMBER)
    for x in images, images[:, 0]:
        y, new = bnjax.indexed_bn_apply(params, state, x, True, index=INDEX, **OPTIONS)
        for k in 0, 2, 3:
            expected, _, var = reference.train(x[k == INDEX], *params, 0, 1, -1, **OPTIONS)
            assert_close(y[k == INDEX], expected, 2e-3)  # the rounding of a mean of 1.5e4 is 1e-3 standard deviations
            assert_close(new.var[k], var, 2e-5)


def test_one_index_for_all_is_the_scalar_index_and_order_does_not_matter(rng):
    x = far_apart((16, 3), 0, rng)
    params, state = bnjax.indexed_bn_init(3, NUMBER, indexed_params=True)
    apply = jax.jit(lambda x, index: bnjax.indexed_bn_apply(params, state, x, True, index=index, **OPTIONS))
    assert_close(apply(x, np.full(16, 2)), bnjax.indexed_bn_apply(params, state, x, True, index=2, **OPTIONS))
    order = rng.permutation(16)
    y, new = apply(x, INDEX)
    assert_close(apply(x[order], INDEX[order]), (y[order], new))
    assert_close(apply(x, np.where(INDEX == 3, 9, np.where(INDEX == 0, -7, INDEX))), (y, new), 0)  # clamped


def test_a_nan_stays_in_its_index_and_a_masked_one_is_not_seen(rng):
    x = far_apart((16, 3), 0, rng)
    params, state = bnjax.indexed_bn_init(3, NUMBER)
    bad = x.copy()
    bad[1, 1] = np.nan  # an example of index 3

    def step(x, mask):
        def loss(x):
            y, new = bnjax.indexed_bn_apply(params, state, x, True, index=INDEX, mask=mask, **OPTIONS)
            return jnp.sum(jnp.where(mask & (INDEX != 3)[:, None], y, 0) ** 3), (y, new)

        return jax.grad(loss, has_aux=True)(x)

    step = jax.jit(step)
    every, but_one = np.ones((16, 1), bool), (np.arange(16) != 1)[:, None]
    (g, (y, new)), (bad_g, (bad_y, bad_new)) = step(x, every), step(bad, every)
    others = INDEX != 3
    assert_close((bad_y[others], bad_g[others]), (y[others], g[others]), 0)
    np.testing.assert_array_equal(np.isnan(bad_y).sum(0), [0, 5, 0])
    np.testing.assert_array_equal(bad_new.count[3], [1, 0, 1])
    g, (y, new) = step(bad, but_one)
    assert np.isfinite(g).all()
    assert_close(new.mean[3], 0.2 * x[(INDEX == 3) & but_one[:, 0]].mean(0))
    y = step(x, (INDEX != 2)[:, None])[1][0]  # all of index 2 is masked: its running statistics, 0 and 1, normalize
    assert_close(y[INDEX == 2], x[INDEX == 2] / np.sqrt(1 + 1e-3))


def test_in_evaluation_each_example_has_the_statistics_of_its_index(rng):
    x = far_apart((16, 2, 3), 0, rng)
    state = bnjax.BNState(rng.normal(size=(4, 3)), rng.random((4, 3)) + 0.5, np.zeros((4, 3), np.int32))
    state = jax.tree.map(lambda v: v.astype(np.float32 if v.dtype == float else v.dtype), state)
    params = bnjax.BNParams(rng.normal(size=(4, 3)).astype(np.float32), None)
    y, kept = bnjax.indexed_bn_apply(params, state, x, False, index=INDEX, epsilon=1e-3)
    scale, mean, var = (v[INDEX][:, None] for v in (params.scale, state.mean, state.var))
    assert_close(y, scale * (x - mean) / np.sqrt(var + 1e-3))
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_each_index_has_the_momentum_of_its_own_count(rng):
    x = far_apart((16, 3), 0, rng)
    params, state = bnjax.indexed_bn_init(3, NUMBER)
    state = state._replace(count=jnp.repeat(jnp.array([[0], [7], [4], [9]], jnp.int32), 3, 1))
    average = {"momentum": bnjax.cumulative_average}
    _, new = bnjax.indexed_bn_apply(params, state, x, True, index=INDEX, **average)
    for k, count in (0, 0), (2, 4), (3, 9):
        assert_close(new.mean[k], x[k == INDEX].mean(0) / (count + 1))


def derivatives(apply, params, state, x, tangent):
    """The gradient and a product with the Hessian of a function of the output and of the new state."""

    def loss(params, mean, var, x):
        y, new = apply(params, bnjax.BNState(mean, var, state.count), x)
        return jnp.sum(jnp.sin(y) * jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size) + jnp.sum(
            jnp.cos(new.mean) * new.var**2
        )

    gradient = jax.grad(loss, (0, 1, 2, 3))
    return jax.jit(lambda *a: jax.jvp(gradient, a, tangent))(params, state.mean, state.var, x)


def differentiated(shape, indexed, rng):
    params, state = bnjax.indexed_bn_init(3, NUMBER, indexed_params=indexed, dtype=jnp.float64)
    params = jax.tree.map(lambda v: v + rng.normal(size=v.shape), params)
    x = jnp.asarray(rng.normal(2, 3, shape))
    tangent = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), (params, state.mean, state.var, x))
    return params, state, x, tangent


def test_gradients_match_the_oracle_on_each_indexs_examples(rng):
    x = far_apart((16, 2, 3), 0, rng)
    mask = (rng.random((16, 2, 1)) < 0.9) * rng.random((16, 2, 1)).astype(np.float32)
    g = rng.normal(size=x.shape).astype(np.float32)
    params, state = bnjax.indexed_bn_init(3, NUMBER, indexed_params=True)
    params = jax.tree.map(lambda v: v + rng.normal(size=v.shape).astype(np.float32), params)

    def loss(x, params):
        step = {"index": INDEX, "mask": mask, **OPTIONS}
        return jnp.sum(g * bnjax.indexed_bn_apply(params, state, x, True, **step)[0])

    dx, dparams = jax.jit(jax.grad(loss, (0, 1)))(x, params)
    for k in 0, 2, 3:
        own = (v[k == INDEX] for v in (x, g))
        expected = reference.gradients(*own, params.scale[k], -1, 1e-3, mask[k == INDEX])
        assert_close((dx[k == INDEX], dparams.scale[k], dparams.bias[k]), expected, 1e-4)
    np.testing.assert_array_equal(dparams.scale[1], 0)


@pytest.mark.slow
def test_derivatives_of_two_orders_are_those_of_the_indices_by_themselves(rng):
    with jax.enable_x64(True):
        *arguments, tangent = differentiated((16, 2, 3), True, rng)

        def apply(params, state, x):
            return bnjax.indexed_bn_apply(params, state, x, True, index=INDEX, **OPTIONS)

        actual, expected = (derivatives(f, *arguments, tangent) for f in (apply, by_itself))
        assert_close(actual, expected, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [None, "bool", "weights"])
@pytest.mark.parametrize("shape", [(16, 3), (16, 4, 3)])
def test_derivatives_over_devices_are_those_of_the_indices_by_themselves(shape, masked, rng):
    with jax.enable_x64(True):
        *arguments, tangent = differentiated(shape, False, rng)
        mask = {None: None, "bool": rng.random(shape) < 0.9, "weights": rng.random(shape)}[masked]
        expected = derivatives(lambda *a: by_itself(*a, mask), *arguments, tangent)
        some = np.ones(shape, bool) if mask is None else mask

        def one_device(params, state, x, index, some):
            own = None if mask is None else some
            options = {"mask": own, "axis_name": "data", **OPTIONS}
            return bnjax.indexed_bn_apply(params, state, x, True, index=index, **options)

        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        for check_vma in True, False:
            specs = {"in_specs": (P(), P(), P("data"), P("data"), P("data")), "out_specs": (P("data"), P())}
            mapped = jax.shard_map(one_device, mesh=mesh, check_vma=check_vma, **specs)
            actual = derivatives(lambda *a, f=mapped: f(*a, INDEX, some), *arguments, tangent)
            assert_close(actual, expected, 1e-8)


def test_indices_over_a_named_axis_are_those_of_one_device(rng):
    x = far_apart((16, 3), 0, rng)
    params, state = bnjax.indexed_bn_init(3, NUMBER)
    expected = by_itself(params, state, x)

    def apply(x, index):
        return bnjax.indexed_bn_apply(params, state, x, True, index=index, axis_name="data", **OPTIONS)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(apply, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=(P("data"), P()))
    assert_close(jax.jit(mapped)(x, INDEX), expected)
    y, new = jax.jit(jax.vmap(apply, axis_name="data", out_axes=(0, None)))(x.reshape(8, 2, 3), INDEX.reshape(8, 2))
    assert_close((y.reshape(16, 3), new), expected)


def test_sharded_examples_are_summed_where_they_are(rng):
    x = far_apart((16, 3), 0, rng)
    params, state = bnjax.indexed_bn_init(3, NUMBER)
    expected = bnjax.indexed_bn_apply(params, state, x, True, index=INDEX, **OPTIONS)
    step = jax.jit(lambda x, index: bnjax.indexed_bn_apply(params, state, x, True, index=index, **OPTIONS))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put((x, INDEX), NamedSharding(mesh, P("data")))
    compiled = step.lower(*sharded).compile()
    assert_close(compiled(*sharded), expected)
    assert "all-gather" not in compiled.as_text()  # sums of num_indices x features travel, not examples


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("a"), P("a", "b"), P(None, "b")])
@pytest.mark.parametrize("masked", [False, True])
def test_explicitly_sharded_examples_are_those_of_one_device(masked, spec, rng):
    x = far_apart((16, 4), 0, rng)
    mask = rng.random((16, 1)).astype(np.float32) if masked else None
    variables = bnjax.indexed_bn_init(4, NUMBER, indexed_params=True)

    @jax.jit
    def step(variables, x, index):
        def loss(x):
            y, new = bnjax.indexed_bn_apply(*variables, x, True, index=index, mask=mask, **OPTIONS)
            return jnp.sum(y**3), (y, new)

        return jax.grad(loss, has_aux=True)(x)

    expected = jax.device_get(step(variables, x, INDEX))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        for rows in P(), P(None, "b"), P("a"):
            specs = rows, spec, P("a")
            put = map(jax.device_put, (variables, x, INDEX), (NamedSharding(mesh, s) for s in specs))
            assert_close(jax.device_get(step(*put)), expected, 1e-4)


@pytest.mark.slow
def test_several_models_under_vmap_have_indices_of_their_own(rng):
    x = far_apart((16, 3), 0, rng)
    params, state = bnjax.indexed_bn_init(3, NUMBER)
    apply = jax.jit(jax.vmap(lambda x, i: bnjax.indexed_bn_apply(params, state, x, True, index=i, **OPTIONS)))
    y, new = apply(np.stack([x, x[::-1]]), np.stack([INDEX, INDEX[::-1]]))
    expected, row = by_itself(params, state, x)
    assert_close((y[0], y[1][::-1]), (expected, expected), 1e-4)
    for model in range(2):
        assert_close(jax.tree.map(lambda v, m=model: v[m], new), row)


def test_a_weight_known_to_be_negative_is_an_error_for_each_index_too(rng):
    x, index = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32), jnp.array([0, 1, 2, 0, 1, 2])
    weights = np.array([1, 1, 1, 1, 1, -1], np.float32)[:, None]
    with pytest.raises(ValueError, match=r"mask=.*weights of 0 or more, got -1"):
        bnjax.indexed_bn_apply(*bnjax.indexed_bn_init(2, 3), x, True, index=index, mask=weights)


@pytest.mark.parametrize("index", [1, np.array([1, 1, 2, 1, 1, 2])])
def test_one_count_for_all_features_of_an_index_goes_on(index, rng):
    x = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    params, state = bnjax.indexed_bn_init(2, 3)
    state = state._replace(count=jnp.array([5, 6, 7], jnp.int32))
    _, new = bnjax.indexed_bn_apply(params, state, x, True, index=index, momentum=bnjax.cumulative_average)
    one = np.ndim(index) == 0
    assert new.count.tolist() == ([5, 7, 7] if one else [5, 7, 8])
    own = np.asarray(x, np.float64)[slice(None) if one else index == 1]
    np.testing.assert_allclose(new.mean[1], own.mean(0) / 7, rtol=1e-5)
    np.testing.assert_allclose(new.var[1], (6 + own.var(0)) / 7, rtol=1e-5)
    with pytest.raises(ValueError, match=r"state.count has shape \(\).*broadcast_to"):
        bnjax.indexed_bn_apply(params, state._replace(count=jnp.int32(5)), x, True, index=index)
