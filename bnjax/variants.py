"""Variants of batch normalization for its known limits, each a pure function with the call of `bn_apply`.

    ghost            each group of examples by its own statistics      Hoffer, Hubara & Soudry (2017), algorithm 1
    renormalized     the batch's, corrected towards the running ones   Ioffe (2017), algorithm 1
    indexed          running statistics for each of several indices    Cooijmans et al. (2017), section 3

They choose statistics and what the running ones absorb; formula, moments, masks, devices and derivatives are those of
`bn_apply`. In evaluation all of them are `bn_apply`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax import checks
from bnjax.array_moments import is_explicit, sharded_as
from bnjax.functional import (
    BNParams,
    BNState,
    Collected,
    absorbed,
    aligned,
    apply_canonical,
    batch_collected,
    canonical,
    joined,
    static_schedule,
    usable,
    widened,
)
from bnjax.indexed import conditional_params as conditional_params
from bnjax.indexed import indexed_bn_apply as indexed_bn_apply
from bnjax.indexed import indexed_bn_init as indexed_bn_init
from bnjax.moments import merge_along, merge_over, supported_moments
from bnjax.momentum import Momentum
from bnjax.normalize import normalize

Limit = float | Array | Callable[[Array], Array]


@dataclass(frozen=True)
class ramp:  # noqa: N801  a function with its parameters bound, which hashes and compares by value
    """A number that stays, then rises linearly with the count of updates, then stays again.

    Args:
      low, high: its values at first and at last.
      start, stop: the counts between which it rises.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.RENORM_R_MAX(jnp.array([0, 5_000, 22_500, 40_000, 50_000])).tolist()
      [1.0, 1.0, 2.0, 3.0, 3.0]
    """

    low: float
    high: float
    start: int
    stop: int

    def __post_init__(self):
        if not self.start < self.stop:
            raise ValueError(f"ramp(start={self.start}, stop={self.stop}): expected start < stop.")

    def __call__(self, count: Array) -> Array:
        rise = jnp.clip((jnp.asarray(count).astype(float) - self.start) / (self.stop - self.start), 0, 1)
        return self.low + (self.high - self.low) * rise


# The schedule of Ioffe (2017, section 4): batch normalization for 5000 steps, then more and more correction.
RENORM_R_MAX = ramp(1.0, 3.0, 5_000, 40_000)
RENORM_D_MAX = ramp(0.0, 5.0, 5_000, 25_000)
# What the bounds of renormalization are at least: those of batch normalization.
LEAST = {"r_max": 1, "d_max": 0}


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


def renorm_bn_apply(
    params: BNParams,
    state: BNState,
    x: Array,
    train: bool,
    *,
    r_max: Limit,
    d_max: Limit,
    axis: checks.Axis = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased_var: bool = False,
) -> tuple[Array, BNState]:
    """Batch renormalization (Ioffe, 2017, algorithm 1): for small batches and batches that are not independent.

        std = sqrt(var + epsilon)                         of the batch, and likewise of the running statistics
        r = clip(std / running std, 1 / r_max, r_max)     d = clip((mean - running mean) / running std, -d_max, d_max)
        y = scale * ((x - mean) / std * r + d) + bias

    with r and d constants to the gradient. Unclipped, y is what evaluation gives. The running mean and the running
    STANDARD DEVIATION are averaged: the state keeps var = max(running std^2 - epsilon, 0), so that a variance far below
    epsilon is rounded as epsilon is. In evaluation it is `bn_apply`.

    Args:
      r_max: bound of r, >= 1; 1 is batch normalization. A number, or a function of `state.count`. What only run time
        knows is 1 at least.
      d_max: bound of d, >= 0; likewise, 0 at least. `bnjax.RENORM_R_MAX` and `bnjax.RENORM_D_MAX` are the paper's
        schedule.
      state: running statistics; None is an error, since there would be nothing to correct towards.
      params, x, train and the rest: as in `bnjax.bn_apply`; `x` is real.

    Returns:
      y and the state, as `bnjax.bn_apply` does.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for a state that is None, complex `x`, r_max < 1 or d_max < 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.bn_init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, state = bnjax.renorm_bn_apply(params, state, x, train=True, r_max=3.0, d_max=0.5)
      >>> y[:, 0].round(3).tolist()  # d = 2 is clipped to 0.5
      [-0.5, 1.5...]
    """
    return renorm_bn_collect(
        params,
        state,
        x,
        train,
        r_max=r_max,
        d_max=d_max,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        collect=False,
    )[:2]


def renorm_bn_collect(
    params, state, x, train, *, r_max, d_max, mask, earlier=None, call="renorm_bn_apply", **options
) -> Any:
    """`renorm_bn_apply`, and what `bn_collect` collects."""
    if state is None:
        raise ValueError(f"{call}(state=None): there is nothing to correct towards. Pass the state of bn_init.")
    options, rate = canonical(call, train, state, **options)
    schedules, limits = zip(*(static_schedule(limit, state, train) for limit in (r_max, d_max)), strict=True)
    numbers = tuple(
        None if callable(limit) else _checked_limit(call, name, limit, least)
        for (name, least), limit in zip(LEAST.items(), limits, strict=True)
    )
    return _renorm_bn_apply(params, state, x, mask, rate, earlier, numbers, schedules=schedules, options=options)


@partial(jax.jit, static_argnames=("schedules", "options"), inline=True)
def _renorm_bn_apply(params, state, x, mask, rate, earlier, limits, *, schedules, options):
    if not options.train:
        return apply_canonical(params, state, x, mask, rate, earlier, options=options)
    features, wide, mask = widened(params, state, x, mask, options)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{options.call}(x=...): x is {x.dtype}, but d is clipped to an interval. Pass a real x.")
    batch = batch_collected(wide, mask, features, state, x.dtype, options)
    mean, var = usable(batch.moments, state, x, mask)
    running = jax.tree.map(lambda v: sharded_as(var, v), state)
    running_std, std = (jnp.sqrt(v.astype(var.dtype) + options.epsilon) for v in (running.var, var))
    r_max, d_max = (
        _limit(options.call, name, least, limit if schedule is None else schedule(running.count), std)
        for (name, least), limit, schedule in zip(LEAST.items(), limits, schedules, strict=True)
    )
    r = lax.stop_gradient(jnp.clip(std / running_std, 1 / r_max, r_max))
    d = lax.stop_gradient(jnp.clip((mean - running.mean.astype(mean.dtype)) / running_std, -d_max, d_max))
    # scale * (xhat * r + d) + bias is the formula with another scale and bias.
    mean, var, r, d, scale, bias = (aligned(v, x, features) for v in (mean, var, r, d, *params))
    scale, shift = (r, d) if scale is None else (scale.astype(r.dtype) * r, scale.astype(r.dtype) * d)
    bias = shift if bias is None else bias.astype(d.dtype) + shift
    dtype = options.dtype or x.dtype
    y = normalize(wide, mean, var, scale, bias, mask, options.epsilon, dtype)
    state, collected = absorbed(state, batch, earlier, rate, options, std_epsilon=options.epsilon)
    return y.astype(dtype), state, collected


def _limit(call, name, least, value, std) -> Any:
    """A bound, known or not, as an array with a number for all features or one for each."""
    value = jnp.asarray(_checked_limit(call, name, value, least)).astype(std.dtype)
    if value.shape not in ((), std.shape):
        raise ValueError(
            f"{call}({name}=...): expected a number, or one for each feature of shape {std.shape}, got shape "
            f"{value.shape}."
        )
    return jnp.maximum(value, least)


def _checked_limit(call, name, limit, least):
    if isinstance(limit, np.ndarray):
        limit = jnp.asarray(limit) if limit.ndim else limit.item()
    numbers = checks.known(limit) if isinstance(limit, Array) else limit
    if numbers is None:
        return limit
    number = isinstance(limit, Array | int | float | np.number) and not isinstance(limit, bool)
    if not number or not np.all(numbers >= least):
        raise ValueError(
            f"{call}({name}={limit!r}): expected a number of {least} or more, or a function of state.count. "
            f"{name}={least} is batch normalization."
        )
    return limit if isinstance(limit, Array) else float(limit)
