"""First and second moments of a batch: of one array, merged, over devices.

    weight = sum_i w_i        mean = sum_i w_i x_i / weight        var = sum_i w_i |x_i - mean|^2 / weight

Values that already are means of parts, with variances of their own, pool to (Chan, Golub & LeVeque, 1983)

    var = sum_i w_i (var_i + |mean_i - mean|^2) / weight

so one function, `pool`, serves the shards of a mesh, the steps of an accumulation and a second look at an array. How an
array is read is in `array_moments.py`.

This module knows neither scale and bias nor running statistics.
"""

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.array_moments import (
    Moments,
    grouped_moments,
    guarded_moments,
    is_real,
    mean_weight,
    named,
    nonzero,
    pool,
    pooled,
    serializable,
    sharded_as,
    sum_as,
    valid,
    weigh,
)
from bnjax.core.reductions import sums

Groups = tuple[tuple[int, ...], ...] | None


@serializable
class Support(NamedTuple):
    """The number of places of weight > 0, and the mean weight behind a value, sum_i w_i^2 / sum_i w_i.

    Without real-valued weights these are the weight and 1. The number of equal weights that would average as well is
    weight / mean_weight (Kish, 1965). The sum of squares itself would leave the floating range for weights far from 1.
    """

    valid: Array
    mean_weight: Array


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
    axis, names = checks.static_axis("batch_moments", axis), checks.axis_names("batch_moments", axis_name)
    groups = checks.index_groups("batch_moments", axis_index_groups)
    return _batch_moments(x, mask, axis=axis, names=names, groups=groups)


@partial(jax.jit, static_argnames=("axis", "names", "groups"), inline=True)
def _batch_moments(x, mask, *, axis, names, groups):
    checks.inexact("batch_moments", "x", x)
    features = checks.feature_axes("batch_moments", x, axis)
    checks.weights("batch_moments", mask, x)
    checks.bound_axes("batch_moments", names, groups)
    return supported_moments(x.astype(wider(x.dtype)), mask, features, names, groups, dtype=x.dtype)[0]


