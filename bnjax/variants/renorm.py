"""Batch renormalization: the batch's statistics, corrected towards the running statistics.

Ioffe (2017), algorithm 1. Everything else is as in `bn_apply`, which it equals in evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.layer import BatchNorm, aligned, known_or_running
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.schedules import Momentum, at_count, check_no_class, linear_ramp
from bnjax.core.sharding import sharded_as

Limit = float | Array | Callable[[Array], Array]

RENORM_R_MAX = linear_ramp(1.0, 3.0, 5_000, 40_000)
"""The schedule of `r_max` of Ioffe (2017, section 4): 1, which is batch normalization, for 5000 updates; then to 3."""
RENORM_D_MAX = linear_ramp(0.0, 5.0, 5_000, 25_000)
"""The schedule of `d_max` of Ioffe (2017, section 4): 0, which is batch normalization, for 5000 updates; then to 5."""
# The smallest bounds, with which batch renormalization is batch normalization.
LEAST = {"r_max": 1, "d_max": 0}


@dataclass(frozen=True, kw_only=True)
class RenormBatchNorm(BatchNorm):
    """Batch renormalization as a value: `bnjax.BatchNorm` that trains like `bnjax.renorm_bn_apply`.

    Args:
      r_max, d_max: bounds of the correction, numbers or functions of the number of updates; by default the paper's
        schedule.
      average: "std" averages standard deviations, as in the paper, and "var" variances.
      axis, momentum, ...: as in `bnjax.BatchNorm`.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> norm = bnjax.RenormBatchNorm(r_max=3.0, d_max=0.5)
      >>> params, state = norm.init(1)
      >>> y, state = norm.apply(params, state, jnp.array([[1.0], [3.0]]), train=True)
      >>> y[:, 0].round(3).tolist()  # d = 2 is clipped to 0.5
      [-0.5, 1.5...]
    """

    r_max: Limit = RENORM_R_MAX
    d_max: Limit = RENORM_D_MAX
    average: str = "std"  # pyright: ignore[reportIncompatibleVariableOverride]  an option here

    numeric: ClassVar[tuple[str, ...]] = ("momentum", "r_max", "d_max")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.average, str) or self.average not in ("std", "var"):
            raise ValueError(
                f'{self.call}(average={self.average!r}): expected "std", which averages standard deviations as in the '
                'paper, or "var", which averages variances.'
            )
        for name in LEAST:
            limit = getattr(self, name)
            check_no_class(self.call, name, limit)
            if not callable(limit):
                self._set(**{name: _checked_limit(self.call, name, limit)})

    def numbers(self, state: Any, train: bool) -> dict[str, Any]:
        if state is None:
            raise ValueError(
                f"{self.call}(state=None): there is nothing to correct towards. Pass the state of bn_init."
            )
        numbers = super().numbers(state, train)
        for name, least in LEAST.items():
            limit = at_count(self.call, name, getattr(self, name), state, train, unused=least)
            ours = isinstance(getattr(self, name), linear_ramp)
            numbers[name] = limit if ours else _checked_limit(self.call, name, limit)
        return numbers

    def train(
        self, params: Any, state: Any, x: Array, mask: Array | None, numbers: Any, stored: Any
    ) -> tuple[Array, Collected]:
        if jnp.iscomplexobj(x):
            raise TypeError(f"{self.call}(x=...): x is {x.dtype}, but d is clipped to an interval. Pass a real x.")
        batch = self.batch_moments(state, x, mask, stored)
        mean, var = known_or_running(batch.moments, state, x, mask)
        running_mean, running_var = (sharded_as(var, v) for v in (state.mean, state.var))
        running_std, std = (jnp.sqrt(v.astype(var.dtype) + self.epsilon) for v in (running_var, var))
        r_max, d_max = (_at_least(self.call, name, numbers[name], std) for name in LEAST)
        r = lax.stop_gradient(jnp.clip(std / running_std, 1 / r_max, r_max))
        d = lax.stop_gradient(jnp.clip((mean - running_mean.astype(mean.dtype)) / running_std, -d_max, d_max))
        # scale * (xhat * r + d) + bias is the formula with another scale and bias.
        r, d, scale, bias = (aligned(v, x, self.features) for v in (r, d, *params))
        scale, shift = (r, d) if scale is None else (scale.astype(r.dtype) * r, scale.astype(r.dtype) * d)
        bias = shift if bias is None else bias.astype(d.dtype) + shift
        return self.normalized(x, mean, var, BNParams(scale, bias), mask), batch


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

    where r and d are treated as constants when differentiating. Where nothing is clipped, y is the output of
    evaluation, in which the function is `bn_apply`. The running mean is averaged as in `bn_apply`. Instead of the
    running variance, the paper averages the running STANDARD DEVIATION (`average="std"`): the state holds var =
    max(running std^2 - epsilon, 0), so that a variance far below epsilon has the rounding error of epsilon. Other
    implementations average the variance itself, as `bn_apply` does (`average="var"`).

    Args:
      r_max: bound of r, >= 1, a number or a function of `state.count`. With 1 and d_max = 0 the function is batch
        normalization. A value that is known only at run time is raised to 1.
      d_max: bound of d, >= 0, likewise; a value known only at run time is raised to 0. `bnjax.RENORM_R_MAX` and
        `bnjax.RENORM_D_MAX` are the paper's schedule.
      average: what is averaged: "std", as in the paper, or "var".
      state: running statistics. None is an error, because there would be nothing to correct towards.
      params, x, train and the rest: as in `bnjax.bn_apply`; `x` is real.

    Returns:
      y and the state, as from `bnjax.bn_apply`.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for a state that is None, a complex `x`, r_max < 1, d_max < 0 or
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
    layer = RenormBatchNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        r_max=r_max,
        d_max=d_max,
        average=average,
        call="renorm_bn_apply",
    )
    return layer.apply(params, state, x, train, mask)


def _at_least(call, name, limit, std) -> Any:
    """A bound, known or not, as an array with one number for all features or one for each."""
    value = jnp.asarray(limit).astype(std.dtype)
    if value.shape not in ((), std.shape):
        raise ValueError(
            f"{call}({name}=...): expected a number, or one for each feature of shape {std.shape}, got shape "
            f"{value.shape}."
        )
    return jnp.maximum(sharded_as(std, value) if value.ndim else value, LEAST[name])


def _checked_limit(call, name, limit):
    """The bound, a float or an array, after a check of the numbers that are known."""
    least = LEAST[name]
    if isinstance(limit, np.ndarray):
        limit = jnp.asarray(limit) if limit.ndim else limit.item()
    numbers = limit
    if isinstance(limit, Array):
        numbers = checks.known(limit)
        if numbers is None:
            return limit
    number = isinstance(limit, Array | int | float | np.number) and not isinstance(limit, bool)
    if not number or not np.all(numbers >= least):
        raise ValueError(
            f"{call}({name}={limit!r}): expected a number of {least} or more, or a function of state.count. "
            f"{name}={least} is batch normalization."
        )
    return limit if isinstance(limit, Array) else float(limit)
