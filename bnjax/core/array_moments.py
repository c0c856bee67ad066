"""First and second moments of one array, by no more reads of it than they need.

An array is read once, around a shift c that is known before it is read, such as the running mean:

    mean = c + E[x - c]       var = E|x - c|^2 - |E[x - c]|^2

With r = |mean - c|^2 / var, the two terms of `var` are (1 + r) var and r var. A relative rounding error e of the sums
therefore becomes a relative error of about e (1 + r) in `var`, and one of e sqrt(1 + r) standard deviations in `mean`.
A guard keeps r to 8 per feature: where a feature has more, the array is read twice again, around the mean that a plain
sum gives. The errors then grow linearly with |mean| / std whatever c is, which is the least possible for a rounded
input. The textbook E|x|^2 - |E x|^2 is c = 0 without a guard, and its error grows quadratically.

* `two_read_moments` reads twice. `merged_moments` does the same for moments of parts.
* `guarded_moments` reads once around a known shift, under the guard.
* `unguarded_moments` reads once around the mean of a part of the array, which needs no guard.

On one GPU `guarded_moments` reads around the mean of a part as well. A conditional makes the host of a GPU wait for its
predicate, and on an H100 the waits took longer than reading a sixteenth of the array twice.

This module knows neither devices, nor derivatives, nor running statistics.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.checkpoint import named
from bnjax.core.domains import Over, returned
from bnjax.core.jax_internals import PlatformFunction
from bnjax.core.records import Moments
from bnjax.core.reductions import FORWARD_SLABS, cut, two_sums
from bnjax.core.weights import divided, is_real, relative, total_weight, weighted_sum

# The guard accepts |mean - c|^2 <= NEAR var + (ROUNDED eps mean)^2. Sums by trees, as TPUs and GPUs take them, round by
# about eps, so the error of `var` is about 9 eps at the most; the tests of accuracy allow 16 eps or more. The second
# term is for constant features: their running mean stops a few roundings away from the mean, and the error that the
# term lets in, eps (ROUNDED eps mean)^2, is an eighth of the square of rounding the mean, (eps mean)^2.
NEAR = 8.0
ROUNDED = 1024.0
# Real-valued weights whose sum is within this factor of 1 leave room for the squares of values and of weights.
USUAL = 2.0**40
# Unguarded moments are taken around the mean of one part of the array, out of so many.
PART = 16


def two_read_moments(x: Array, weight: Array | None, axes: tuple[int, ...]) -> Moments:
    """The moments of `x` over `axes`: a first read gives the mean, the second one is taken around it."""
    weight, unit = relative(weight, axes)
    moments = _two_reads(x, weight, axes)
    return moments._replace(weight=named(moments.weight * unit))


def merged_moments(parts: Moments, over: Over) -> Moments:
    """The moments of all elements of the parts along axes, or of each domain (Chan, Golub & LeVeque, 1983).

    The variance of the whole is the variance of the parts' means plus the mean of the parts' variances.
    """
    weight, unit = relative(parts.weight, over)
    between = _two_reads(parts.mean, weight, over)
    within = divided(weighted_sum(parts.var, weight, over), between.weight)
    return Moments(named(between.weight * unit), between.mean, between.var + within)


def _two_reads(x, weight, over):
    plain = weighted_sum(x, weight, over)
    total = named(total_weight(x.shape, weight, over, like=plain))
    # The plain mean carries the rounding of a plain sum. The sums around it are near 0, and so is their rounding.
    plain_mean = named(divided(plain, total))
    centered = x - returned(plain_mean, over)
    offset = named(divided(weighted_sum(centered, weight, over), total))
    var = _variance(divided(weighted_sum(abs_square(centered), weight, over), total), offset)
    # Rounding may leave `var` below 0. Not jnp.maximum, whose derivative is a half at 0 and nothing below.
    return Moments(total, plain_mean + offset, var - lax.stop_gradient(jnp.minimum(var, 0)))


def _one_read(x, shift, weight, axes):
    """The moments around the shift, `var` perhaps a little below 0, and mean - shift."""
    centered = x.astype(shift.dtype) - shift
    plain = weighted_sum(centered, weight, axes)
    total = total_weight(x.shape, weight, axes, like=plain)
    offset = divided(plain, total)
    mean = jnp.where(total > 0, jnp.squeeze(shift, axes) + offset, 0)
    var = _variance(divided(weighted_sum(abs_square(centered), weight, axes), total), offset)
    return Moments(total, mean, var), offset


def _variance(mean_square, offset):
    """E|x - c|^2 - |E[x - c]|^2, of the mean square and of the mean; rounding may leave it a little below 0."""
    return mean_square - abs_square(offset)


def guarded(x: Array, shift: Array, *weight: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Moments in one read of `x` around the shift, and in two more where the shift is too far from the mean.

    `x` may be of half precision; `shift` has the dtype of the result and broadcasts to `x`. Real-valued weights far
    from 1 take the second look too: it divides them by the largest, where products of the first look may leave the
    floating range.
    """
    mask = weight[0] if weight else None
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    (total, mean, var), offset = _one_read(x, shift, mask, axes)
    rounding = ROUNDED * jnp.finfo(var.dtype).eps * jnp.abs(mean)
    near = (abs_square(offset) <= NEAR * var + rounding * rounding) & jnp.isfinite(var)
    if is_real(mask):
        near &= (total == 0) | ((total > 1 / USUAL) & (total < USUAL))

    def second_look(x, *first_look):
        _, *exact = _two_looks(x, shift, *weight, axes=axes)
        return tuple(v + lax.full_like(like, 0) for v, like in zip(exact, first_look, strict=True))  # sharded alike

    # Two rules of XLA. A conditional stays one only if a branch does nothing; otherwise it may become a select, which
    # computes both branches. And what enters it is in memory, so that `x` enters before it is widened.
    mean, var = lax.cond(jnp.all(near), lambda x, *first_look: first_look, second_look, x, mean, var)
    return total, mean, jnp.maximum(var, 0)


