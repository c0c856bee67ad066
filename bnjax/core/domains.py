"""A batch whose examples belong to several domains: sums over each domain's examples, and each example's row.

A table has a row for each domain, (number, *features). Arrays of examples have a value for each example and feature,
with the examples along one axis. A sum is taken over a tuple of axes or over `Domains`, which is the type `Over`;
`summed`, `largest` and `returned` treat both alike, so that a formula for the moments of a whole array is also the
formula for the moments of each domain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from bnjax.core.sharding import is_explicit


@partial(jax.tree_util.register_dataclass, data_fields=["index", "guess"], meta_fields=["number", "axis", "sharding"])
@dataclass(frozen=True)
class Domains:
    """The domain of each example.

    `index` has shape (batch,), in [0, number). `guess` is a table of guesses of the domains' means. `axis` is the axis
    of the examples. `sharding` is the sharding of an array whose examples lie along the first axis; None unless
    sharding is explicit.

    Sums are scatters, which read each example once, whatever the number of domains, and keep a NaN in its own domain. A
    product with a one-hot matrix would spread it to all. Explicit sharding has no scatter over a sharded axis, so there
    each domain sums a masked copy of the values.
    """

    index: Array
    guess: Array
    number: int
    axis: int
    sharding: NamedSharding | None

    def sum(self, values: Array) -> Array:
        """The table of the sums of each domain's examples."""
        values = jnp.moveaxis(values, self.axis, 0)
        if self.sharding is not None:
            return jnp.sum(self._own(values), 1)
        return self._zeros(values).at[self.index].add(values)

    def largest(self, values: Array) -> Array:
        """The table of the largest value >= 0 of each domain's examples; 0 for a domain without examples."""
        values = jnp.moveaxis(values, self.axis, 0)
        if self.sharding is not None:
            return jnp.max(self._own(values), 1, initial=0)
        return self._zeros(values).at[self.index].max(values)

    def rows(self, table: Array) -> Array:
        """Each example's row of the table."""
        return jnp.moveaxis(rows(table, self.index, self.sharding), 0, self.axis)

    def _zeros(self, values):
        return jnp.zeros((self.number, *values.shape[1:]), values.dtype)

    def _own(self, values):
        """A copy of the values for each domain, 0 at examples of other domains; (number, batch, *features)."""
        assert self.sharding is not None
        index = reshard(self.index, NamedSharding(self.sharding.mesh, P(self.sharding.spec[0])))
        own = jnp.arange(self.number)[:, None] == index[None]
        own = jnp.expand_dims(own, range(2, values.ndim + 1))
        shape = (self.number, *values.shape)
        sharding = NamedSharding(self.sharding.mesh, P(None, *self.sharding.spec))
        own, values = (jnp.broadcast_to(v, shape, out_sharding=sharding) for v in (own, values[None]))
        return jnp.where(own, values, 0)


Over = tuple[int, ...] | Domains


def summed(values: Array, over: Over) -> Array:
    """The sum over axes, or the table of the sums over each domain."""
    return over.sum(values) if isinstance(over, Domains) else jnp.sum(values, over)


def largest(values: Array, over: Over) -> Array:
    """The largest value >= 0 over axes, or of each domain; 0 where there is none."""
    return over.largest(values) if isinstance(over, Domains) else jnp.max(values, over, initial=0)


def returned(result: Array, over: Over) -> Array:
    """The result of a sum, in a shape that broadcasts to the summands."""
    return over.rows(result) if isinstance(over, Domains) else jnp.expand_dims(result, over)


def rows(table: Array, index: Array, sharding: NamedSharding | None) -> Array:
    """The row of the table for each index, which is clamped; sharded as given, where sharding is explicit."""
    if sharding is None:
        return jnp.take(table, index, axis=0, mode="clip")
    mesh, (batch, *features) = sharding.mesh, sharding.spec
    table, index = (
        reshard(table, NamedSharding(mesh, P(None, *features))),
        reshard(index, NamedSharding(mesh, P(batch))),
    )
    return table.at[index].get(mode="clip", out_sharding=sharding)


def row_sharding(x: Array, axes: Sequence[int]) -> NamedSharding | None:
    """The sharding of an array with these axes of `x`; None unless sharding is explicit."""
    if not is_explicit(x):
        return None
    sharding = jax.typeof(x).sharding
    return NamedSharding(sharding.mesh, P(*(None if x.shape[a] == 1 else sharding.spec[a] for a in axes)))
