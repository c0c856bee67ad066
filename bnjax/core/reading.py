"""The mean and variance of one part of a batch, in no more looks at it than they need.

An array is looked at once, around a shift c that is known beforehand, such as the running mean:

    mean = c + E[x - c]       var = E|x - c|^2 - |E[x - c]|^2

With r = |mean - c|^2 / var, the two terms of `var` are (1 + r) var and r var. A relative rounding error e of the sums
therefore becomes a relative error of about e (1 + r) in `var`, and one of e sqrt(1 + r) standard deviations in `mean`.
A guard keeps r to at most 8 for each feature: if a feature has more, the array is looked at twice more, around the mean
that a plain sum gives. The errors then grow linearly with |mean| / std for any c, the least possible for a rounded
input. The textbook E|x|^2 - |E x|^2 is c = 0 without a guard, and its error grows quadratically.

    two_looks       around the array's own mean, exact for any array
    guarded_look    one look around a known shift, and two more if the guard asks for them
    part_look       one look around the mean of a sixteenth of the array, which bounds r without a guard
    slab_look       the same on CPU, by slabs
    group_look      the same where several devices hold the array, by groups of examples that lie on one device

`read_anywhere` and `read_locally` choose among them by the platform that a program is lowered for.

Of devices this module knows only their number. It knows neither derivatives nor running statistics.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.jax_internals import PlatformFunction
from bnjax.core.records import Moments
from bnjax.core.reductions import FORWARD_SLABS, cut, joint_sums, joint_sums_pay, two_sums
from bnjax.core.sharding import shards
from bnjax.core.weights import (
    abs_square,
    divided,
    expectation,
    is_real,
    mean_and_variance,
    relative,
    total_weight,
    usual,
    valid,
    weigh,
)

# The guard accepts |mean - c|^2 <= NEAR var + (ROUNDED eps mean)^2. Tree sums, as on TPUs and GPUs, round by about eps,
# so the error of `var` is at most about 9 eps; the tests of accuracy allow 16 eps or more. The second term is for
# constant features: their running mean stops a few roundings away from the mean, and the error that the term admits,
# eps (ROUNDED eps mean)^2, is an eighth of the square of rounding the mean, (eps mean)^2.
NEAR = 8.0
ROUNDED = 1024.0
# A shift that is taken from the array itself is the mean of one of this many parts of it.
PART = 16
# Rows of an image serve as its part if there are this many: one of fewer rows would be more than a quarter of it.
LEAST_ROWS = 4


def two_looks(x: Array, weight: Array | None, axes: tuple[int, ...]) -> Moments:
    """The moments of `x` over `axes`: a first look gives the mean, the second one is around it."""
    total, mean_of = expectation(x, weight, axes)
    mean, var = mean_and_variance(x, mean_of, axes)
    return Moments(total + jnp.zeros_like(var), mean, var)


def _one_look(
    x: Array, shift: Array, weight: Array | None, axes: tuple[int, ...], *, jointly: int = 0
) -> tuple[Moments, Array]:
    """The moments around the shift, `var` perhaps a little below 0, and mean - shift.

    `jointly` is the number of devices that hold `x`, for `joint_sums`, or 0 for two sums.
    """
    x = x.astype(shift.dtype)
    if jointly and weight is not None:  # a masked element is put at the shift, where its product with 0 is 0
        x = jnp.where(valid(weight, x), x, shift)
    centered = x - shift
    total, mean_of = expectation(centered, weight, axes, scaled=False)
    if jointly:
        weighed = weigh(weight, jnp.ones(weight.shape, x.dtype)) * centered if is_real(weight) else centered
        both = joint_sums(weighed, weighed * centered, axes, jointly)
        offset, square = (divided(v, total + jnp.zeros_like(v)) for v in both)
    else:
        offset, square = mean_of(centered), mean_of(abs_square(centered))
    var = square - abs_square(offset)
    mean = jnp.squeeze(shift, axes) + offset
    if weight is not None:
        mean = jnp.where(total > 0, mean, 0)
    return Moments(total + jnp.zeros_like(var), mean, var), offset


def guarded_look(x: Array, shift: Array, *weight: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Moments in one look at `x` around the shift, and in two more where the shift is too far from the mean.

    `x` may be of half precision; `shift` has the dtype of the result and broadcasts to `x`.
    """
    mask = weight[0] if weight else None
    # Around a running mean that is not finite every sum would be NaN, and the guard would reject it; 0 may be near.
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    (total, mean, var), offset = _one_look(x, shift, mask, axes)
    near = is_near(offset, mean, var)
    if mask is not None:
        near &= usual(total)

    def look_again(x, *first_look):
        _, *exact = two_looks(x.astype(shift.dtype), mask, axes)
        return tuple(v + lax.full_like(like, 0) for v, like in zip(exact, first_look, strict=True))  # sharded alike

    # Two rules of XLA. A conditional stays one only if a branch does nothing; otherwise it may become a select, which
    # computes both branches. Operands of a conditional are materialized, so `x` is passed before it is widened.
    mean, var = lax.cond(jnp.all(near), lambda x, *first_look: first_look, look_again, x, mean, var)
    return total, mean, jnp.maximum(var, 0)


