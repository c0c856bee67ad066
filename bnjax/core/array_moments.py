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
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import jax.export
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from bnjax.core.reductions import cut, primitive, two_sums

# The name of the statistics for `jax.checkpoint`: a policy that saves it keeps the backward from reducing x again.
CHECKPOINT_NAME = "bnjax_statistics"

T = TypeVar("T")


def serializable(record: type[T]) -> type[T]:
    """Let `jax.export` serialize functions with this namedtuple among their arguments or results.

    JAX keeps the first registration of a name, also where the module is reloaded and the class is another.
    """
    try:
        return jax.export.register_namedtuple_serialization(record, serialized_name=f"bnjax.{record.__name__}")
    except ValueError as error:
        if "Duplicate" not in str(error):
            raise
        return record


@serializable
class Moments(NamedTuple):
    """Weight, mean and variance per feature; all three have the shape of the features.

    `weight` is the number of values (the sum of the mask where one is given), `var` is divided by `weight`. Where
    `weight` is 0, `mean` and `var` are 0.
    """

    weight: Array
    mean: Array
    var: Array


# The guard accepts |mean - c|^2 <= NEAR var + (ROUNDED eps mean)^2. Sums by trees, as TPUs and GPUs take them, round by
# about eps, so the error of `var` is about 9 eps at the most; the tests of accuracy allow 16 eps or more. The second
# term is for features that are constant: their running mean stops a few roundings away from the mean, and the error
# that it lets in, eps (ROUNDED eps mean)^2, is an eighth of the square of rounding the mean, (eps mean)^2.
NEAR = 8.0
ROUNDED = 1024.0
# Real-valued weights whose sum is within this factor of 1 leave room for the squares of values and of weights.
USUAL = 2.0**40


def guarded(x, shift, *mask, axes):
    """Moments in one read of `x` around the shift, and in two more where that is too far from the mean.

    `x` may be of half precision, `shift` has the dtype of the result and is broadcastable to `x`. With real-valued
    weights their mean weight is a fourth result. Its sum of squares leaves the floating range for weights far from 1,
    as may any sum of weighted values; the second look, which takes weights relative to the largest, serves these too.
    """
    weights = mask[0] if mask else None
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    (total, mean, var), offset = _around(x, shift, weights, axes)
    rounding = ROUNDED * jnp.finfo(var.dtype).eps * jnp.abs(mean)
    near = (abs_square(offset) <= NEAR * var + rounding * rounding) & jnp.isfinite(var)
    results = [mean, var]
    if is_real(weights):
        near &= (total == 0) | ((total > 1 / USUAL) & (total < USUAL))
        results.append(_mean_weight(x.shape, weights, weights, axes, total))

    def around_the_mean(x, *results):
        exact = pooled(weights, x.astype(shift.dtype), axes)[1:]
        return tuple(v + lax.full_like(like, 0) for v, like in zip(exact, results, strict=True))  # and sharded as those

    # Two rules of XLA: a conditional stays one if a branch does nothing, else it may become a select, which computes
    # both; and what enters it is in memory, so that `x` enters before it is widened.
    mean, var, *rest = lax.cond(jnp.all(near), lambda x, *results: results, around_the_mean, x, *results)
    return total, mean, jnp.maximum(var, 0), *rest


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


def pooled(weights, x, axes):
    """The moments of `x` in two reads, and the mean weight if weights are real-valued."""
    moments = pool(weights, x, None, axes)
    return (*moments, mean_weight(x.shape, weights, weights, axes, moments.weight)) if is_real(weights) else moments


def pool(weight, mean, var, axes):
    """Moments over `axes` of values `mean` with weights (None: 1 each) and variances (None: 0 each)."""
    weight, unit = relative(weight, axes)
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
    var -= lax.stop_gradient(jnp.minimum(var, 0))
    return Moments(total if unit is None else named(total * unit), pivot + shift, var)


