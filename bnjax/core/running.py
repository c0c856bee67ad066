"""Running statistics: what the state absorbs from the moments of a batch.

running = momentum * running + (1 - momentum) * batch          for mean and var
"""

from typing import Any

import jax
import jax.numpy as jnp

from bnjax.core import checks
from bnjax.core.moments import merge_together, wider
from bnjax.core.options import Options
from bnjax.core.records import BNState, Collected
from bnjax.core.schedules import cumulative_average, debiased, scheduled
from bnjax.core.sharding import select, sharded_as


def momentum_argument(call: str, momentum: Any, state: Any, train: bool) -> tuple[Any, Any]:
    """The weights of the old value and of the new one, at the count of the state, for a compiled function."""
    ours = debiased(1.0) if momentum is cumulative_average else momentum
    if isinstance(ours, debiased):
        return scheduled(call, "momentum", ours.weights, state, train, (0.0, 1.0))
    return checks.momentum(call, scheduled(call, "momentum", momentum, state, train, 0.0))


def update(
    state: BNState | None,
    batch: Collected,
    earlier: Collected | None,
    momentum: tuple[Any, Any],
    options: Options,
    std_epsilon: float | None = None,
) -> tuple[BNState | None, Collected | None]:
    """The state after an update by a batch, and the collected moments if `options` ask for them.

    Moments of `earlier` parts of one larger batch are merged with the moments of this part. The state absorbs the
    merged moments, which are also the ones collected.
    """
    if earlier is not None:
        batch = merge_together(earlier, batch)
    if state is not None:
        checks.rate(options.call, momentum, state.count)
        state = absorb(state, batch, momentum, options.unbiased_var, std_epsilon)
    return state, batch if options.collect else None


def absorb(
    state: BNState, batch: Collected, weights: tuple[Any, Any], unbiased_var: bool, std_epsilon: float | None = None
) -> BNState:
    """`state` after one update, in its own dtypes. A feature without enough information stays as it is.

    Two valid values whose statistics are finite are enough.

    Args:
      state: the running statistics.
      batch: the moments of the batch and their support.
      weights: of the old value and of the new one; they add up to 1.
      unbiased_var: whether the variance is divided by n - sum(w^2) / n in place of n.
      std_epsilon: None averages the variances; a number averages the standard deviations sqrt(var + std_epsilon).
    """
    (weight, mean, var), support = jax.tree.map(lambda v: sharded_as(state.mean, v), batch)
    enough = support.valid >= 2
    if unbiased_var:
        divisor = weight - support.mean_weight
        enough &= divisor > 0
        var = var * jnp.where(enough, weight / jnp.where(enough, divisor, 1), 1)
    enough &= jnp.isfinite(mean) & jnp.isfinite(var)
    mean = _average(state.mean, mean, weights)
    if std_epsilon is None:
        var = _average(state.var, var, weights)
    else:
        dtype = wider(state.var.dtype, var.dtype)
        old, new = (jnp.sqrt(v.real.astype(dtype) + std_epsilon) for v in (state.var, var))
        std = _average(old, new, weights)
        var = jnp.maximum(std * std - std_epsilon, 0)
    return BNState(
        select(enough, mean.astype(state.mean.dtype), state.mean),
        select(enough, var.astype(state.var.dtype), state.var),
        state.count + (enough & (state.count < _largest(state.count.dtype))).astype(state.count.dtype),
    )


def _largest(dtype):
    """The count that stays as it is: one more would be a negative number, and a schedule would start again."""
    return jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.inf


def _average(old, new, weights):
    dtype = wider(old.dtype, new.dtype)
    keep, take = (jnp.asarray(w).astype(dtype) for w in weights)
    excess = (keep - 1) + take  # both are rounded: without this a constant would drift by excess / take
    return keep * old.astype(dtype) + (take * new.astype(dtype) - excess * old.astype(dtype))
