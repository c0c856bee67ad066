"""Moments of parts of a batch, merged to the moments of the whole (Chan, Golub & LeVeque, 1983).

    weight = sum_i weight_i        mean = sum_i weight_i mean_i / weight
    var = sum_i weight_i (var_i + |mean_i - mean|^2) / weight

The parts are the shards of a mesh, the examples of `vmap`, the steps of an accumulation, the groups of a ghost batch,
or the examples of a domain. How a part is read is in `reading.py`. This module knows neither `x` nor devices.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.domains import Over, summed
from bnjax.core.records import Collected, Moments, Support
from bnjax.core.weights import divided, expectation, mean_and_variance, relative, sum_as, weigh


def merged(parts: Moments, over: Over) -> Moments:
    """The moments of all elements of the parts along axes, or of each domain.

    The variance of the whole is the variance of the parts' means plus the mean of the parts' variances.
    """
    total, mean_of = expectation(parts.mean, parts.weight, over)
    mean, between = mean_and_variance(parts.mean, mean_of, over)
    return Moments(total, mean, between + mean_of(parts.var))


def merge(parts: Collected, over: Over) -> Collected:
    """The moments and the support of all parts of a batch, which lie along axes, or of each domain."""
    moments, support = merged(parts.moments, over), parts.support
    if support is not None:
        weight, unit = relative(parts.moments.weight, over)
        own = divided(summed(weigh(weight, support.mean_weight), over), moments.weight / unit)
        support = Support(summed(support.valid, over), own)
    return Collected(moments, support)


def merge_together(*parts: Collected) -> Collected:
    """The moments and the support of all parts of a batch."""
    if any(part.support is not None for part in parts):
        parts = tuple(map(with_support, parts))
    return merge(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), (0,))


def support_of(weight: Array, shape: tuple[int, ...], mask: Array, axes: tuple[int, ...]) -> Support:
    """The support of an array of this shape whose real-valued mask sums to `weight`."""
    like = lax.full_like(weight, 0)  # of its shape, and sharded alike
    elements = sum_as(shape, (mask > 0).astype(weight.dtype), axes)
    shares, unit = relative(mask, axes)
    squares = sum_as(shape, weigh(shares, shares), axes)
    return Support(elements + like, divided(squares + like, weight / unit) * unit)


def with_support(collected: Collected) -> Collected:
    """The moments with a support, also if it was left out because every valid element has weight 1."""
    moments, support = collected
    return Collected(moments, support or Support(moments.weight, lax.full_like(moments.weight, 1)))
