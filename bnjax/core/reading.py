"""How one part of a batch is read: its mean and variance, by no more looks at it than they need.

An array is looked at once, around a shift c that is known before, such as the running mean:

    mean = c + E[x - c]       var = E|x - c|^2 - |E[x - c]|^2

With r = |mean - c|^2 / var, the two terms of `var` are (1 + r) var and r var. A relative rounding error e of the sums
therefore becomes a relative error of about e (1 + r) in `var`, and one of e sqrt(1 + r) standard deviations in `mean`.
A guard keeps r to 8 per feature: where a feature has more, the array is looked at twice again, around the mean that a
plain sum gives. The errors then grow linearly with |mean| / std whatever c is, which is the least possible for a
rounded input. The textbook E|x|^2 - |E x|^2 is c = 0 without a guard, and its error grows quadratically.

    two_looks       around the array's own mean, exact for any array
    guarded_look    one look around a known shift, and two more if the guard asks for them
    part_look       one look around the mean of a sixteenth of the array, which bounds r without a guard
    slab_look       the same on CPU, by slabs
    group_look      the same where several devices hold the array, by groups of examples that lie on one device

Which of them reads is chosen for the platform that a program is lowered for: `read_anywhere` and `read_locally`.

This module knows neither devices, nor derivatives, nor running statistics.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.jax_internals import PlatformFunction
from bnjax.core.records import Moments
from bnjax.core.reductions import FORWARD_SLABS, cut, two_sums
from bnjax.core.weights import abs_square, expectation, mean_and_variance, usual

# The guard accepts |mean - c|^2 <= NEAR var + (ROUNDED eps mean)^2. Sums by trees, as TPUs and GPUs take them, round by
# about eps, so the error of `var` is about 9 eps at the most; the tests of accuracy allow 16 eps or more. The second
# term is for constant features: their running mean stops a few roundings away from the mean, and the error that the
# term lets in, eps (ROUNDED eps mean)^2, is an eighth of the square of rounding the mean, (eps mean)^2.
NEAR = 8.0
ROUNDED = 1024.0
# A shift that is taken from the array itself is the mean of one part of it, out of so many.
PART = 16
# Rows are the part of an image that has so many: one of fewer is more than a quarter of it.
LEAST_ROWS = 4


def two_looks(x: Array, weight: Array | None, axes: tuple[int, ...]) -> Moments:
    """The moments of `x` over `axes`: a first look gives the mean, the second one is around it."""
    total, mean_of = expectation(x, weight, axes)
    mean, var = mean_and_variance(x, mean_of, axes)
    return Moments(total + jnp.zeros_like(var), mean, var)


def _one_look(x: Array, shift: Array, weight: Array | None, axes: tuple[int, ...]) -> tuple[Moments, Array]:
    """The moments around the shift, `var` perhaps a little below 0, and mean - shift."""
    centered = x.astype(shift.dtype) - shift
    total, mean_of = expectation(centered, weight, axes, scaled=False)
    offset = mean_of(centered)
    var = mean_of(abs_square(centered)) - abs_square(offset)
    mean = jnp.squeeze(shift, axes) + offset
    if weight is not None:
        mean = jnp.where(total > 0, mean, 0)
    return Moments(total + jnp.zeros_like(var), mean, var), offset


def guarded_look(x: Array, shift: Array, *weight: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Moments in one look at `x` around the shift, and in two more where the shift is too far from the mean.

    `x` may be of half precision; `shift` has the dtype of the result and broadcasts to `x`.
    """
    mask = weight[0] if weight else None
    # A running mean that is not finite would make every sum NaN, for the guard to refuse: 0 may do better.
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    (total, mean, var), offset = _one_look(x, shift, mask, axes)
    near = is_near(offset, mean, var)
    if mask is not None:
        near &= usual(total)

    def look_again(x, *first_look):
        _, *exact = two_looks(x.astype(shift.dtype), mask, axes)
        return tuple(v + lax.full_like(like, 0) for v, like in zip(exact, first_look, strict=True))  # sharded alike

    # Two rules of XLA. A conditional stays one only if a branch does nothing; otherwise it may become a select, which
    # computes both branches. And what enters it is in memory, so that `x` enters before it is widened.
    mean, var = lax.cond(jnp.all(near), lambda x, *first_look: first_look, look_again, x, mean, var)
    return total, mean, jnp.maximum(var, 0)


def is_near(offset: Array, mean: Array, var: Array) -> Array:
    """Whether moments that were taken around a shift, at the distance `offset` from the mean, are exact per feature."""
    rounding = ROUNDED * jnp.finfo(var.dtype).eps * jnp.abs(mean)
    # Where sums overflowed, `var` is infinite or NaN, and the two looks around the mean may still be finite.
    return (abs_square(offset) <= NEAR * var + rounding * rounding) & jnp.isfinite(var)