def is_near(offset: Array, mean: Array, var: Array) -> Array:
    """Whether moments that were taken around a shift, at the distance `offset` from the mean, are exact per feature."""
    rounding = ROUNDED * jnp.finfo(var.dtype).eps * jnp.abs(mean)
    # Where sums overflowed, `var` is infinite or NaN, and the two looks around the mean may still be finite.
    return (abs_square(offset) <= NEAR * var + rounding * rounding) & jnp.isfinite(var)


def part_look(x: Array, shift: Array, *weight: Array, axes: tuple[int, ...], jointly: int = 0) -> tuple[Array, ...]:
    """Moments in one look at `x` around the mean of a sixteenth of it along one of the axes.

    The mean of a part that has a fraction f of the weight is at most sqrt((1 - f) / f) standard deviations from the
    mean of all, whatever the data, so that no guard is needed. Of the sixteen parts of a masked array, the one with the
    most weight is taken, which has a sixteenth or more. The axis must not be divided among devices. The part is looked
    at twice. There is no such part if each feature has its own mask, if a masked array has only symbolic sizes, or if
    all axes are explicitly divided: the whole array is then looked at twice.
    """
    mask = weight[0] if weight else None
    whole = [a for a in axes if shards(x, a) == 1]
    found = mask is None or (_features_share(mask, axes) and any(_known(x.shape[a]) for a in whole))
    if not (whole and found):
        return _exact(x, shift, *weight, axes=axes)
    mask, unit = relative(mask, axes)
    part = _part(x, mask, whole)
    (total, offset, var), pivot = _look_around(part, x, mask, shift.dtype, axes, jointly=jointly)
    return total * unit, jnp.where(total > 0, pivot + offset, 0), var


def _features_share(mask, axes):
    """Whether one mask serves all features."""
    return all(size == 1 for a, size in enumerate(mask.shape) if a not in axes)


