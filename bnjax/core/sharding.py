"""JAX's explicit sharding: the type of an array says how it is sharded, and the shardings of operands have to agree.

Without explicit sharding these functions return arrays as they are.
"""

import math

import jax
from jax import Array
from jax import numpy as jnp


def is_explicit(values: Array) -> bool:
    """Whether the type of an array says how it is sharded."""
    return jax.sharding.AxisType.Explicit in jax.typeof(values).sharding.mesh.axis_types


def sharded_as(like: Array, values: Array) -> Array:
    """`values`, of the rank of `like` and of its size or 1 on each axis, sharded as `like` is."""
    if not is_explicit(like):
        return values
    sharding = jax.typeof(like).sharding
    spec = [None if n == 1 else name for n, name in zip(values.shape, sharding.spec, strict=True)]
    return jax.sharding.reshard(values, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec)))


def shards(values: Array, axis: int) -> int:
    """The number of devices that an axis is explicitly divided among; 1 if none is named."""
    if not is_explicit(values):
        return 1
    sharding = jax.typeof(values).sharding
    names = sharding.spec[axis] or ()
    return math.prod(sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names))


def select(which: Array, new: Array, old: Array) -> Array:
    """`new` where `which`, else `old`: arrays of one shape; the result is sharded as `old`."""
    return jnp.where(sharded_as(old, which), sharded_as(old, new), old)
