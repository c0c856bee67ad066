"""Numbers that may be functions of the number of updates, like an optax schedule: the momentum, and bounds."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from bnjax.core import checks

Momentum = float | Array | Callable[[Array], Array]


def cumulative_average(count: Array) -> Array:
    """Momentum that weighs every batch alike: the running statistics are the plain mean over all updates.

        momentum = count / (count + 1)

    This is PyTorch's `momentum=None`. A weight that rounds to 1 is the largest number below 1 instead, so that in
    float32 the average becomes an exponential one after 2^24 updates.

    Args:
      count: number of updates so far, as in `BNState.count`.

    Returns:
      The weight of the old value, floating, of count's shape.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.cumulative_average(jnp.array([0, 1, 3])).tolist()
      [0.0, 0.5, 0.75]
    """
    # As 1 - 1 / (count + 1), because count + 1 is count in float32 from 2^24 on. float64 is used where it is enabled.
    momentum = 1 - 1 / (jnp.asarray(count).astype(float) + 1)
    return jnp.minimum(momentum, 1 - jnp.finfo(momentum.dtype).epsneg)


@dataclass(frozen=True)
class debiased:  # noqa: N801  a function with one parameter bound, which hashes and compares by value
    """Momentum of an exponential average that forgets its initial value (Kingma & Ba, 2015, section 3).

        momentum_t = momentum (1 - momentum^t) / (1 - momentum^(t + 1)),    t = count

    After t updates the running value is the average of the batches with weights proportional to momentum^age, because
    the first update replaces the initial 0 and 1. With momentum = 1 it is `cumulative_average`.

    Args:
      momentum: the limit of the weight of the old value for many updates, in [0, 1].

    Raises:
      TypeError, ValueError: for a momentum that is no number in [0, 1], or known only at run time.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.debiased(0.9)(jnp.array([0, 1, 1000])).round(4).tolist()
      [0.0, 0.473..., 0.899...]
    """

    momentum: float

    def __post_init__(self) -> None:
        value = self.momentum
        if isinstance(value, Tracer):
            raise TypeError(
                "debiased(momentum=...): expected a Python number, got an array of a jitted function. Make the "
                "schedule outside of it, or pass your own function of state.count."
            )
        value = value.item() if isinstance(value, Array) else value
        object.__setattr__(self, "momentum", checks.momentum("debiased", value)[0])

    def __call__(self, count: Array) -> Array:
        if self.momentum in (0, 1):
            return self.momentum * cumulative_average(count)
        # 1 - momentum^t as -expm1(t log momentum): no digit is lost where momentum is near 1.
        count = jnp.asarray(count).astype(float)
        return self.momentum * jnp.expm1(count * log(self.momentum)) / jnp.expm1((count + 1) * log(self.momentum))


@dataclass(frozen=True)
class linear_ramp:  # noqa: N801  a function with its parameters bound, which hashes and compares by value
    """A number that is constant, then rises linearly with the count of updates, then is constant again.

        value = low + (high - low) clip((count - start) / (stop - start), 0, 1)

    With start = stop it is a step: `low` before this count, `high` from it on.

    Args:
      low, high: the first and the last value.
      start, stop: the counts of updates between which the value rises; start <= stop.

    Raises:
      ValueError: if start > stop.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.RENORM_R_MAX(jnp.array([0, 5_000, 22_500, 40_000, 50_000])).tolist()
      [1.0, 1.0, 2.0, 3.0, 3.0]
      >>> bnjax.linear_ramp(1.0, 3.0, 40, 40)(jnp.array([39, 40])).tolist()
      [1.0, 3.0]
    """

    low: float
    high: float
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not self.start <= self.stop:
            raise ValueError(
                f"linear_ramp(start={self.start}, stop={self.stop}): expected start <= stop. Pass the counts in order."
            )

    def __call__(self, count: Array) -> Array:
        count = jnp.asarray(count)
        if jnp.issubdtype(count.dtype, jnp.integer):
            count = count.astype(int)
        since = (count - self.start).astype(float)  # from 2^24 on float32 would round the count itself
        if self.start == self.stop:  # the quotient would be 0 / 0
            return jnp.where(since < 0, self.low, self.high).astype(since.dtype)
        rise = jnp.clip(since / (self.stop - self.start), 0, 1)
        return self.low + (self.high - self.low) * rise


def at_count(call: str, name: str, value: Any, state: Any, train: bool, unused: float) -> Any:
    """The option `name`, a number or a function of the count of updates, as a number for this call.

    In evaluation, where no count is asked, a function gives the number `unused`.
    A function is called here, where it is passed, and not where the compiled function is traced: a compiled function
    would keep the value that a function had when it was first seen.
    """
    if not callable(value):
        return value
    if isinstance(value, type):
        raise TypeError(
            f"{call}({name}={value.__name__}): expected a number or a function of state.count, got the class itself. "
            f"Call it with its arguments: {name}={_EXAMPLES.get(value, value.__name__ + '(...)')}."
        )
    if not train or not hasattr(state, "count"):
        return unused
    number = value(jnp.asarray(state.count))
    if callable(number):
        raise TypeError(
            f"{call}({name}={value!r}): of state.count it returned another function, {number!r}. Pass that function: "
            "what makes a schedule has to be called with its options first."
        )
    return number


_EXAMPLES = {debiased: "bnjax.debiased(0.99)", linear_ramp: "bnjax.linear_ramp(1.0, 3.0, 5_000, 40_000)"}