def _part(x, mask, axes):
    """About a sixteenth of `x` along one of the axes, the first that has a sixteenth if any has, and its mask."""
    if mask is not None:  # along an axis that the mask broadcasts over, each part has the same weight
        axes = [a for a in axes if mask.shape[a] == 1 and _known(x.shape[a]) >= PART // 2] or axes
    axis = max(axes, key=lambda a: min(_known(x.shape[a]), PART))
    size = -(-x.shape[axis] // PART)
    if mask is None or mask.shape[axis] == 1:
        return lax.slice_in_dim(x, 0, size, axis=axis), mask
    others = [a for a in range(mask.ndim) if a != axis]
    weights = jnp.sum(weigh(mask, jnp.ones(mask.shape, mask.dtype if is_real(mask) else jnp.float32)), others)
    start = size * jnp.argmax(jnp.pad(weights, (0, -weights.size % size)).reshape(-1, size).sum(1))
    # A last part that is too small begins earlier, and so has at least that weight.
    return tuple(lax.dynamic_slice_in_dim(v, start, size, axis) for v in (x, mask))


def _known(size):
    """The size of an axis; 0 if it is symbolic, as in an export."""
    return size if isinstance(size, int) else 0


def _look_around(part, x, mask, dtype, axes, *, jointly):
    """Weight, mean - pivot and variance of `x` in one look around the pivot, the mean of a part of it; and the pivot.

    Args:
      part: the part and its mask. Masks are boolean, or of weights whose sum is not far from 1.
    """
    values, part_mask = part[0].astype(dtype), part[1]
    pivot = jnp.expand_dims(expectation(values, part_mask, axes, scaled=False)[1](values), axes)
    (total, _, var), offset = _one_look(x, pivot, mask, axes, jointly=jointly)
    return Moments(total, offset, jnp.maximum(var, 0)), jnp.squeeze(pivot, axes)


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


def group_look(
    x: Array, shift: Array, *weight: Array, axes: tuple[int, ...], devices: int, on_gpus: bool = False
) -> tuple[Array, ...]:
    """Moments of an array that several devices hold, each group of examples in one look around the mean of its part.

    The groups divide the first of the reduced axes, usually the batch axis. Their number is the greatest common divisor
    of its size and the number of devices. If the batch is divided among devices, a group lies on one of them, so that
    no device waits for another's part, and only the groups' moments are communicated. However `x` is divided, the
    result is the same.
    """
    axis, mask = axes[0], weight[0] if weight else None
    if not isinstance(x.shape[axis], int):
        return guarded_look(x, shift, *weight, axes=axes)
    if mask is not None and not _features_share(mask, axes):
        return _exact(x, shift, mask, axes=axes)
    number = math.gcd(x.shape[axis], devices)

    def grouped(v):
        several = min(number, v.shape[axis])
        return v.reshape(*v.shape[:axis], several, v.shape[axis] // several, *v.shape[axis + 1 :])

    groups, inner = grouped(x), tuple(a + 1 for a in axes)
    masks, units = relative(None if mask is None else grouped(mask), inner)
    # The part is some rows of each image, so that XLA slices `x` as it is; without rows, some examples of each group.
    rows = [a for a in axes[1:] if _known(x.shape[a]) >= LEAST_ROWS]
    if mask is not None:
        rows = [a for a in rows if mask.shape[a] == 1 and x.shape[a] >= PART // 2]
    if rows:
        part = grouped(_part(x, mask, rows)[0]), masks
    elif mask is None:
        part = _part(groups, None, inner)
    else:
        masks = jnp.broadcast_to(masks, (*masks.shape[:axis], number, *masks.shape[axis + 1 :]))
        part = jax.vmap(partial(_part, axes=axes), axis, axis)(groups, masks)
    real = not jnp.iscomplexobj(x)
    jointly = devices if on_gpus and real and joint_sums_pay(groups, inner, devices) else 0
    (_, offset, var), pivot = _look_around(part, groups, masks, shift.dtype, inner, jointly=jointly)
    shares = None if mask is None else total_weight(groups.shape, masks, inner, var.dtype)
    if jnp.finfo(var.dtype).bits == 64:
        weights = None if shares is None else shares * units
        total, mean_of = expectation(offset, weights, (axis,))
        mean, between = mean_and_variance(pivot + offset, mean_of, (axis,))
        merged = Moments(total, mean, between + mean_of(var))
    else:
        with jax.enable_x64(True):
            # One sum over the devices. float64 has enough digits for sums around 0, and enough range for weights. The
            # addition is in float64 too: XLA may compile it twice, for the mean and for its square, and round float32
            # differently.
            wide = jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64
            means = pivot.astype(wide) + offset.astype(wide)
            weights = None if shares is None else shares.astype(jnp.float64) * jnp.asarray(units, jnp.float64)
            total, mean_of = expectation(means, weights, (axis,), scaled=False)
            mean, square = mean_of(means), mean_of(var.astype(jnp.float64) + abs_square(means))
            wide_var = jnp.maximum(square - abs_square(mean), 0)
            merged = Moments(jnp.asarray(total).astype(var.dtype), mean.astype(shift.dtype), wide_var.astype(var.dtype))
    total = math.prod(x.shape[a] for a in axes) if mask is None else merged.weight
    return total + jnp.zeros_like(merged.var), merged.mean, merged.var


def _exact(x, shift, *weight, axes):
    """Two looks, with the arguments and results of the other looks."""
    return tuple(two_looks(x.astype(shift.dtype), weight[0] if weight else None, axes))


def _part_look_on_a_gpu(x, shift, *weight, axes):
    jointly = not jnp.iscomplexobj(x) and joint_sums_pay(x, axes)
    return part_look(x, shift, *weight, axes=axes, jointly=int(jointly))


def _look_on_one_gpu(x, shift, *weight, axes):
    """The results of `guarded_look` without a conditional, for whose predicate the host of a GPU would wait.

    On an H100 the waits took longer than reading a sixteenth of the array twice.
    """
    known = any(isinstance(x.shape[a], int) for a in axes)
    return (_part_look_on_a_gpu if known else guarded_look)(x, shift, *weight, axes=axes)


def _group_look_on_gpus(x, shift, *weight, axes, devices):
    return group_look(x, shift, *weight, axes=axes, devices=devices, on_gpus=True)


# The reduced axes may be divided among devices, so that no part of the array can be picked out without communication.
read_anywhere: PlatformFunction = PlatformFunction(
    "bnjax_moments",
    guarded_look,
    cpu=slab_look,
    one_gpu=_look_on_one_gpu,
    several=group_look,
    several_gpus=_group_look_on_gpus,
    taylor=_exact,
    first_is_full=True,
)
# Each array of several, such as an example under `vmap`, lies on one device, and each may be far from the shift.
read_locally: PlatformFunction = PlatformFunction(
    "bnjax_part_moments",
    part_look,
    cpu=slab_look,
    cuda=_part_look_on_a_gpu,
    taylor=_exact,
    first_is_full=True,
)
