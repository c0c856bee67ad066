"""Batch renormalization: the batch's statistics, corrected towards the running ones.

Ioffe (2017), algorithm 1. Formula, moments, masks, devices and derivatives are those of `bn_apply`; in evaluation it is
`bn_apply`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.apply import (
    BNParams,
    BNState,
    absorbed,
    aligned,
    apply_canonical,
    batch_collected,
    canonical,
    static_schedule,
    usable,
    widened,
)
from bnjax.core.array_moments import sharded_as
from bnjax.core.normalize import normalize
from bnjax.core.schedules import Momentum, linear_ramp

Limit = float | Array | Callable[[Array], Array]

# The schedule of Ioffe (2017, section 4): batch normalization for 5000 steps, then more and more correction.
RENORM_R_MAX = linear_ramp(1.0, 3.0, 5_000, 40_000)
RENORM_D_MAX = linear_ramp(0.0, 5.0, 5_000, 25_000)
# What the bounds of renormalization are at least: those of batch normalization.
LEAST = {"r_max": 1, "d_max": 0}


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
