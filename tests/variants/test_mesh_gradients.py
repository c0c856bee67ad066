"""The gradients of every function over an axis of a mesh are those of one device, through output and state alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax

PARAMS, STATE = bnjax.bn_init(5)
INDEXED = bnjax.indexed_bn_init(5, 3)
FUNCTIONS: dict[str, Any] = {
    "plain": lambda x, index, **on: bnjax.bn_apply(PARAMS, STATE, x, True, **on),
    "ghost": lambda x, index, **on: bnjax.ghost_bn_apply(PARAMS, STATE, x, True, ghost_size=8, **on),
    "renorm": lambda x, index, **on: bnjax.renorm_bn_apply(PARAMS, STATE, x, True, r_max=2.0, d_max=1.0, **on),
    "adaptive": lambda x, index, **on: bnjax.adaptive_bn_apply(PARAMS, STATE, x, source_weight=4, **on),
    "indexed": lambda x, index, **on: bnjax.indexed_bn_apply(*INDEXED, x, True, index=1, **on),
    "index per example": lambda x, index, **on: bnjax.indexed_bn_apply(*INDEXED, x, True, index=index, **on),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_over_a_mesh_axis_are_those_of_one_device(name, masked, rng):
    x, g = (jnp.asarray(rng.standard_normal((64, 5)) + 3, jnp.float32) for _ in range(2))
    index, mask = jnp.asarray(rng.integers(0, 3, 64)), jnp.asarray(rng.random((64, 1)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(x, index, g, mask, axis_name=None):
        y, state = FUNCTIONS[name](x, index, mask=mask if masked else None, axis_name=axis_name)
        total, statistics = jnp.sum(y * g), jnp.sum(state.mean**2 * state.var)
        return total + statistics if axis_name is None else jax.lax.psum(total, axis_name) + statistics

    def over_the_mesh(x):
        f = jax.shard_map(
            lambda *parts: loss(*parts, axis_name="data"), mesh=mesh, in_specs=(P("data"),) * 4, out_specs=P()
        )
        return f(x, index, g, mask)

    got, want = jax.jit(jax.grad(over_the_mesh))(x), jax.jit(jax.grad(loss))(x, index, g, mask)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
