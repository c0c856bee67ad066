"""Weights of elements, and means that leave masked elements out.

A weight is None (every element has weight 1), boolean, or real-valued. It broadcasts to the values. An element is valid
if its weight is positive, and masked otherwise. A masked element, even NaN, does not affect any result.
"""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.domains import Domains, Over, largest, returned, summed
from bnjax.core.residuals import named

USUAL = 2.0**40
"""A sum of weights within this factor of 1 is `usual`."""


def is_real(weight: Any) -> TypeGuard[Array]:
    """Whether the weights are real-valued."""
    return weight is not None and weight.dtype != bool


def expectation(
    x: Array, weight: Array | None, over: Over, *, scaled: bool = True
) -> tuple[Any, Callable[[Array], Array]]:
    """The total weight of the elements of `x`, and the function E of arrays of x's shape.

        total = sum_i w_i          E(v) = sum_i w_i v_i / total          0 where no weight is positive

    Sums are over axes or domains. The total broadcasts to what E returns. Real-valued weights are scaled, that is
    divided by a power of two near the largest, which takes one more reduction: only their ratios count, and products
    with unscaled weights may leave the floating range unless their total is `usual`. With weights, the results are
    named for `jax.checkpoint`, because merged moments have no derivative rule.
    """
    if weight is None and not isinstance(over, Domains):
        number = math.prod(x.shape[a] for a in over)
        return number, lambda values: jnp.sum(values, over) / (1 if number == 0 else number)
    weight, unit = relative(weight, over) if scaled else (weight, 1)
    total = named(total_weight(x.shape, weight, over, x.dtype))

    def mean(values):
        weighted = summed(weigh(weight, values), over)
        return named(divided(weighted, total + lax.full_like(weighted.real, 0)))

    return named(total * unit), mean


def mean_and_variance(x: Array, mean_of: Callable[[Array], Array], over: Over) -> tuple[Array, Array]:
    """Mean and variance of `x` under the expectation `mean_of` over axes or domains."""
    # The plain mean carries the rounding of a plain sum. The sums around it are near 0, and so is their rounding.
    plain_mean = mean_of(x)
    centered = x - returned(plain_mean, over)
    offset = mean_of(centered)
    var = mean_of(abs_square(centered)) - abs_square(offset)
    # Rounding may leave `var` below 0. Not jnp.maximum, whose derivative is 1/2 at 0 and 0 below.
    return plain_mean + offset, var - lax.stop_gradient(jnp.minimum(var, 0))


def abs_square(values: Any) -> Array:
    """|v|^2, real."""
    return jnp.real(jnp.conj(values) * values)


def usual(total: Array) -> Array:
    """Whether weights with this total leave room for the squares of values and of weights."""
    return (total == 0) | ((total > 1 / USUAL) & (total < USUAL))


def total_weight(shape: tuple[int, ...], weight: Array | None, over: Over, dtype: Any) -> Array:
    """The sum over axes or domains of the weights of an array of this shape; real, and broadcasts to other sums."""
    ones = jnp.ones((1,) * len(shape) if weight is None else weight.shape, jnp.finfo(dtype).dtype)
    return sum_as(shape, weigh(weight, ones), over)


def sum_as(shape: tuple[int, ...], values: Array, over: Over) -> Array:
    """The sum over axes or domains of `values` as if they were broadcast to `shape`; it broadcasts to other sums."""
    if isinstance(over, Domains):
        return over.sum(jnp.broadcast_to(values, shape))
    return jnp.sum(values, over) * math.prod(shape[a] for a in over if values.shape[a] != shape[a])


def valid(weight: Array, values: Array) -> Array:
    """Where the weight is positive, of the shape and sharding of `values`, which select requires."""
    return (weight if weight.dtype == bool else weight > 0) & lax.full_like(values, True, bool)


def weigh(weight: Array | None, values: Array) -> Array:
    """`values` times `weight`; exactly 0 at masked elements, whose product with 0 could be NaN."""
    if weight is None:
        return values
    weighed = values if weight.dtype == bool else weight.astype(values.dtype) * values
    return jnp.where(valid(weight, values), weighed, 0)


def divided(weighted: Array, total: Array) -> Array:
    """A weighted sum divided by the sum of the weights; 0 where no weight is positive."""
    return weighted * (1 / nonzero(total)).astype(weighted.dtype)


def relative(weight: Any, over: Over) -> tuple[Any, Any]:
    """Weights divided exactly by a power of two near the largest over axes or domains, and the power for each sum.

    Weights that are not real-valued stay as they are, with 1 for the power.
    """
    if not is_real(weight):
        return weight, 1
    info = jnp.finfo(weight.dtype)
    positive = lax.stop_gradient(jnp.where(weight > 0, weight, 0))
    most = jnp.clip(largest(positive, over), info.tiny, info.max / 4)
    unit = named(lax.reduce_precision(most, info.nexp, 0))
    return weight / returned(unit, over), unit


def nonzero(total: Array) -> Array:
    """`total`, with 1 in place of 0."""
    return jnp.where(total > 0, total, 1)
