"""Numbers that may be functions of the number of updates, like an optax schedule: the momentum, and bounds."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.core import checks
from bnjax.core.jax_internals import is_traced

Momentum = float | Array | Callable[[Array], Array]


def cumulative_average(count: Array) -> Array:
    """Momentum that gives every batch the same weight: the running statistics are the plain mean over all updates.

        momentum = count / (count + 1)

    This is PyTorch's `momentum=None`. A weight that rounds to 1, as in float32 after 2^24 updates, is the largest
    number below 1 instead. The running statistics still absorb the new batch with its exact weight, 1 / (count + 1).

    Args:
      count: number of updates so far, as in `BNState.count`.

    Returns:
      The weight of the old value, floating, of count's shape.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.cumulative_average(jnp.array([0, 1, 3])).tolist()
      [0.0, 0.5, 0.75]
    """
    return debiased(1.0)(count)


@dataclass(frozen=True)
class debiased:  # noqa: N801  a function with one parameter bound, which hashes and compares by value
    """Momentum of an exponential average that forgets its initial value (Kingma & Ba, 2015, section 3).

        momentum_t = momentum (1 - momentum^t) / (1 - momentum^(t + 1)),    t = count

    After t updates the running value is the average of the batches with weights proportional to momentum^age, because
    the first update replaces the initial 0 and 1. With momentum = 1 it is `cumulative_average`.

    Args:
      momentum: the limit of the weight of the old value for many updates, in [0, 1].

    Raises:
      TypeError, ValueError: for a momentum that is not a number in [0, 1], or is known only at run time.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.debiased(0.9)(jnp.array([0, 1, 1000])).round(4).tolist()
      [0.0, 0.473..., 0.899...]
    """

    momentum: float

    def __post_init__(self) -> None:
        value = self.momentum
        if is_traced(value):
            raise TypeError(
                "debiased(momentum=...): expected a Python number, got an array of a jitted function. Make the "
                "schedule outside of it, or pass your own function of state.count."
            )
        value = value.item() if isinstance(value, Array) else value
        object.__setattr__(self, "momentum", checks.momentum("debiased", value))

    def __call__(self, count: Array) -> Array:
        return self.weights(count)[0]

    def weights(self, count: Array) -> tuple[Array, Array]:
        """The weight of the old value, and that of the new one, which a difference from 1 would round."""
        rate = log(self.momentum) if self.momentum else 0.0
        return _weights(jnp.asarray(count), rate, limit=self.momentum if self.momentum in (0, 1) else None)


# One program, so that an eager call dispatches once for its schedule.
@partial(jax.jit, static_argnames="limit", inline=True)
def _weights(count, rate, *, limit):
    count = count.astype(float)  # float64 where that is enabled
    if limit == 0:
        new = jnp.ones_like(count)
    elif limit == 1:
        new = 1 / (count + 1)
    else:  # (1 - momentum) / (1 - momentum^(t + 1)): no digit is lost where momentum is near 1
        # It is 1 for the first update, where vectorized code may round the two calls differently. A weight above 1
        # would give the old value a negative weight, and a constant feature a negative variance.
        new = jnp.minimum(jnp.expm1(rate) / jnp.expm1((count + 1) * rate), 1)
    # With weight 1 the old value would never change again.
    return jnp.minimum(1 - new, 1 - float(jnp.finfo(new.dtype).epsneg)), new


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
        start, length = self.start, float(self.stop - self.start)
        exact = isinstance(start, int | np.integer) and abs(start) < 2**30
        start = start if exact else float(start)
        return _ramp(jnp.asarray(count), self.low, self.high, start, length, step=length == 0)


@partial(jax.jit, static_argnames="step", inline=True)
def _ramp(count, low, high, start, length, *, step):
    # Integers are subtracted as such, because float32 holds them to 2^24 only.
    integers = all(jnp.issubdtype(jnp.result_type(v), jnp.integer) for v in (count, start))
    passed = (count.astype(int if integers else float) - start).astype(float)
    rise = (passed >= 0).astype(float) if step else passed / length
    return low + (high - low) * jnp.clip(rise, 0, 1)


def check_no_class(call: str, name: str, value: Any) -> None:
    """Check that an option that may be a schedule is not a class of schedules."""
    if isinstance(value, type):
        raise TypeError(
            f"{call}({name}={value.__name__}): expected a number or a function of state.count, got the class itself. "
            f"Call it with its arguments: {name}={_EXAMPLES.get(value, value.__name__ + '(...)')}."
        )


def at_count(call: str, name: str, value: Any, state: Any, train: bool, unused: Any) -> Any:
    """The option `name`, a number or a function of the count of updates, as a number for this call.

    In evaluation, or without a count, a function is not called, and the number is `unused`. A function is called here
    and not in the compiled function, which would keep the value from its first trace.
    """
    if not callable(value):
        return value
    if not train or not hasattr(state, "count"):
        return unused
    try:
        number = value(jnp.asarray(state.count))
    except TypeError as error:
        if _takes_one_argument(value):
            raise
        function = getattr(value, "__name__", type(value).__name__)
        raise TypeError(
            f"{call}({name}=...): expected a number or a function of state.count, got {function}, which cannot be "
            f"called with only the count. If it makes schedules, pass the one that it makes: {name}={function}(...)."
        ) from error
    if callable(number):
        raise TypeError(
            f"{call}({name}={value!r}): called with state.count, it returned another function, {number!r}. Pass that "
            "function: what makes a schedule has to be called with its options first."
        )
    return number


def _takes_one_argument(function):
    try:
        inspect.signature(function).bind(0)
    except (TypeError, ValueError):  # ValueError: a built-in function without a signature
        return False
    return True


_EXAMPLES = {debiased: "bnjax.debiased(0.99)", linear_ramp: "bnjax.linear_ramp(1.0, 3.0, 5_000, 40_000)"}
