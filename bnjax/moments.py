"""First and second moments of a batch: of one array, merged, over devices.

    weight = sum_i w_i        mean = sum_i w_i x_i / weight        var = sum_i w_i |x_i - mean|^2 / weight

An array is read once, around a shift c that is known before it is, such as the running mean:

    mean = c + E[x - c]       var = E|x - c|^2 - |E[x - c]|^2

With r = |mean - c|^2 / var, the two terms of `var` are (1 + r) var and r var, so that rounding errors of relative size
e in the sums become a relative error of about e (1 + r) in `var`, and of e sqrt(1 + r) standard deviations in `mean`.
A guard keeps r to 8, per feature: where a feature has more, the moments are taken again in two reads, around the mean
that a plain sum gives. So the errors grow with |mean| / std once, as the rounding of the input does, whatever c is.
The textbook E|x|^2 - |E x|^2 is c = 0 without a guard, and loses the square of |mean| / std.

Values that already are means of parts, with variances of their own, pool to (Chan, Golub & LeVeque, 1983)

    var = sum_i w_i (var_i + |mean_i - mean|^2) / weight

so one function, `_pool`, serves the second look at an array, the shards of a mesh and the steps of an accumulation.

This module knows neither scale and bias nor running statistics.
"""

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from bnjax import checks
from bnjax.reductions import cut, primitive, sums, two_sums

Groups = tuple[tuple[int, ...], ...] | None

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


class Support(NamedTuple):
    """What stands behind a weight: `valid`, the places of weight > 0, and `square`, the sum of squared weights.

    Without real-valued weights both equal the weight.
    """

    valid: Array
    square: Array


def wider(dtype: Any, other: Any = jnp.float32) -> Any:
    """The dtype of the two with more bits, `dtype` where they are equal; both real or both complex, or other real."""
    return max(jnp.dtype(dtype), jnp.dtype(other), key=lambda d: jnp.finfo(d).bits)