def around_a_part(x: Array, shift: Array, *, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Moments in one read of `x` around the mean of its first sixteenth along one of the axes.

    The mean of a fraction f is at most sqrt((1 - f) / f) standard deviations from the mean of all, whatever the data,
    so that no guard is needed. That axis may not be divided among devices, and the part is read twice.
    """
    # In an export a size may be a symbol. Otherwise the first axis that has a sixteenth is taken, if any has.
    known = [a for a in axes if isinstance(x.shape[a], int)]
    axis = max(known, key=lambda a: min(x.shape[a], PART), default=axes[0])
    part = lax.slice_in_dim(x, 0, -(-x.shape[axis] // PART), axis=axis).astype(shift.dtype)
    moments, _ = _one_read(x, jnp.mean(part, axes, keepdims=True), None, axes)
    return tuple(moments._replace(var=jnp.maximum(moments.var, 0)))


def _two_looks(x, shift, *weight, axes):
    """The results of `guarded`, by two reads."""
    return tuple(two_read_moments(x.astype(shift.dtype), weight[0] if weight else None, axes))


def _on_one_gpu(x, shift, *weight, axes):
    """The results of `guarded`, around the mean of a part: the host of a GPU would wait for the guard's decision."""
    if weight or not any(isinstance(x.shape[a], int) for a in axes):
        return guarded(x, shift, *weight, axes=axes)
    return around_a_part(x, shift, axes=axes)


def _on_cpu(x, shift, *weight, axes):
    """The results of `guarded`, in one sum by slabs around the mean of the first slab; under a mask, by two reads."""
    x = x.astype(shift.dtype)
    slabs = None if weight or jnp.iscomplexobj(x) else cut(FORWARD_SLABS, axes, x)
    if slabs is None:
        return _two_looks(x, shift, *weight, axes=axes)
    first_slab = lax.index_in_dim(slabs.parts[0], 0, slabs.axis, keepdims=False)
    pivot = jnp.expand_dims(jnp.mean(first_slab, slabs.axes), axes)
    both = two_sums(lambda x, pivot: (x - pivot, (x - pivot) ** 2), FORWARD_SLABS, axes, x, pivot)
    count = math.prod(x.shape[a] for a in axes)
    offset, mean_square = (v / count for v in both)
    var = jnp.maximum(_variance(mean_square, offset), 0)
    return tuple(jnp.squeeze(v, axes) for v in (jnp.full_like(var, count), pivot + offset, var))


guarded_moments: PlatformFunction = PlatformFunction(
    "bnjax_moments", guarded, cpu=_on_cpu, one_gpu=_on_one_gpu, taylor=_two_looks, first_is_full=True
)
unguarded_moments: PlatformFunction = PlatformFunction(
    "bnjax_part_moments", around_a_part, cpu=_on_cpu, taylor=_two_looks, first_is_full=True
)


def abs_square(values: Any) -> Array:
    """|v|^2, real."""
    return jnp.real(jnp.conj(values) * values)