def relative(weight, axes):
    """Weights divided by a power of two near the largest over `axes`, exactly, and that power without the axes.

    Only the ratios of weights count, and products with the weights themselves may leave the floating range. Weights
    that are boolean or None (1 each) stay, with None for the power.
    """
    if not is_real(weight):
        return weight, None
    info = jnp.finfo(weight.dtype)
    positive = lax.stop_gradient(jnp.where(weight > 0, weight, 0))
    largest = jnp.clip(jnp.max(positive, axes, keepdims=True, initial=0), info.tiny, info.max / 4)
    unit = named(lax.reduce_precision(largest, info.nexp, 0))
    return weight / unit, jnp.squeeze(unit, axes)


def mean_weight(shape, weight, own, axes, total):
    """The mean weight behind a value, sum w own / sum w over `axes` of an array of that shape, for `total` = sum w.

    The mean weights `own` of values that are no moments of parts are their weights.
    """
    weight, unit = relative(weight, axes)
    return _mean_weight(shape, weight, own, axes, total / unit)


def _mean_weight(shape, weight, own, axes, total):
    return sum_as(shape, weigh(weight, own), axes, total) * share_of(total, total.dtype)


def total_weight(shape, weight, axes, like):
    """The weight of all places of an array, per feature; real, and sharded as `like`."""
    ones = jnp.ones((1,) * len(shape) if weight is None else weight.shape, like.real.dtype)
    return sum_as(shape, weigh(weight, ones), axes, like.real)


def share_of(total, dtype):
    return (1 / nonzero(total)).astype(dtype)


def _twice(x, shift, *mask, axes):
    """As `guarded`, in two reads."""
    return pooled(mask[0] if mask else None, x.astype(shift.dtype), axes)


def _on_cpu(x, shift, *mask, axes):
    """As `guarded`, in one sum around the mean of a sixteenth of the values; under a mask, in two reads.

    The mean of a fraction f is at most sqrt((1 - f) / f) standard deviations from the mean of all: around it `var`
    loses that much more, whatever the data.
    """
    x = x.astype(shift.dtype)
    parts = None if mask or jnp.iscomplexobj(x) else cut(16, axes, x)
    if parts is None:
        return _twice(x, shift, *mask, axes=axes)
    (slabs,), axis, _, rest = parts
    pivot = jnp.expand_dims(jnp.mean(lax.index_in_dim(slabs, 0, axis, keepdims=False), rest), axes)
    both = two_sums(lambda x, pivot: (x - pivot, (x - pivot) ** 2), 16, axes, x, pivot)
    weight = math.prod(x.shape[a] for a in axes)
    offset, spread = (v / weight for v in both)
    var = jnp.maximum(spread - offset * offset, 0)
    return Moments(*(jnp.squeeze(v, axes) for v in (jnp.full_like(var, weight), pivot + offset, var)))


guarded_moments = primitive("bnjax_moments", guarded, cpu=_on_cpu, series=_twice, first_is_full=True)
grouped_moments = primitive("bnjax_group_moments", grouped, cpu=_on_cpu, series=_twice, first_is_full=True)

named = partial(checkpoint_name, name=CHECKPOINT_NAME)


def is_explicit(values):
    """Whether the type of an array tells how it is sharded, so that operands have to agree."""
    return jax.sharding.AxisType.Explicit in jax.typeof(values).sharding.mesh.axis_types


def sharded_as(x, few):
    """`few`, of x's rank and of size 1 where it is not x's, sharded as `x` is, which explicit sharding wants."""
    if not is_explicit(x):
        return few
    sharding = jax.typeof(x).sharding
    spec = [None if n == 1 else name for n, name in zip(few.shape, sharding.spec, strict=True)]
    return jax.sharding.reshard(few, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec)))


def is_real(weight: Any) -> TypeGuard[Array]:
    """Whether a mask, which may be None, holds real-valued weights."""
    return weight is not None and weight.dtype != bool


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