def merge_moments(*moments: Moments) -> Moments:
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
      >>> bnjax.merge_moments(bnjax.batch_moments(x[:3]), bnjax.batch_moments(x[3:]))
      Moments(weight=Array([10.], dtype=float32), mean=Array([4.5], dtype=float32), var=Array([8.25], dtype=float32))
    """
    if not all(isinstance(m, Moments) for m in moments):
        raise TypeError(
            f"merge_moments(...): expected Moments as arguments, got {[type(m).__name__ for m in moments]}. "
            "Unpack a list: merge_moments(*list)."
        )
    shapes = {np.shape(leaf) for m in moments for leaf in m}
    if len(shapes) != 1:
        raise ValueError(
            f"merge_moments(...): expected one or more moments of one shape, got {len(moments)} with shapes "
            f"{sorted(shapes)}. Merge moments of the same features."
        )
    weight, mean, var = (jnp.stack(leaves) for leaves in zip(*moments, strict=True))
    return pool(weight, mean, var, (0,))


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
    mask = None if mask is None else sharded_as(x, mask)
    if is_real(mask):
        mask = lax.stop_gradient(mask.astype(jnp.finfo(x.dtype).dtype))
    axes = tuple(a for a in range(x.ndim) if a not in features)
    mesh, mapped = _kinds(names, groups)
    if shift is None:
        shift = jnp.zeros([x.shape[a] for a in features], x.dtype)
    shift = shift if jnp.iscomplexobj(x) else shift.real
    shift = sharded_as(x, jnp.expand_dims(lax.stop_gradient(shift).astype(x.dtype), axes))
    look = Look(dtype, guarded=bool(divided and not mapped))
    moments, support = _moments(x, mask, shift, axes, mesh, groups if mesh else None, look)
    if mapped:
        # Axes of vmap stay outside the derivative rule: under jit it is traced where their names are out of scope. No
        # data move along them, so that autodiff may transpose this merge as it likes.
        moments, support = named(_merge_over(mapped, groups, moments, support))
    return moments, _with_support(moments, support)


def _with_support(moments, support):
    """The support, None where each valid place has weight 1."""
    return Support(moments.weight, lax.full_like(moments.weight, 1)) if support is None else support


class Look(NamedTuple):
    """How an array is looked at: in which dtype, and around a shift with a guard or around the mean of a part."""

    dtype: Any
    guarded: bool


def merge_along(moments: Moments, support: Support, axis: int) -> tuple[Moments, Support]:
    """Those of the parts of a batch that lie along an array axis, together."""
    merged = pool(*moments, (axis,))
    weight = moments.weight
    own = mean_weight(weight.shape, weight, support.mean_weight, (axis,), merged.weight)
    return merged, Support(jnp.sum(support.valid, axis), own)


def merge_over(
    moments: Moments, support: Support | None, names: tuple[Hashable, ...], groups: Groups
) -> tuple[Moments, Support]:
    """Those of all indices of named axes together; without a support that differs from the weight less is sent."""
    for kind in _kinds(names, groups):
        if kind:
            moments, support = _merge_over(kind, groups, moments, support)
    return moments, _with_support(moments, support)


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
    return _completed(pooled(mask, x, axes), x, mask, axes, names, groups)


def _completed(results, x, mask, axes, names, groups):
    """The moments of `x` with their support, over named axes too; results are moments and, if real, the mean weight."""
    moments, support = Moments(*results[:3]), None
    if is_real(mask):
        valid_places = sum_as(x.shape, (mask > 0).astype(mask.dtype), axes, moments.weight)
        support = Support(valid_places, *results[3:])
    return _merge_over(names, groups, moments, support) if names else (moments, support)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def _moments(x, mask, shift, axes, names, groups, look):
    """Moments, and their support where it differs from the weight; `mask` is boolean, real of x's width, or None."""
    places = math.prod(x.shape[a] for a in axes)
    if (isinstance(places, int) and places < 2) or not (mask is None or look.guarded):
        results = pooled(mask, x, axes)
    elif mask is None and not look.guarded:
        results = grouped_moments.bind(x.astype(look.dtype), shift, axes=axes)
    else:
        masks = [] if mask is None else [mask]
        results = guarded_moments.bind(x.astype(look.dtype), shift, *masks, axes=axes)
    return _completed(results, x, mask, axes, names, groups)


@_moments.defjvp
def _moments_jvp(axes, names, groups, look, primals, tangents):
    # dmean = E[dx] and dvar = 2 E[Re(conj(x - mean) dx)]: what the sums were taken around drops out, and what is left
    # transposes to one elementwise pass. Both sums travel in one psum, forward and, transposed, backward.
    x, mask, _ = primals
    moments, support = named(_moments(*primals, axes, names, groups, look))
    dx, *_ = tangents
    mean = jnp.expand_dims(moments.mean, axes)
    if mask is not None:
        x = jnp.where(valid(mask, x), x, mean)  # a NaN there times a zero cotangent would be a NaN
    total = nonzero(moments.weight)
    if is_real(mask):  # products with large or small weights may leave the floating range, those with shares do not
        mask, total = mask / jnp.expand_dims(total, axes), jnp.ones_like(total)
    both = [jnp.squeeze(t, axes).astype(x.dtype) for t in sums(weigh(mask, dx), x, mean, axes)]
    dmean, dvar = (t / total.astype(x.dtype) for t in _total(both, names, groups))
    dmoments = Moments(jnp.zeros_like(moments.weight), dmean, 2 * dvar.real)
    return (moments, support), (dmoments, jax.tree.map(jnp.zeros_like, support))


def _merge_over(names, groups, moments, support):
    """Moments and support of all indices of the mapped axes together, or of the own group."""
    leaves = moments if support is None else moments + support
    if _on_mesh(names[0]):  # in one collective
        rows = _gather(jnp.stack([leaf.astype(moments.mean.dtype) for leaf in leaves]), names, groups)
        gathered = [rows[:, i] if i == 1 else rows[:, i].real for i in range(len(leaves))]
    else:
        gathered = [_gather(leaf, names, groups) for leaf in leaves]
    moments = Moments(*gathered[:3])
    return (pool(*moments, (0,)), None) if support is None else merge_along(moments, Support(*gathered[3:]), 0)


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
