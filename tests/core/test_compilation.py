"""What is traced, compiled, exported and carried, and what it costs to compute."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import reference
from tests.support.whole_batch import (
    BIAS,
    FEATURES,
    MASKS,
    PARAMS,
    RNG,
    ROWS,
    SCALE,
    STATE,
    G,
    X,
    assert_matches_the_oracle,
    loss,
)

pytestmark = pytest.mark.optimized


def test_examples_under_vmap_cost_linear_in_their_number():
    def flops(rows):
        f = jax.jit(jax.vmap(lambda x: bnjax.bn_apply(PARAMS, STATE, x, True, axis_name="i"), axis_name="i"))
        return f.lower(jnp.zeros((rows, FEATURES))).compile().cost_analysis()["flops"]

    assert flops(4096) / flops(2048) == pytest.approx(2, rel=0.05)


def test_the_parts_are_named_in_compiled_programs_and_so_in_profiles():
    step = jax.jit(jax.grad(lambda x: jnp.sum(bnjax.bn_apply(PARAMS, STATE, x, True)[0] ** 2)))
    forward = jax.jit(lambda x: bnjax.bn_apply(PARAMS, STATE, x, True))
    assert all(f"bnjax.{part}/" in compiled(forward) for part in ("moments", "normalize", "running"))
    assert all(f"bnjax.{part}" in compiled(step) for part in ("moments", "normalize"))


def compiled(function):
    return function.lower(jnp.asarray(X, jnp.float32)).compile().as_text()


def test_scan_carries_the_state_like_a_loop():
    xs = RNG.standard_normal((5, ROWS, FEATURES)).astype(np.float32)
    carried, ys = lax.scan(lambda state, x: bnjax.bn_apply(PARAMS, state, x, True)[::-1], STATE, xs)
    mean, var = np.zeros(FEATURES), np.ones(FEATURES)
    for x, y in zip(xs, ys, strict=True):
        want, mean, var = reference.train(x, SCALE, BIAS, mean, var)
        np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_allclose(carried.mean, mean, atol=1e-6)
    np.testing.assert_allclose(carried.var, var, rtol=1e-6)
    np.testing.assert_array_equal(carried.count, [5, 5, 5])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_eval_shape_tells_shapes_and_dtypes(dtype):
    params, state = bnjax.bn_init(FEATURES, dtype=dtype)
    y, new = jax.eval_shape(
        lambda x: bnjax.bn_apply(params, state, x, True), jax.ShapeDtypeStruct((4, FEATURES), dtype)
    )
    assert (y.shape, y.dtype) == ((4, FEATURES), dtype)
    assert [(s.shape, s.dtype) for s in new] == [(s.shape, s.dtype) for s in state]


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_forward_and_gradient_export(platform):
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    exported = jax.export.export(step, platforms=[platform])(PARAMS, X, MASKS["unequal"], G)
    assert exported.platforms == (platform,)
    restored = jax.export.deserialize(exported.serialize())
    if platform == jax.default_backend():
        assert_matches_the_oracle(restored.call(PARAMS, X, MASKS["unequal"], G), MASKS["unequal"])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_synchronized_gradient_exports(platform):
    mesh = jax.sharding.AbstractMesh((4,), ("a",))
    spec = NamedSharding(mesh, P("a"))
    f = jax.shard_map(
        lambda x: jax.grad(lambda x: loss(PARAMS, x, None, 1.0, axis_name="a")[0])(x),
        mesh=mesh,
        in_specs=P("a"),
        out_specs=P("a"),
    )
    exported = jax.export.export(jax.jit(f), platforms=[platform])(
        jax.ShapeDtypeStruct(X.shape, jnp.float32, sharding=spec)
    )
    assert "stablehlo.all_gather" not in exported.mlir_module()


def test_many_steps_trace_once():
    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, x, momentum):
        return bnjax.bn_apply(params, state, x, True, momentum=momentum)

    state = STATE
    params, state = jax.tree.map(jnp.asarray, (PARAMS, state))
    for i in range(4):
        _, state = step(params, state, X + np.float32(i), 0.5 + 0.1 * i)
    np.testing.assert_array_equal(state.count, [4, 4, 4])


def test_eager_calls_with_other_momenta_compile_once():
    from bnjax.core.layer import batch_norm

    params, state = jax.tree.map(jnp.asarray, (PARAMS, STATE))
    _, state = bnjax.bn_apply(params, state, X, True, momentum=0.5)
    before = batch_norm._cache_size()
    for momentum in (0.9, 0.99, 1, np.float32(0.3)):
        _, state = bnjax.bn_apply(params, state, X, True, momentum=momentum)
    assert batch_norm._cache_size() == before
