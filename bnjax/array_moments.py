"""First and second moments of one array, by no more reads of it than they need.

An array is read once, around a shift c that is known before it is, such as the running mean:

    mean = c + E[x - c]       var = E|x - c|^2 - |E[x - c]|^2

With r = |mean - c|^2 / var, the two terms of `var` are (1 + r) var and r var, so that rounding errors of relative size
e in the sums become a relative error of about e (1 + r) in `var`, and of e sqrt(1 + r) standard deviations in `mean`.
A guard keeps r to 8, per feature: where a feature has more, the moments are taken again in two reads, around the mean
that a plain sum gives. So the errors grow with |mean| / std once, as the rounding of the input does, whatever c is.
The textbook E|x|^2 - |E x|^2 is c = 0 without a guard, and loses the square of |mean| / std.

`guarded_moments` computes this. `grouped_moments` takes for c the mean of a part of the array, which needs no guard.
`pool` computes moments in two reads, also of values that are moments of parts already.

This module knows neither devices, nor derivatives, nor running statistics.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from bnjax.reductions import cut, primitive, two_sums

# The name of the statistics for `jax.checkpoint`: a policy that saves it keeps the backward from reducing x again.
CHECKPOINT_NAME = "bnjax_statistics"


class Moments(NamedTuple):
    """Weight, mean and variance per feature; all three have the shape of the features.

    `weight` is the number of values (the sum of the mask where one is given), `var` is divided by `weight`. Where
    `weight` is 0, `mean` and `var` are 0.
    """

    weight: Array
    mean: Array
    var: Array


jax.export.register_namedtuple_serialization(Moments, serialized_name="bnjax.Moments")


# The guard accepts |mean - c|^2 <= NEAR var + (ROUNDED eps mean)^2. Sums by trees, as TPUs and GPUs take them, round by
# about eps, so the error of `var` is about 9 eps at the most; the tests of accuracy allow 16 eps or more. The second
# term is for features that are constant: their running mean stops a few roundings away from the mean, and the error
# that it lets in, eps (ROUNDED eps mean)^2, is an eighth of the square of rounding the mean, (eps mean)^2.
NEAR = 8.0
ROUNDED = 1024.0


def guarded(x, shift, *mask, axes):
    """Moments in one read of `x` around the shift, and in two more where that is too far from the mean.

    `x` may be of half precision, `shift` has the dtype of the result and is broadcastable to `x`.
    """
    weights = mask[0] if mask else None
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    (total, mean, var), offset = _around(x, shift, weights, axes)
    rounding = ROUNDED * jnp.finfo(var.dtype).eps * jnp.abs(mean)
    near = (abs_square(offset) <= NEAR * var + rounding * rounding) & jnp.isfinite(var)

    def around_the_mean(x, mean, var):
        exact = pool(weights, x.astype(shift.dtype), None, axes)
        return exact.mean + lax.full_like(mean, 0), exact.var + lax.full_like(var, 0)  # and sharded as those

    # Two rules of XLA: a conditional stays one if a branch does nothing, else it may become a select, which computes
    # both; and what enters it is in memory, so that `x` enters before it is widened.
    mean, var = lax.cond(jnp.all(near), lambda x, mean, var: (mean, var), around_the_mean, x, mean, var)
    return Moments(total, mean, jnp.maximum(var, 0))


def grouped(x, shift, *, axes):
    """Moments in one read of `x` around the mean of its first sixteenth along the first of the axes.

    The mean of a fraction f is at most sqrt((1 - f) / f) standard deviations from the mean of all, whatever the data:
    this needs no guard, but an axis that is not divided among devices, and a part of `x` is read twice.
    """
    part = lax.slice_in_dim(x, 0, -(-x.shape[axes[0]] // 16), axis=axes[0]).astype(shift.dtype)
    moments, _ = _around(x, jnp.mean(part, axes, keepdims=True), None, axes)
    return moments._replace(var=jnp.maximum(moments.var, 0))


def _around(x, shift, weights, axes):
    """Moments by sums around the shift, which may leave `var` a little below 0, and mean - shift."""
    centered = x.astype(shift.dtype) - shift
    offset = jnp.sum(weigh(weights, centered), axes)
    total = total_weight(x.shape, weights, axes, offset)
    share = share_of(total, offset.dtype)
    offset *= share
    var = jnp.sum(weigh(weights, abs_square(centered)), axes) * share.real - abs_square(offset)
    return Moments(total, jnp.where(total > 0, jnp.squeeze(shift, axes) + offset, 0), var), offset


def pool(weight, mean, var, axes):
    """Moments over `axes` of values `mean` with weights (None: 1 each) and variances (None: 0 each)."""
    plain = jnp.sum(weigh(weight, mean), axes)
    total = named(total_weight(mean.shape, weight, axes, plain))
    share = share_of(total, mean.dtype)
    pivot = named(plain * share)
    centered = mean - jnp.expand_dims(pivot, axes)
    square = abs_square(centered) if var is None else var + abs_square(centered)
    # The pivot carries the rounding of a plain sum; the mean around it carries the rounding of one that is near 0.
    shift = named(jnp.sum(weigh(weight, centered), axes) * share)
    spread = jnp.sum(weigh(weight, square), axes) * share.real
    var = spread - abs_square(shift)
    # Rounding may leave it below 0. Not jnp.maximum, whose derivative is a half at 0 and nothing below.
    return Moments(total, pivot + shift, var - lax.stop_gradient(jnp.minimum(var, 0)))


def total_weight(shape, weight, axes, like):
    """The weight of all places of an array, per feature; real, and sharded as `like`."""
    ones = jnp.ones((1,) * len(shape) if weight is None else weight.shape, like.real.dtype)
    return sum_as(shape, weigh(weight, ones), axes, like.real)


def share_of(total, dtype):
    return (1 / nonzero(total)).astype(dtype)


def _on_cpu(x, shift, *mask, axes):
    """As `guarded`, in one sum around the mean of a sixteenth of the values; under a mask, in two reads.

    The mean of a fraction f is at most sqrt((1 - f) / f) standard deviations from the mean of all: around it `var`
    loses that much more, whatever the data.
    """
    x = x.astype(shift.dtype)
    parts = None if mask or jnp.iscomplexobj(x) else cut(16, axes, x)
    if parts is None:
        return pool(mask[0] if mask else None, x, None, axes)
    (slabs,), axis, _, rest = parts
    pivot = jnp.expand_dims(jnp.mean(lax.index_in_dim(slabs, 0, axis, keepdims=False), rest), axes)
    both = two_sums(lambda x, pivot: (x - pivot, (x - pivot) ** 2), 16, axes, x, pivot)
    weight = math.prod(x.shape[a] for a in axes)
    offset, spread = (v / weight for v in both)
    var = jnp.maximum(spread - offset * offset, 0)
    return Moments(*(jnp.squeeze(v, axes) for v in (jnp.full_like(var, weight), pivot + offset, var)))


guarded_moments = primitive("bnjax_moments", guarded, cpu=_on_cpu, first_is_full=True)
grouped_moments = primitive("bnjax_group_moments", grouped, cpu=_on_cpu, first_is_full=True)

named = partial(checkpoint_name, name=CHECKPOINT_NAME)


def valid(weight, values):
    """Where the weight is not 0, sharded as `values`, which select requires under explicit sharding."""
    return (weight if weight.dtype == bool else weight > 0) & lax.full_like(values, True, bool)


def weigh(weight, values):
    """`values` times `weight`, and 0 where the weight is, whatever stands there."""
    if weight is None:
        return values
    weighed = values if weight.dtype == bool else weight.astype(values.dtype) * values
    return jnp.where(valid(weight, values), weighed, 0)


def sum_as(shape, values, axes, like):
    """The sum over `axes` of `values` broadcast to `shape`, without the broadcast, and sharded as `like`."""
    repeats = math.prod(shape[a] for a in axes if values.shape[a] != shape[a])
    return jnp.sum(values, axes) * repeats + lax.full_like(like, 0)


def nonzero(weight):
    return jnp.where(weight > 0, weight, 1)


def abs_square(values):
    return jnp.real(jnp.conj(values) * values)
