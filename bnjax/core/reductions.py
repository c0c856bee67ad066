"""The two reductions of batch normalization, with a lowering of their own on CPU and on CUDA GPUs.

    sums(g, x, mean)        = sum g, sum g (x - mean)          over the reduced axes
    spread(c, k, x, mean)   = c + k (x - mean)

`sums` is linear in g, `spread` in (c, k), and each is the other's transpose. `sums` is the part of the backward pass of
batch normalization that is not elementwise, and `spread` is what its forward mode adds. Their residual is `x`, which is
in memory as the output of the layer before, and not `x - mean`, which would be a second array of that size.

Batch normalization is bound by memory traffic. XLA on CPU has fast reductions with one result. For two reductions that
share an operand it first writes that operand, an array of x's size. `two_sums` avoids that write. It cuts the arrays
into slabs that are adjacent in memory, and adds the slabs up as complex numbers whose parts are the two sums. To
XLA that is elementwise work: it reads the arrays once and writes one slab. Slabs of a sharded array would be
communication, so this is for arrays that one device holds.

XLA on GPUs computes two reductions in one kernel if it splits them, which it does with more than `LONGEST` elements a
feature. For two shorter ones it writes both operands in float32 and reads them again, five times the traffic of `x` in
bfloat16. As one sum of complex numbers, `joint_sums`, they read the arrays once. If there are few features, pieces are
summed first. It is for GPUs only: XLA on CPU splits a sum of real numbers, and takes one of complex numbers over
several axes one by one, with as many roundings.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.jax_internals import PlatformFunction, transpose_each_other

# The number of slabs that one elementwise loop adds up. LLVM vectorizes the loop only if it unrolls the sum, which it
# does up to about 300 instructions, including those that XLA fuses into the loop. With 8 slabs even the
# derivative of hard_swish, which is fused into the backward pass, leaves the loop unrolled; with 12 it did not.
BACKWARD_SLABS = 8
FORWARD_SLABS = 16
# A slab is cut again, into this many slabs, while it has enough elements to add up for that to pay.
INNER_SLABS = 16
LEAST_INNER_ELEMENTS = 64
# The longest reduction over the rows of an array that XLA on GPUs does not split: its tile of 128 rows for each of the
# 32 threads of a warp.
LONGEST = 4096
# With fewer sums than this, which occupy few of the cores of an H100, XLA on GPUs writes the summands first.
LEAST_SUMS = 1024
# It does not do so if each sum has at most this many elements.
FEW = 256
# A piece has at least this many elements. The pieces of fewer would be arrays of nearly the size of `x`.
LEAST_ADDED = 16


class Slabs(NamedTuple):
    """Arrays cut along a reduced axis.

    `parts` have a new axis of slabs at position `axis`. `leftover` are the last elements, too few for another slab;
    None where there are none. `axes` remain to be reduced once the axis of slabs is summed.
    """

    parts: list[Array]
    leftover: list[Array] | None
    axis: int
    axes: tuple[int, ...]


def cut(slabs: int, axes: tuple[int, ...], *arrays: Array) -> Slabs | None:
    """`arrays` cut into `slabs` slabs, or a few fewer; None if no run of reduced axes has that many elements.

    The first run of adjacent reduced axes that is long enough becomes one axis, and that axis is cut. The first of the
    arrays has the full shape, the others may have size 1 on reduced axes.
    """
    shape = arrays[0].shape
    for start in axes:
        stop = next(a for a in range(start, len(shape) + 1) if a not in axes)
        length = math.prod(shape[start:stop])
        if start - 1 not in axes and _has_at_least(slabs, length):
            break
    else:
        return None
    # A number of slabs that divides the length leaves no remainder.
    slabs = next((n for n in range(slabs, slabs // 2, -1) if length % n == 0), slabs)
    each, over = divmod(length, slabs)

    def part(v, begin, end, *lengths):
        full = v.shape[start:stop] == shape[start:stop]
        v = v.reshape(*v.shape[:start], length if full else 1, *v.shape[stop:])
        v = lax.slice_in_dim(v, begin, end, axis=start) if full else v
        return v.reshape(*v.shape[:start], *(lengths if full else (1,) * len(lengths)), *v.shape[start + 1 :])

    merged = stop - start - 1
    return Slabs(
        parts=[part(v, 0, length - over, slabs, each) for v in arrays],
        leftover=[part(v, length - over, length, over) for v in arrays] if over else None,
        axis=start,
        axes=tuple(a for a in axes if a <= start) + tuple(a - merged for a in axes if a >= stop),
    )


def two_sums(
    pair: Callable[..., tuple[Array, Array]], slabs: int, axes: tuple[int, ...], *arrays: Array
) -> tuple[Array, Array]:
    """The sums over `axes`, which stay with size 1, of the two arrays that `pair` makes of `arrays` elementwise."""
    z = _sum_by_slabs(lambda *arrays: lax.complex(*pair(*arrays)), slabs, slabs, axes, *arrays)
    return jnp.expand_dims(z.real, axes), jnp.expand_dims(z.imag, axes)


def _sum_by_slabs(values, slabs, least, axes, *arrays):
    """The sum over `axes` of the complex `values(*arrays)`: slabs are added up, then the resulting slab likewise.

    The conjugate at each level separates its sum from the next level's. Without it XLA fuses both into one loop, which
    is too long to be unrolled.
    """
    count = math.prod(arrays[0].shape[a] for a in axes)
    pieces = cut(slabs, axes, *arrays) if _has_at_least(least, count) else None
    if pieces is None:
        return jnp.sum(values(*arrays), axes)
    slab = jnp.sum(values(*pieces.parts), pieces.axis)
    total = jnp.conj(_sum_by_slabs(jnp.conj, INNER_SLABS, LEAST_INNER_ELEMENTS, pieces.axes, slab))
    if pieces.leftover is None:
        return total
    # The leftover is short; cutting it too would double the time to compile.
    return total + jnp.sum(values(*pieces.leftover), pieces.axes)


def _has_at_least(least, count):
    """Whether at least that many elements are known to exist; a symbolic dimension of `jax.export` is not known."""
    return isinstance(count, int) and count >= least


def joint_sums_pay(x: Array, axes: tuple[int, ...], devices: int = 1, *, parts: int = 1) -> bool:
    """Whether XLA on GPUs moves less for `joint_sums` than for two sums.

    Args:
      x: an array of the shape of what is summed.
      axes: the reduced axes.
      devices: the number of devices that hold the array.
      parts: the number of devices that the reduced axes are divided among.
    """
    sums, elements = _sums_and_elements(x.shape, axes)
    if not isinstance(sums, int) or not isinstance(elements, int) or elements > LONGEST * parts:
        return False
    return elements <= FEW * parts or _pieces(x.shape, axes, devices)[1] * sums >= LEAST_SUMS * devices


def _sums_and_elements(shape, axes):
    """How many sums there are, and how many elements each adds up."""
    return tuple(math.prod(n for a, n in enumerate(shape) if (a in axes) == reduced) for reduced in (False, True))


def joint_sums(first: Array, second: Array, axes: tuple[int, ...], devices: int = 1) -> tuple[Array, Array]:
    """The sums over `axes` of two real arrays of one shape, which so many devices hold, taken together."""
    both = lax.complex(first, second)
    axis, number = _pieces(both.shape, axes, devices)
    if number > 1:
        both = both.reshape(*both.shape[:axis], number, both.shape[axis] // number, *both.shape[axis + 1 :])
        pieces = jnp.sum(both, [a + (a >= axis) for a in axes])
        # Without the conjugate XLA makes one sum of the two.
        both = jnp.conj(jnp.sum(jnp.conj(pieces), axis - sum(a < axis for a in axes)))
    else:
        both = jnp.sum(both, axes)
    return both.real, both.imag


def _pieces(shape, axes, devices):
    """A reduced axis, and the number of pieces that it is cut into for `LEAST_SUMS` sums on each device, or for less.

    A device that holds a part of the axis holds whole pieces, whatever number of devices the axis is divided among. Of
    several devices only the first axis is cut, in general that of the batch: if another one was, the devices would
    merge pieces.
    """
    sums, elements = _sums_and_elements(shape, axes)
    if not isinstance(sums, int) or not 0 < sums < LEAST_SUMS * devices:
        return 0, 1
    cuts = []
    for axis in axes if devices == 1 else axes[:1]:
        common = math.gcd(shape[axis], devices)
        fitting = [n for n in range(1, elements // LEAST_ADDED + 1) if shape[axis] % n == 0 and n % common == 0]
        enough = [n for n in fitting if n * sums >= LEAST_SUMS * devices]
        cuts += [(axis, min(enough))] if enough else [(axis, max(fitting))] if fitting else []
    return max(cuts, key=lambda cut: min(cut[1] * sums, LEAST_SUMS * devices), default=(0, 1))


def _plain_sums(g, x, mean, *, axes):
    return jnp.sum(g, axes, keepdims=True), jnp.sum(jnp.real(jnp.conj(x - mean) * g), axes, keepdims=True)


def _cpu_sums(g, x, mean, *, axes):
    return two_sums(lambda x, g, mean: (g, g * (x - mean)), BACKWARD_SLABS, axes, x, g, mean)


def _gpu_sums(g, x, mean, *, axes, devices=1):
    if not joint_sums_pay(x, axes, devices, parts=devices):
        return _plain_sums(g, x, mean, axes=axes)
    return tuple(jnp.expand_dims(v, axes) for v in joint_sums(g, g * (x - mean), axes, devices))


def _plain_spread(c, k, x, mean, *, axes):
    return (c + k * (x - mean),)


def _cuda_spread(c, k, x, mean, *, axes):
    # One operation less for each element. XLA's cost model for GPUs then recomputes an activation's derivative in both
    # sweeps of the backward pass; otherwise it writes that derivative once and reads it twice. The rounding of k x and
    # of k mean is no larger than the rounding of x, and where all x are equal k is 0.
    return ((c - k * mean) + k * x,)


_sums = PlatformFunction("bnjax_sums", _plain_sums, cpu=_cpu_sums, one_gpu=_gpu_sums, several_gpus=_gpu_sums, linear=1)
_spread = PlatformFunction("bnjax_spread", _plain_spread, cuda=_cuda_spread, linear=2)
transpose_each_other(_sums, _spread)


def sums(g: Array, x: Array, mean: Array, axes: tuple[int, ...]) -> tuple[Any, ...]:
    """sum g and sum Re(conj(x - mean) g) over `axes`, which stay with size 1; g of x's shape, mean of x's rank."""
    return (_plain_sums if jnp.iscomplexobj(x) else _sums)(g, x, mean, axes=axes)


def spread(c: Array | None, k: Array | None, x: Array, mean: Array) -> Array | None:
    """c + k (x - mean) for c and k of x's rank; None is 0, so that without k the result is c as it came."""
    if k is None:
        return c
    c, k = jnp.broadcast_arrays(jnp.zeros_like(k) if c is None else c, k)
    axes = tuple(a for a in range(x.ndim) if k.shape[a] != x.shape[a])
    return (_plain_spread if jnp.iscomplexobj(x) else _spread)(c, k, x, mean, axes=axes)[0]
