"""Running statistics: what the state absorbs from the moments of a batch.

running = momentum * running + (1 - momentum) * batch          for mean and var
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.moments import merge_together, wider
from bnjax.core.options import Options
from bnjax.core.records import BNState, Collected
from bnjax.core.schedules import at_count, cumulative_average, debiased
from bnjax.core.sharding import select, sharded_as


def momentum_argument(call: str, momentum: Any, state: Any, train: bool) -> tuple[Any, Any]:
    """The weights of the old value and of the new one, numbers that are arguments of a compiled function."""
    ours = debiased(1.0) if momentum is cumulative_average else momentum
    if isinstance(ours, debiased):
        return at_count(call, "momentum", ours.weights, state, train, unused=(1.0, 0.0))
    return checks.momentum(call, at_count(call, "momentum", momentum, state, train, unused=1.0))


@jax.named_scope("bnjax.running")
def update(
    state: BNState | None,
    batch: Collected,
    earlier: Collected | None,
    weights: tuple[Any, Any],
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
        checks.rate(options.call, weights, state.mean)
        state = absorb(state, batch, weights, options.unbiased_var, std_epsilon)
    return state, batch if options.collect else None


def absorb(
    state: BNState, batch: Collected, weights: tuple[Any, Any], unbiased_var: bool, std_epsilon: float | None = None
) -> BNState:
    """`state` after one update, in its own dtypes. A feature without enough information stays as it is.

    Two valid values whose statistics are finite are enough. A count without axes of features is one count of the whole
    layer, as PyTorch's `num_batches_tracked` is, or of an index: it counts the updates that any feature absorbed.

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
    mean = average(state.mean, mean, weights)
    if std_epsilon is None:
        var = average(state.var, var, weights)
    else:
        dtype = wider(state.var.dtype, var.dtype)
        old, new = (jnp.sqrt(v.real.astype(dtype) + std_epsilon) for v in (state.var, var))
        std = average(old, new, weights)
        var = jnp.maximum(std * std - std_epsilon, 0)
    absorbed = jnp.any(enough, tuple(range(state.count.ndim, enough.ndim)))
    return BNState(
        select(enough, mean.astype(state.mean.dtype), state.mean),
        select(enough, var.astype(state.var.dtype), state.var),
        state.count + (absorbed & (state.count < jnp.iinfo(state.count.dtype).max)).astype(state.count.dtype),
    )


def average(old: Array, new: Array, weights: tuple[Any, Any]) -> Array:
    """The average of an old and a new value, whose weights add up to 1, in the wider dtype of the two."""
    dtype = wider(old.dtype, new.dtype)
    keep, take = (jnp.asarray(w).astype(dtype) for w in weights)
    excess = (keep - 1) + take  # both are rounded: without this a constant would drift by excess / take
    return keep * old.astype(dtype) + (take * new.astype(dtype) - excess * old.astype(dtype))
