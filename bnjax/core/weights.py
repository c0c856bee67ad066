"""Weights of elements, and weighted sums that masked elements cannot enter.

A weight is None (every element has weight 1), boolean, or real-valued. It broadcasts to the values. An element is valid
if its weight is positive, and masked otherwise. A masked element, even NaN, does not affect any result.
"""

import math
from typing import Any, TypeGuard

import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.checkpoint import named
from bnjax.core.domains import Domains, Over, largest, returned, summed


def is_real(weight: Any) -> TypeGuard[Array]:
    """Whether the weights are real-valued."""
    return weight is not None and weight.dtype != bool


def valid(weight: Array, values: Array) -> Array:
    """Where the weight is positive, of the shape and sharding of `values`, which select requires."""
    return (weight if weight.dtype == bool else weight > 0) & lax.full_like(values, True, bool)


def weigh(weight: Array | None, values: Array) -> Array:
    """`values` times `weight`; exactly 0 at masked elements, whose product with 0 could be NaN."""
    if weight is None:
        return values
    weighed = values if weight.dtype == bool else weight.astype(values.dtype) * values
    return jnp.where(valid(weight, values), weighed, 0)


def sum_as(shape: tuple[int, ...], values: Array, over: Over, like: Array) -> Array:
    """The sum over axes or domains of `values` as if they were broadcast to `shape`; sharded as `like`."""
    if isinstance(over, Domains):
        return over.sum(jnp.broadcast_to(values, shape))
    repeats = math.prod(shape[a] for a in over if values.shape[a] != shape[a])
    return summed(values, over) * repeats + lax.full_like(like, 0)


def total_weight(shape: tuple[int, ...], weight: Array | None, over: Over, like: Array) -> Array:
    """The sum of the weights of an array of this shape, per feature; real, and sharded as `like`."""
    ones = jnp.ones((1,) * len(shape) if weight is None else weight.shape, like.real.dtype)
    return sum_as(shape, weigh(weight, ones), over, like.real)


def valid_elements(shape: tuple[int, ...], weight: Array, axes: tuple[int, ...], like: Array) -> Array:
    """The number of elements with a positive weight, per feature."""
    return sum_as(shape, (weight > 0).astype(weight.dtype), axes, like)


def weighted_sum(values: Array, weight: Array | None, over: Over) -> Array:
    """sum(w v) over axes or domains."""
    return summed(weigh(weight, values), over)


def divided(weighted: Array, total: Array) -> Array:
    """A weighted sum divided by the sum of the weights; 0 where no weight is positive."""
    return weighted * (1 / nonzero(total)).astype(weighted.dtype)


def mean_weight(shape: tuple[int, ...], weight: Array, axes: tuple[int, ...], total: Array) -> Array:
    """sum(w^2) / sum(w) over `axes` of an array of this shape, for total = sum(w)."""
    return divided(sum_as(shape, weigh(weight, weight), axes, total), total)


def relative(weight: Any, over: Over) -> tuple[Any, Any]:
    """Weights divided exactly by a power of two near the largest over axes or domains, and that power of each sum.

    Only the ratios of weights count, and products with the weights themselves may leave the floating range. Weights
    that are not real-valued stay as they are, with 1 for the power.
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