def batch_moments(
    x: Array,
    *,
    axis: checks.Axis = -1,
    mask: Array | None = None,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Exact moments of `x` over all axes but the feature axes, and over named mapped axes.

        mean = sum_i w_i x_i / sum_i w_i        var = sum_i w_i |x_i - mean|^2 / sum_i w_i

    with w the mask, or 1. Devices are merged by weight (Chan, Golub & LeVeque, 1983, equation 2.1), so unequal and
    empty shards are exact. The relative error of `var`, and the error of `mean` in units of the standard deviation,
    grow with |mean| / std once. `x` is read once, around 0, and twice more where |mean|^2 > 8 var for some feature
    (`bnjax.bn_apply` reads it around the running mean).

    Args:
      x: floating or complex, any shape.
      axis: the feature axis of `x`, or several; the result has their sizes in increasing axis order.
      mask: of x's rank and broadcastable to it, boolean or weights >= 0 (a negative one counts as 0). Where it is 0,
        `x` may hold anything, NaN included. It is not differentiated.
      axis_name: mapped axis, or several, whose devices or examples share their statistics: one gather of
        3 x features numbers a device (5 with real-valued weights), and one psum of 2 x features for the derivative.
      axis_index_groups: as in `jax.lax.psum`; each group has moments of its own.

    Returns:
      Moments in float32 or x's wider dtype; `mean` is complex for complex `x`, the others are real.

    Raises:
      TypeError, ValueError: for an integer `x`, an axis out of range or repeated, a mask that does not broadcast to
        `x`, a name that is not mapped, or groups that do not hold each index once.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0], [8.0, jnp.nan]])
      >>> bnjax.batch_moments(x, mask=jnp.array([[True], [True], [False]])).mean
      Array([ 2., 10.], dtype=float32)
    """
    groups = checks.index_groups(axis_index_groups)
    return _batch_moments(x, mask, axis=checks.static_axis(axis), names=checks.axis_names(axis_name), groups=groups)


@partial(jax.jit, static_argnames=("axis", "names", "groups"), inline=True)
def _batch_moments(x, mask, *, axis, names, groups):
    checks.inexact("batch_moments", "x", x)
    features = checks.feature_axes("batch_moments", x, axis)
    checks.weights("batch_moments", mask, x)
    checks.bound_axes("batch_moments", names, groups)
    return supported_moments(x.astype(wider(x.dtype)), mask, features, names, groups, dtype=x.dtype)[0]


def merge(*moments: Moments) -> Moments:
    """The moments of all values behind several moments, as if they had been one batch.

        weight = sum_i weight_i        mean = sum_i weight_i mean_i / weight
        var = sum_i weight_i (var_i + |mean_i - mean|^2) / weight          (Chan, Golub & LeVeque, 1983)

    Associative and commutative up to rounding; moments of weight 0 change nothing.

    Args:
      *moments: one or more, of equal shapes.

    Returns:
      Moments of that shape.

    Raises:
      ValueError: without arguments, or if shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> x = jnp.arange(10.0).reshape(10, 1)
      >>> bnjax.merge(bnjax.batch_moments(x[:3]), bnjax.batch_moments(x[3:]))
      Moments(weight=Array([10.], dtype=float32), mean=Array([4.5], dtype=float32), var=Array([8.25], dtype=float32))
    """
    if not all(isinstance(m, Moments) for m in moments):
        raise TypeError(
            f"merge(...): expected Moments as arguments, got {[type(m).__name__ for m in moments]}. "
            "Unpack a list: merge(*list)."
        )
    shapes = {np.shape(leaf) for m in moments for leaf in m}
    if len(shapes) != 1:
        raise ValueError(
            f"merge(...): expected one or more moments of one shape, got {len(moments)} with shapes {sorted(shapes)}. "
            "Merge moments of the same features."
        )
    weight, mean, var = (jnp.stack(leaves) for leaves in zip(*moments, strict=True))
    return _pool(weight, mean, var, (0,))


def supported_moments(
    x: Array,
    mask: Array | None,
    features: tuple[int, ...],
    names: tuple[Hashable, ...],
    groups: Groups,
    *,
    dtype: Any,
    shift: Array | None = None,
    divided: bool = True,
) -> tuple[Moments, Support]:
    """The moments of `x` and their support.

    Args:
      x: of 32 bits or more.
      mask, features, names, groups: as `batch_moments` has them, checked and in one spelling.
      dtype: that of `x` before it was widened, in which a second look reads it.
      shift: a guess of the mean, of the shape of the features, such as the running mean; None is 0. It changes how much
        is read, never the result.
      divided: whether the reduced axes may be divided among devices.
    """
    if mask is not None and mask.dtype != bool:
        mask = lax.stop_gradient(mask.astype(jnp.finfo(x.dtype).dtype))
    axes = tuple(a for a in range(x.ndim) if a not in features)
    mesh, mapped = _kinds(names, groups)
    if shift is None:
        shift = jnp.zeros([x.shape[a] for a in features], x.dtype)
    shift = shift if jnp.iscomplexobj(x) else shift.real
    shift = _sharded_as(x, jnp.expand_dims(lax.stop_gradient(shift).astype(x.dtype), axes))
    look = Look(dtype, guarded=bool(divided and not mapped))
    moments, support = _moments(x, mask, shift, axes, mesh, groups if mesh else None, look)
    if mapped:
        # Axes of vmap stay outside the derivative rule: under jit it is traced where their names are out of scope. No
        # data move along them, so that autodiff may transpose this merge as it likes.
        moments, support = _named(_merge_over(mapped, groups, moments, support))
    return moments, Support(moments.weight, moments.weight) if support is None else support


class Look(NamedTuple):
    """How an array is looked at: in which dtype, and around a shift with a guard or around the mean of a part."""

    dtype: Any
    guarded: bool


def _sharded_as(x, few):
    """`few`, of x's rank and of size 1 where it is not x's, sharded as `x` is, which explicit sharding wants."""
    sharding = jax.typeof(x).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return few
    spec = [None if n == 1 else name for n, name in zip(few.shape, sharding.spec, strict=True)]
    return jax.sharding.reshard(few, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec)))


def merge_along(moments: Moments, support: Support, axis: int) -> tuple[Moments, Support]:
    """Those of the parts of a batch that lie along an array axis, together."""
    return _pool(*moments, (axis,)), Support(*(jnp.sum(leaf, axis) for leaf in support))


def merge_over(
    moments: Moments, support: Support | None, names: tuple[Hashable, ...], groups: Groups
) -> tuple[Moments, Support]:
    """Those of all indices of named axes together; without a support that differs from the weight less is sent."""
    for kind in _kinds(names, groups):
        if kind:
            moments, support = _merge_over(kind, groups, moments, support)
    return moments, Support(moments.weight, moments.weight) if support is None else support


def _kinds(names, groups):
    """The names of axes of a mesh, and those of axes of vmap."""
    mesh = tuple(name for name in names if _on_mesh(name))
    mapped = tuple(name for name in names if name not in mesh)
    if groups is not None and mesh and mapped:
        raise ValueError(
            f"axis_index_groups={groups}: the axes {mesh} lie on a mesh and {mapped} are mapped by vmap. "
            "Pass groups over axes of one kind."
        )
    return mesh, mapped


def autodiff_moments(x, mask, axes, names, groups):
    """`_moments` without its derivative rule: the tests' oracle for it."""
    return _completed(_pool(mask, x, None, axes), x, mask, axes, names, groups)


