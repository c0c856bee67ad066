"""Ghost batch normalization: each group of examples is normalized by its own statistics.

Hoffer, Hubara & Soudry (2017), algorithm 1. Formula, moments, masks, devices and derivatives are those of `bn_apply`;
in evaluation it is `bn_apply`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.apply import (
    BNParams,
    BNState,
    Collected,
    absorbed,
    aligned,
    apply_canonical,
    canonical,
    joined,
    usable,
    widened,
)
from bnjax.core.array_moments import is_explicit
from bnjax.core.moments import merge_along, merge_over, supported_moments
from bnjax.core.normalize import normalize
from bnjax.core.schedules import Momentum


def ghost_bn_apply(
    params: BNParams,
    state: BNState | None,
    x: Array,
    train: bool,
    *,
    ghost_size: int,
    axis: checks.Axis = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased_var: bool = False,
) -> tuple[Array, BNState | None]:
    """Ghost batch normalization (Hoffer, Hubara & Soudry, 2017, algorithm 1): a large batch, the noise of small ones.

        y = scale * (x - mean_g) / sqrt(var_g + epsilon) + bias          for each group g of `ghost_size` examples

    Groups are contiguous along the first axis that is not a feature axis; the last one may be smaller. The running
    statistics absorb, once, the merged moments of all groups: those of the whole batch, but for the rounding of the
    groups' means.

    Args:
      ghost_size: examples in a group, > 0. With that of the batch or more it is `bn_apply`, of each device's own part
        where an axis is named.
      axis_name: mapped axis, or several, over which the running statistics are merged; the groups stay on their device.
      params, state, x, train and the rest: as in `bnjax.bn_apply`.

    Returns:
      y and the state, as `bnjax.bn_apply` does. A group is read once, around the mean of its first sixteenth, and that
      part twice; under a mask it is read twice. A group without a valid value of a feature is normalized by the running
      statistics. Under sharded jit a group that lies on one device needs no communication for its normalization.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for a `ghost_size` that is not a positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.bn_init(1)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> y, state = bnjax.ghost_bn_apply(params, state, x, train=True, ghost_size=2, momentum=0.0)
      >>> y[:, 0].round(3).tolist(), state.mean.tolist()
      ([-1.0, 1.0, -1.0, 1.0], [11.0])
    """
    return ghost_bn_collect(
        params,
        state,
        x,
        train,
        ghost_size=ghost_size,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        collect=False,
    )[:2]


def ghost_bn_collect(
    params, state, x, train, *, ghost_size, mask, earlier=None, call="ghost_bn_apply", **options
) -> Any:
    """`ghost_bn_apply`, and what `bn_collect` collects."""
    checks.positive_integer(call, "ghost_size", ghost_size)
    options, rate = canonical(call, train, state, **options)
    return _ghost_bn_apply(params, state, x, mask, rate, earlier, size=int(ghost_size), options=options)


@partial(jax.jit, static_argnames=("size", "options"), inline=True)
def _ghost_bn_apply(params, state, x, mask, rate, earlier, *, size, options):
    features, wide, mask = widened(params, state, x, mask, options)
    batch_axis = next((a for a in range(x.ndim) if a not in features), None)
    number = 0 if batch_axis is None else x.shape[batch_axis]
    # Over a named axis even a group of all that is here has statistics of its own.
    known = isinstance(number, int)
    alone = known and (number == 0 or (size >= number and not options.names))
    if batch_axis is None or alone or not (options.train or state is None):
        return apply_canonical(params, state, x, mask, rate, earlier, options=options)
    if known:
        size = min(size, number)
    elif number % size != 0:
        raise ValueError(
            f"{options.call}(x=...): the batch is the symbolic dimension {number}, which is not known to be a multiple "
            f'of ghost_size={size}. Export with a batch such as "{size}*g", or with a number.'
        )
    whole = number - number % size
    shards = _shards(x, batch_axis)
    if known and shards > 1 and (number % size or number // size % shards):
        raise ValueError(
            f"{options.call}(x=...): the batch of {number} is explicitly sharded over {shards} devices, which do not "
            f"hold groups of ghost_size={size} as a whole. Pass a ghost_size that divides {number // shards}, or "
            "reshard x so that each device holds the whole axis."
        )
    y, batch = _grouped(params, state, wide, mask, features, batch_axis, slice(0, whole), size, x.dtype, options)
    if known and whole < number:
        rest = slice(whole, number), number - whole, x.dtype
        y_rest, batch_rest = _grouped(params, state, wide, mask, features, batch_axis, *rest, options)
        y, batch = lax.concatenate([y, y_rest], batch_axis), joined(batch, batch_rest)
    support = None if mask is None or mask.dtype == bool else batch.support
    batch = Collected(*merge_over(batch.moments, support, options.names, options.groups))
    state, collected = absorbed(state, batch, earlier, rate, options)
    return y.astype(options.dtype or x.dtype), state, collected


def _shards(x, axis):
    """Among how many devices an axis is divided by explicit sharding."""
    if not is_explicit(x):
        return 1
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    return math.prod(sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names))


def _grouped(params, state, x, mask, features, batch_axis, part, size, dtype, options):
    """A part of the batch in groups of one size: normalized, and the moments of all groups together."""

    def grouped(v) -> Any:  # of x's rank
        if v is None or v.shape[batch_axis] == 1:
            return v if v is None else jnp.expand_dims(v, batch_axis)
        v = v[(slice(None),) * batch_axis + (part,)]
        return v.reshape(*v.shape[:batch_axis], v.shape[batch_axis] // size, size, *v.shape[batch_axis + 1 :])

    mask, scale, bias = (grouped(v) for v in (mask, *(aligned(v, x, features) for v in params)))
    groups = grouped(x)
    # A group is one more feature axis, before the axis of its examples.
    position = sum(a < batch_axis for a in features)
    features = (*features[:position], batch_axis, *(a + 1 for a in features[position:]))
    batch = Collected(*supported_moments(groups, mask, features, (), None, dtype=dtype, divided=False))
    if state is not None:
        running = (jnp.expand_dims(v, position) for v in state)
        state = BNState(*(jnp.broadcast_to(v, batch.moments.weight.shape) for v in running))
    mean, var = (aligned(v, groups, features) for v in usable(batch.moments, state, x, mask))
    y = normalize(groups, mean, var, scale, bias, mask, options.epsilon, options.dtype or dtype)
    shape = (*x.shape[:batch_axis], part.stop - part.start, *x.shape[batch_axis + 1 :])
    return y.reshape(shape), Collected(*merge_along(*batch, position))
