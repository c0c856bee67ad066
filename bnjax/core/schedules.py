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

Momentum = float | Array | Callable[[Array], Array]


def cumulative_average(count: Array) -> Array:
    """Momentum that weighs every batch alike: the running statistics are the plain mean over all updates.

        momentum = count / (count + 1)

    This is PyTorch's `momentum=None`. From 2^24 updates on, where float32 cannot tell it from 1, the largest number
    below 1 is returned. The weight of a new batch in the running statistics is 1 / (count + 1) nevertheless.

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
      TypeError, ValueError: for a momentum that is no number in [0, 1].

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.debiased(0.9)(jnp.array([0, 1, 1000])).round(4).tolist()
      [0.0, 0.473..., 0.899...]
    """

    momentum: float

    def __post_init__(self) -> None:
        value = self.momentum.item() if isinstance(self.momentum, Array) else self.momentum
        object.__setattr__(self, "momentum", checks.momentum("debiased", value)[0])

    def __call__(self, count: Array) -> Array:
        return self.weights(count)[0]

    def weights(self, count: Array) -> tuple[Array, Array]:
        """The weight of the old value and that of the new one, which a difference from 1 would round."""
        rate = log(self.momentum) if self.momentum else 0.0
        return _weights(jnp.asarray(count), rate, kind=self.momentum if self.momentum in (0, 1) else None)


@partial(jax.jit, static_argnames="kind", inline=True)
def _weights(count, rate, *, kind):
    count = count.astype(float)  # float64 where that is enabled
    if kind == 0:
        new = jnp.ones_like(count)
    elif kind == 1:
        new = 1 / (count + 1)
    else:  # (1 - momentum) / (1 - momentum^(t + 1)), in a form that loses no digit where momentum is near 1
        new = jnp.expm1(rate) / jnp.expm1((count + 1) * rate)
    # An old value of weight 1 would never change again.
    return jnp.minimum(1 - new, 1 - float(jnp.finfo(new.dtype).epsneg)), new


@dataclass(frozen=True)
class linear_ramp:  # noqa: N801  a function with its parameters bound, which hashes and compares by value
    """A number that is constant, then rises linearly with the count of updates, then is constant again.

        value = low + (high - low) clip((count - start) / (stop - start), 0, 1)

    Args:
      low, high: the first and the last value.
      start, stop: the counts of updates between which the value rises; start < stop.

    Raises:
      ValueError: unless start < stop.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> bnjax.RENORM_R_MAX(jnp.array([0, 5_000, 22_500, 40_000, 50_000])).tolist()
      [1.0, 1.0, 2.0, 3.0, 3.0]
    """

    low: float
    high: float
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not self.start < self.stop:
            raise ValueError(f"linear_ramp(start={self.start}, stop={self.stop}): expected start < stop.")

    def __call__(self, count: Array) -> Array:
        start, length = self.start, float(self.stop - self.start)
        exact = isinstance(start, int | np.integer) and abs(start) < 2**30
        return _ramp(jnp.asarray(count), self.low, self.high, start if exact else float(start), length)


@partial(jax.jit, inline=True)
def _ramp(count, low, high, start, length):
    # Integers are subtracted as such, since float32 holds them to 2^24 only.
    integers = all(jnp.issubdtype(jnp.result_type(v), jnp.integer) for v in (count, start))
    passed = count.astype(int if integers else float) - start
    return low + (high - low) * jnp.clip(passed.astype(float) / length, 0, 1)


_EXAMPLES = {debiased: "bnjax.debiased(0.99)", linear_ramp: "bnjax.linear_ramp(1.0, 3.0, 5_000, 40_000)"}


def scheduled(call: str, name: str, value: Any, state: Any, train: bool, unused: Any) -> Any:
    """The number that an argument stands for: itself, or what it gives at the count of the state if it is a function.

    The function is called here, outside of the compiled function, at every call. A function that was a static argument
    would keep the value that it had when it was compiled, although the object that it is a method of may change; a
    lambda in a loop would be compiled each time, and a function that holds arrays cannot be hashed.

    Args:
      call, name: what errors mention.
      value: a number, or a function of the count of updates.
      state: the running statistics, or None.
      train: whether the number is used.
      unused: the number in place of a function where there is nothing to call it with.
    """
    if not callable(value):
        return value
    if isinstance(value, type):
        raise TypeError(
            f"{call}({name}=...): expected a number or a function of state.count, got the class {value.__name__}. "
            f"Call it with its parameters: {name}={_EXAMPLES.get(value, value.__name__ + '(...)')}."
        )
    count = getattr(state, "count", None)
    if not train or count is None or callable(count):  # a tuple's own method
        return unused
    try:
        number = value(jnp.asarray(count))
    except TypeError as error:
        if _takes_one_argument(value):
            raise
        raise TypeError(_not_a_schedule(call, name, value, "which cannot be called with the count alone")) from error
    if callable(number):
        raise TypeError(_not_a_schedule(call, name, value, "which returns another function"))
    return number


def _takes_one_argument(function):
    try:
        inspect.signature(function).bind(0)
    except (TypeError, ValueError):  # ValueError: a built-in function without a signature
        return False
    return True


def _not_a_schedule(call, name, value, what):
    function = getattr(value, "__name__", type(value).__name__)
    return (
        f"{call}({name}=...): expected a number or a function of state.count, got {function}, {what}. Pass a function "
        f"of one argument; if {function} makes schedules, the one that it makes: {name}={function}(...)."
    )