def _completed(moments, x, mask, axes, names, groups):
    """The moments of `x` with their support, over named axes too."""
    support = None
    if mask is not None and mask.dtype != bool:
        parts = (mask > 0).astype(mask.dtype), _weigh(mask, mask)
        support = Support(*(_sum_as(x.shape, part, axes, moments.weight) for part in parts))
    return _merge_over(names, groups, moments, support) if names else (moments, support)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def _moments(x, mask, shift, axes, names, groups, look):
    """Moments, and their support where it differs from the weight; `mask` is boolean, real of x's width, or None."""
    if math.prod(x.shape[a] for a in axes) < 2 or not (mask is None or look.guarded):
        moments = _pool(mask, x, None, axes)
    elif mask is None and not look.guarded:
        moments = Moments(*_whole_moments.bind(x.astype(look.dtype), shift, axes=axes))
    else:
        masks = [] if mask is None else [mask]
        moments = Moments(*_local_moments.bind(x.astype(look.dtype), shift, *masks, axes=axes))
    return _completed(moments, x, mask, axes, names, groups)


@_moments.defjvp
def _moments_jvp(axes, names, groups, look, primals, tangents):
    # dmean = E[dx] and dvar = 2 E[Re(conj(x - mean) dx)]: what the sums were taken around drops out, and what is left
    # transposes to one elementwise pass. Both sums travel in one psum, forward and, transposed, backward.
    x, mask, _ = primals
    moments, support = _named(_moments(*primals, axes, names, groups, look))
    dx, *_ = tangents
    mean = jnp.expand_dims(moments.mean, axes)
    if mask is not None:
        x = jnp.where(valid(mask, x), x, mean)  # a NaN there times a zero cotangent would be a NaN
    both = [jnp.squeeze(t, axes).astype(x.dtype) for t in sums(_weigh(mask, dx), x, mean, axes)]
    dmean, dvar = (t / _nonzero(moments.weight).astype(x.dtype) for t in _total(both, names, groups))
    dmoments = Moments(jnp.zeros_like(moments.weight), dmean, 2 * dvar.real)
    return (moments, support), (dmoments, jax.tree.map(jnp.zeros_like, support))


# The guard. Sums by trees, as TPUs and GPUs take them, round by about eps, which becomes 9 eps at the most; what
# rounding the input does to a variance is as large. Where `var` itself is not far above (1024 eps mean)^2, as for a
# feature that is constant, |mean - c| may be as large: its square times eps is less than rounding the mean to eps does.
NEAR = 8.0
ROUNDED = 1024.0