def part_look(x: Array, shift: Array, *weight: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Moments in one look at `x` around the mean of its first sixteenth along one of the axes, unless it is masked.

    The mean of a fraction f is at most sqrt((1 - f) / f) standard deviations from the mean of all, whatever the data,
    so that no guard is needed. That axis may not be divided among devices, and the part is looked at twice.
    """
    if weight:
        return _exact(x, shift, *weight, axes=axes)
    pivot, offset, var = _look_around(_first_part(x, axes), x, shift.dtype, axes)
    count = math.prod(x.shape[a] for a in axes)
    return count + jnp.zeros_like(var), pivot + offset, var


def _first_part(x, axes):
    """The first sixteenth of `x` along one of the axes: the first that has a sixteenth, if any has."""
    # In an export a size may be a symbol.
    known = [a for a in axes if isinstance(x.shape[a], int)]
    axis = max(known, key=lambda a: min(x.shape[a], PART), default=axes[0])
    return lax.slice_in_dim(x, 0, -(-x.shape[axis] // PART), axis=axis)


def _look_around(part, x, dtype, axes):
    """The mean of a part of `x`; and in one look around that, mean - it and the variance."""
    pivot = jnp.mean(part.astype(dtype), axes, keepdims=True)
    moments, offset = _one_look(x, pivot, None, axes)
    return jnp.squeeze(pivot, axes), offset, jnp.maximum(moments.var, 0)


def slab_look(x: Array, shift: Array, *weight: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Moments in one sum by slabs around the mean of the first slab; by two looks if masked, complex or small."""
    x = x.astype(shift.dtype)
    slabs = None if weight or jnp.iscomplexobj(x) else cut(FORWARD_SLABS, axes, x)
    if slabs is None:
        return _exact(x, shift, *weight, axes=axes)
    first_slab = lax.index_in_dim(slabs.parts[0], 0, slabs.axis, keepdims=False)
    pivot = jnp.expand_dims(jnp.mean(first_slab, slabs.axes), axes)
    both = two_sums(lambda x, pivot: (x - pivot, (x - pivot) ** 2), FORWARD_SLABS, axes, x, pivot)
    count = math.prod(x.shape[a] for a in axes)
    offset, mean_square = (v / count for v in both)
    var = jnp.maximum(mean_square - abs_square(offset), 0)
    return tuple(jnp.squeeze(v, axes) for v in (jnp.full_like(var, count), pivot + offset, var))


def group_look(x: Array, shift: Array, *weight: Array, axes: tuple[int, ...], devices: int) -> tuple[Array, ...]:
    """Moments of an array that several devices hold, each group of examples in one look around the mean of its part.

    There are as many groups as devices, along the first of the reduced axes, in general that of the batch. If the batch
    is divided among devices, a group lies on one of them, so that no device waits for another one's part, and the
    groups' moments are all that travels. However `x` is divided, the result is the same. A masked array, or a batch
    that has no such groups, is looked at around the shift, under the guard.
    """
    axis = axes[0]
    size = x.shape[axis]
    if weight or not isinstance(size, int) or size % devices:
        return guarded_look(x, shift, *weight, axes=axes)

    def grouped(v):
        return v.reshape(*v.shape[:axis], devices, size // devices, *v.shape[axis + 1 :])

    groups, inner = grouped(x), tuple(a + 1 for a in axes)
    # Of an image some rows, so that XLA slices `x` as it is; of other examples some from each group.
    rows = [a for a in axes[1:] if isinstance(x.shape[a], int) and x.shape[a] >= LEAST_ROWS]
    part = grouped(_first_part(x, rows)) if rows else _first_part(groups, inner)
    pivot, offset, var = _look_around(part, groups, shift.dtype, inner)
    total = math.prod(x.shape[a] for a in axes) + jnp.zeros(var.shape[:axis] + var.shape[axis + 1 :], var.dtype)
    if jnp.finfo(var.dtype).bits == 64:
        mean, between = mean_and_variance(pivot + offset, partial(jnp.mean, axis=axis), (axis,))
        return total, mean, between + jnp.mean(var, axis)
    with jax.enable_x64(True):
        # One sum over the devices, which in float64 has digits enough around 0. The addition is in float64 too:
        # compiled twice, for the mean and for its square, one in float32 may be rounded in two ways.
        wide = jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64
        means = pivot.astype(wide) + offset.astype(wide)
        mean, square = jnp.mean(means, axis), jnp.mean(var.astype(jnp.float64) + abs_square(means), axis)
        merged_var = jnp.maximum(square - abs_square(mean), 0)
        return total, mean.astype(shift.dtype), merged_var.astype(var.dtype)


def _exact(x, shift, *weight, axes):
    """The results of the other looks by two looks; it takes what they take."""
    return tuple(two_looks(x.astype(shift.dtype), weight[0] if weight else None, axes))


def _look_on_one_gpu(x, shift, *weight, axes):
    """The results of `guarded_look` without a conditional, for whose predicate the host of a GPU would wait.

    On an H100 the waits took longer than reading a sixteenth of the array twice. A masked array has no such part.
    """
    if weight or not any(isinstance(x.shape[a], int) for a in axes):
        return guarded_look(x, shift, *weight, axes=axes)
    return part_look(x, shift, axes=axes)


# The reduced axes may be divided among devices, so that no part of the array can be picked out without communication.
read_anywhere: PlatformFunction = PlatformFunction(
    "bnjax_moments",
    guarded_look,
    cpu=slab_look,
    one_gpu=_look_on_one_gpu,
    several=group_look,
    taylor=_exact,
    first_is_full=True,
)
# Each array of several, such as an example under `vmap`, lies on one device, and each may be far from the shift.
read_locally: PlatformFunction = PlatformFunction(
    "bnjax_part_moments", part_look, cpu=slab_look, taylor=_exact, first_is_full=True
)
