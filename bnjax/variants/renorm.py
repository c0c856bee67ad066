"""Batch renormalization: the batch's statistics, corrected towards the running statistics.

Ioffe (2017), algorithm 1. Everything else is as in `bn_apply`, which it equals in evaluation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.apply import aligned, batch_statistics, choose_statistics, compiled_apply, normalize_by, validate
from bnjax.core.options import Options, checked, fitted
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.running import momentum_argument, update
from bnjax.core.schedules import Momentum, at_count, linear_ramp
from bnjax.core.sharding import sharded_as

Limit = float | Array | Callable[[Array], Array]

RENORM_R_MAX = linear_ramp(1.0, 3.0, 5_000, 40_000)
"""The schedule of `r_max` of Ioffe (2017, section 4): 1, which is batch normalization, for 5000 updates; then to 3."""
RENORM_D_MAX = linear_ramp(0.0, 5.0, 5_000, 25_000)
"""The schedule of `d_max` of Ioffe (2017, section 4): 0, which is batch normalization, for 5000 updates; then to 5."""
# The least bounds of renormalization, which make it batch normalization.
LEAST = {"r_max": 1, "d_max": 0}


def renorm_bn_apply(
    params: BNParams,
    state: BNState,
    x: Array,
    train: bool,
    *,
    r_max: Limit,
    d_max: Limit,
    average: str = "std",
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

    where r and d are constants to the gradient. Where nothing is clipped, y is the output of evaluation, in which the
    function is `bn_apply`. The running mean is averaged as there. Of the running variance the paper averages the
    STANDARD DEVIATION (`average="std"`): the state holds var = max(running std^2 - epsilon, 0), so that a variance far
    below epsilon has the rounding error of epsilon. Other implementations average the variance itself, as `bn_apply`
    does (`average="var"`).

    Args:
      r_max: bound of r, >= 1; with 1 and d_max = 0 the function is batch normalization. A number, or a function of
        `state.count`. A value that is known only at run time is raised to 1.
      d_max: bound of d, >= 0, likewise; a value known only at run time is raised to 0. `bnjax.RENORM_R_MAX` and
        `bnjax.RENORM_D_MAX` are the paper's schedule.
      average: what the running variance is an average of: "std", as in the paper, or "var".
      state: running statistics. None is an error, because there would be nothing to correct towards.
      params, x, train and the rest: as in `bnjax.bn_apply`; `x` is real.

    Returns:
      y and the state, as from `bnjax.bn_apply`.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for a state that is None, complex `x`, r_max < 1, d_max < 0 or
        another `average`.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.bn_init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, state = bnjax.renorm_bn_apply(params, state, x, train=True, r_max=3.0, d_max=0.5)
      >>> y[:, 0].round(3).tolist()  # d = 2 is clipped to 0.5
      [-0.5, 1.5...]
    """
    options = checked(
        "renorm_bn_apply",
        train,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
    )
    return apply_renorm(
        params, state, x, options, momentum=momentum, mask=mask, r_max=r_max, d_max=d_max, average=average
    )[:2]


def apply_renorm(
    params: Any,
    state: BNState | None,
    x: Array,
    options: Options,
    *,
    momentum: Any,
    mask: Array | None,
    r_max: Limit,
    d_max: Limit,
    average: str,
    earlier: Collected | None = None,
) -> tuple[Array, Any, Collected | None]:
    """`renorm_bn_apply` with checked options, as `bnjax.core.apply.apply` is `bn_apply`."""
    call = options.call
    if state is None:
        raise ValueError(f"{call}(state=None): there is nothing to correct towards. Pass the state of bn_init.")
    check_average(call, average)
    options = fitted(options, x, mask)
    momentum = momentum_argument(call, momentum, state, options.train)
    limits = {}
    for name, limit in ("r_max", r_max), ("d_max", d_max):
        number = at_count(call, name, limit, state, options.train, unused=LEAST[name])
        limits[name] = _checked_limit(call, name, number, clamped=isinstance(limit, linear_ramp))
    return _apply_renorm(params, state, x, mask, momentum, earlier, limits, average=average, options=options)


@partial(jax.jit, static_argnames=("average", "options"), inline=True)
def _apply_renorm(params, state, x, mask, momentum, earlier, limits, *, average, options):
    if not options.train:
        return compiled_apply(params, state, x, mask, momentum, earlier, options=options)
    batch = validate(params, state, x, mask, options)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{options.call}(x=...): x is {x.dtype}, but d is clipped to an interval. Pass a real x.")
    statistics = batch_statistics(batch, state, options)
    mean, var = choose_statistics(statistics.moments, state, batch)
    running_mean, running_var = (sharded_as(var, v) for v in (state.mean, state.var))
    running_std, std = (jnp.sqrt(v.astype(var.dtype) + options.epsilon) for v in (running_var, var))
    r_max, d_max = (_limit(options.call, name, limits[name], std) for name in ("r_max", "d_max"))
    r = lax.stop_gradient(jnp.clip(std / running_std, 1 / r_max, r_max))
    d = lax.stop_gradient(jnp.clip((mean - running_mean.astype(mean.dtype)) / running_std, -d_max, d_max))
    # scale * (xhat * r + d) + bias is the formula with another scale and bias.
    r, d, scale, bias = (aligned(v, batch.x, batch.features) for v in (r, d, *params))
    scale, shift = (r, d) if scale is None else (scale.astype(r.dtype) * r, scale.astype(r.dtype) * d)
    bias = shift if bias is None else bias.astype(d.dtype) + shift
    y = normalize_by(mean, var, scale, bias, batch, options)
    std_epsilon = options.epsilon if average == "std" else None
    state, collected = update(state, statistics, earlier, momentum, options, std_epsilon)
    return y, state, collected


def check_average(call: str, average: Any) -> None:
    """Check that `average` names what the running variance averages."""
    if not isinstance(average, str) or average not in ("std", "var"):
        raise ValueError(
            f'{call}(average={average!r}): expected "std", which averages standard deviations as in the paper, or '
            '"var", which averages variances.'
        )


def _limit(call, name, limit, std) -> Any:
    """A bound, known or not, as an array with a number for all features or one for each."""
    value = jnp.asarray(limit).astype(std.dtype)
    if value.shape not in ((), std.shape):
        raise ValueError(
            f"{call}({name}=...): expected a number, or one for each feature of shape {std.shape}, got shape "
            f"{value.shape}."
        )
    return jnp.maximum(sharded_as(std, value) if value.ndim else value, LEAST[name])


def _checked_limit(call, name, limit, clamped):
    least = LEAST[name]
    if isinstance(limit, np.ndarray):
        limit = jnp.asarray(limit) if limit.ndim else limit.item()
    numbers = limit
    if isinstance(limit, Array):
        numbers = None if clamped else checks.known(limit)
        if numbers is None:
            return limit
    number = isinstance(limit, Array | int | float | np.number) and not isinstance(limit, bool)
    if not number or not np.all(numbers >= least):
        raise ValueError(
            f"{call}({name}={limit!r}): expected a number of {least} or more, or a function of state.count. "
            f"{name}={least} is batch normalization."
        )
    return limit if isinstance(limit, Array) else float(limit)