def _guarded_moments(x, shift, *mask, axes):
    """Moments in one read of `x` around the shift, and in two more where that is too far from the mean.

    `x` may be of half precision, `shift` has the dtype of the result and is broadcastable to `x`.
    """
    weights = mask[0] if mask else None
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    (total, mean, var), offset = _around(x, shift, weights, axes)
    rounding = ROUNDED * jnp.finfo(var.dtype).eps * jnp.abs(mean)
    near = (_abs_square(offset) <= NEAR * var + rounding * rounding) & jnp.isfinite(var)

    def around_the_mean(x, mean, var):
        exact = _pool(weights, x.astype(shift.dtype), None, axes)
        return exact.mean + lax.full_like(mean, 0), exact.var + lax.full_like(var, 0)  # and sharded as those

    # Two rules of XLA: a conditional stays one if a branch does nothing, else it may become a select, which computes
    # both; and what enters it is in memory, so that `x` enters before it is widened.
    mean, var = lax.cond(jnp.all(near), lambda x, mean, var: (mean, var), around_the_mean, x, mean, var)
    return Moments(total, mean, jnp.maximum(var, 0))


def _group_moments(x, shift, *, axes):
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
    offset = jnp.sum(_weigh(weights, centered), axes)
    total = _total_weight(x.shape, weights, axes, offset)
    share = _share(total, offset.dtype)
    offset *= share
    var = jnp.sum(_weigh(weights, _abs_square(centered)), axes) * share.real - _abs_square(offset)
    return Moments(total, jnp.where(total > 0, jnp.squeeze(shift, axes) + offset, 0), var), offset


def _pool(weight, mean, var, axes):
    """Moments over `axes` of values `mean` with weights (None: 1 each) and variances (None: 0 each)."""
    plain = jnp.sum(_weigh(weight, mean), axes)
    total = _named(_total_weight(mean.shape, weight, axes, plain))
    share = _share(total, mean.dtype)
    pivot = _named(plain * share)
    centered = mean - jnp.expand_dims(pivot, axes)
    square = _abs_square(centered) if var is None else var + _abs_square(centered)
    # The pivot carries the rounding of a plain sum; the mean around it carries the rounding of one that is near 0.
    shift = _named(jnp.sum(_weigh(weight, centered), axes) * share)
    spread = jnp.sum(_weigh(weight, square), axes) * share.real
    var = spread - _abs_square(shift)
    # Rounding may leave it below 0. Not jnp.maximum, whose derivative is a half at 0 and nothing below.
    return Moments(total, pivot + shift, var - lax.stop_gradient(jnp.minimum(var, 0)))


def _total_weight(shape, weight, axes, like):
    """The weight of all places of an array, per feature; real, and sharded as `like`."""
    ones = jnp.ones((1,) * len(shape) if weight is None else weight.shape, like.real.dtype)
    return _sum_as(shape, _weigh(weight, ones), axes, like.real)


def _share(total, dtype):
    return (1 / _nonzero(total)).astype(dtype)


def _moments_on_cpu(x, shift, *mask, axes):
    """As `_guarded_moments`, in one sum around the mean of a sixteenth of the values; under a mask, in two reads.

    The mean of a fraction f is at most sqrt((1 - f) / f) standard deviations from the mean of all: around it `var`
    loses that much more, whatever the data.
    """
    x = x.astype(shift.dtype)
    parts = None if mask or jnp.iscomplexobj(x) else cut(16, axes, x)
    if parts is None:
        return _pool(mask[0] if mask else None, x, None, axes)
    (slabs,), axis, _, rest = parts
    pivot = jnp.expand_dims(jnp.mean(lax.index_in_dim(slabs, 0, axis, keepdims=False), rest), axes)
    both = two_sums(lambda x, pivot: (x - pivot, (x - pivot) ** 2), 16, axes, x, pivot)
    weight = math.prod(x.shape[a] for a in axes)
    offset, spread = (v / weight for v in both)
    var = jnp.maximum(spread - offset * offset, 0)
    return Moments(*(jnp.squeeze(v, axes) for v in (jnp.full_like(var, weight), pivot + offset, var)))


