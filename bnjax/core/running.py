"""Running statistics: what the state absorbs from the moments of a batch.

running = momentum * running + (1 - momentum) * batch          for mean and var
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.jax_internals import is_traced
from bnjax.core.moments import wider
from bnjax.core.records import BNState, Collected
from bnjax.core.schedules import at_count, cumulative_average, debiased
from bnjax.core.sharding import select, sharded_as


def rates(call: str, momentum: Any, state: Any, train: bool) -> tuple[Any, Any]:
    """The weights of the old value and of the new one as numbers, from a momentum that was checked."""
    ours = debiased(1.0) if momentum is cumulative_average else momentum
    if isinstance(ours, debiased):
        return at_count(call, "momentum", ours.weights, state, train, unused=(1.0, 0.0))
    keep = momentum
    if callable(momentum):
        keep = checks.momentum(call, at_count(call, "momentum", momentum, state, train, unused=1.0))
    if is_traced(keep):
        keep = jnp.where(keep < 0, 0, jnp.where(keep > 1, 1, keep))  # a NaN stays one
    # In float32 the complement of 0.99 has a relative error of 1e-6; for a Python number it is computed in float64.
    return keep, 1 - keep


@jax.named_scope("bnjax.running")
def absorb(
    state: BNState,
    batch: Collected,
    rates: tuple[Any, Any],
    unbiased_var: bool,
    std_epsilon: float | None = None,
) -> BNState:
    """`state` after one update, in its own dtypes. A feature without enough information stays as it is.

    Two valid values whose statistics are finite are enough. A count without feature axes is one count of the whole
    layer, like PyTorch's `num_batches_tracked`, or of an index: it counts the updates that any feature absorbed.

    Args:
      state: the running statistics.
      batch: the moments of the batch and their support.
      rates: the weights of the old value and of the new one; they add up to 1.
      unbiased_var: whether the variance is divided by n - sum(w^2) / n in place of n.
      std_epsilon: None averages the variances; a number averages the standard deviations sqrt(var + std_epsilon).
    """
    (weight, mean, var), support = jax.tree.map(lambda v: sharded_as(state.mean, v), batch)
    valid, mean_weight = (weight, 1) if support is None else support
    # One value has variance 0, which says nothing about others. A batch with an infinity or a NaN would spoil the state
    # for all batches that follow.
    enough = (valid >= 2) & jnp.isfinite(mean) & jnp.isfinite(var)
    if unbiased_var:
        # With weights such as (1, 1e-8) one value has nearly all the weight, and the divisor rounds to 0.
        divisor = weight - mean_weight
        enough &= divisor > 0
        var = var * jnp.where(enough, weight / jnp.where(enough, divisor, 1), 1)
    mean = average(state.mean, mean, rates)
    if std_epsilon is None:
        var = average(state.var, var, rates)
    else:
        dtype = wider(state.var.dtype, var.dtype)
        old, new = (jnp.sqrt(v.real.astype(dtype) + std_epsilon) for v in (state.var, var))
        std = average(old, new, rates)
        var = jnp.maximum(std * std - std_epsilon, 0)
    absorbed = jnp.any(enough, tuple(range(state.count.ndim, enough.ndim)))
    return BNState(
        select(enough, mean.astype(state.mean.dtype), state.mean),
        select(enough, var.astype(state.var.dtype), state.var),
        # A count at its largest value stays there, because one more would overflow to a negative number.
        state.count + (absorbed & (state.count < jnp.iinfo(state.count.dtype).max)).astype(state.count.dtype),
    )


def average(old: Array, new: Array, rates: tuple[Any, Any]) -> Array:
    """The average of an old and a new value by rates that add up to 1, in the wider dtype of the two."""
    dtype = wider(old.dtype, new.dtype)
    keep, take = (jnp.asarray(rate).astype(dtype) for rate in rates)
    excess = (keep - 1) + take  # both are rounded: without this a constant would drift by excess / take
    return keep * old.astype(dtype) + (take * new.astype(dtype) - excess * old.astype(dtype))