_local_moments = primitive("bnjax_moments", _guarded_moments, cpu=_moments_on_cpu, first_is_full=True)
_whole_moments = primitive("bnjax_group_moments", _group_moments, cpu=_moments_on_cpu, first_is_full=True)

_named = partial(checkpoint_name, name=CHECKPOINT_NAME)


def valid(weight, values):
    """Where the weight is not 0, sharded as `values`, which select requires under explicit sharding."""
    return (weight if weight.dtype == bool else weight > 0) & lax.full_like(values, True, bool)


def _weigh(weight, values):
    """`values` times `weight`, and 0 where the weight is, whatever stands there."""
    if weight is None:
        return values
    weighed = values if weight.dtype == bool else weight.astype(values.dtype) * values
    return jnp.where(valid(weight, values), weighed, 0)


def _sum_as(shape, values, axes, like):
    """The sum over `axes` of `values` broadcast to `shape`, without the broadcast, and sharded as `like`."""
    repeats = math.prod(shape[a] for a in axes if values.shape[a] != shape[a])
    return jnp.sum(values, axes) * repeats + lax.full_like(like, 0)


def _nonzero(weight):
    return jnp.where(weight > 0, weight, 1)


def _abs_square(values):
    return jnp.real(jnp.conj(values) * values)


def _merge_over(names, groups, moments, support):
    """Moments and support of all indices of the mapped axes together, or of the own group."""
    leaves = moments if support is None else moments + support
    if _on_mesh(names[0]):  # in one collective
        rows = _gather(jnp.stack([leaf.astype(moments.mean.dtype) for leaf in leaves]), names, groups)
        gathered = [rows[:, i] if i == 1 else rows[:, i].real for i in range(len(leaves))]
    else:
        gathered = [_gather(leaf, names, groups) for leaf in leaves]
    weight, mean, var, *rest = gathered
    return _pool(weight, mean, var, (0,)), Support(*(jnp.sum(leaf, 0) for leaf in rest)) if rest else None


def _total(rows, names, groups):
    """The sums of `rows` over the mapped axes, or over the own group, together."""
    if not names:
        return rows
    rows = jnp.stack(rows)
    return lax.psum(_varying(rows, names), names) if groups is None else jnp.sum(_gather(rows, names, groups), 0)


def _gather(rows, names, groups):
    """The `rows` of every index of the mapped axes, stacked; with groups those of the own group, padded by zeros."""
    gathered = rows
    if _on_mesh(names[0]):
        # One collective serves any number of mesh axes; "invarying" types its result as replicated.
        to = "invarying" if groups is None else "varying"
        gathered = lax.all_gather(_varying(rows, names), names, to=to)
    else:
        for name in reversed(names):
            try:
                gathered = lax.all_gather(gathered, name)
            except AssertionError as error:  # without a text of its own
                raise ValueError(
                    f"axis_name={name!r}: JAX has no collectives over an axis of vmap inside shard_map with "
                    "check_vma=True. Pass check_vma=False to shard_map, or shard that axis too."
                ) from error
        gathered = gathered.reshape(-1, *rows.shape)
    if groups is None:
        return gathered
    members = np.full((len(gathered), max(map(len, groups))), -1)
    for group in groups:
        members[list(group), : len(group)] = group
    own = jnp.asarray(members)[lax.axis_index(names)]
    return jnp.where(own.reshape(-1, *(1,) * rows.ndim) >= 0, gathered[own], 0)


def _varying(rows, names):
    """`rows`, typed as varying over mesh axes as collectives want them; they are not where x is replicated."""
    return rows + (0 * lax.axis_index(names)).astype(rows.dtype)


def _on_mesh(name):
    """Whether a mapped axis is one of shard_map's or pmap's, not of vmap's."""
    return name in jax.sharding.get_abstract_mesh().manual_axes
