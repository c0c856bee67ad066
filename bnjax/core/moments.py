"""First and second moments of a batch, from one part of it or from several, over devices too, with their derivative.

    weight = sum_i w_i        mean = sum_i w_i x_i / weight        var = sum_i w_i |x_i - mean|^2 / weight

Moments of parts merge to the moments of the whole (Chan, Golub & LeVeque, 1983)

    var = sum_i w_i (var_i + |mean_i - mean|^2) / weight

which serves the shards of a mesh, the examples of `vmap`, the steps of an accumulation and the groups of a ghost batch.
How one part is read is in `reading.py`, how parts merge in `merging.py`, and over devices in `mesh_sums.py`.

This module knows neither scale and bias nor running statistics.
"""

import math
import warnings
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.collectives import Groups, gather, kinds_of_axes, sum_over
from bnjax.core.domains import Domains
from bnjax.core.merging import merge, merged, support_of
from bnjax.core.mesh_sums import merge_over_mesh
from bnjax.core.reading import read_anywhere, read_locally, two_looks
from bnjax.core.records import Collected, Moments
from bnjax.core.reductions import sums
from bnjax.core.residuals import named
from bnjax.core.sharding import sharded_as
from bnjax.core.weights import is_real, nonzero, relative, valid, weigh


def wider(dtype: Any, other: Any = jnp.float32) -> Any:
    """The dtype of the two with more bits, `dtype` where they are equal; both real or both complex, or other real."""
    return max(jnp.dtype(dtype), jnp.dtype(other), key=lambda d: jnp.finfo(d).bits)


def widened(x: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """`x` with 32 bits or more, and its mask: None, boolean, or real-valued of that width; checked before.

    The caller widens once, so that the gradient of `x` is summed before it is rounded.
    """
    wide = x.astype(wider(x.dtype))
    if mask is not None:
        mask = sharded_as(x, mask)
        if is_real(mask):
            mask = lax.stop_gradient(mask.astype(jnp.finfo(wide.dtype).dtype))
    return wide, mask


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

    with w the mask, or 1. Devices are merged by weight (Chan, Golub & LeVeque, 1983, equation 2.1), so that unequal and
    empty shards are exact. The relative error of `var`, and the error of `mean` in standard deviations, grow linearly
    with |mean| / std, which is the least possible for a rounded input. `x` is read as by `bnjax.bn_apply`, but around 0
    in place of the running mean. On TPUs it is read once, and twice more if |mean|^2 > 8 var for any feature.

    Args:
      x: floating or complex, any shape.
      axis: the feature axis of `x`, or several; the result has their sizes in increasing axis order.
      mask: array of x's rank that broadcasts to it, boolean or weights >= 0. A negative weight is an error, or counts
        as 0 if it is known only at run time. Masked elements, even NaN, do not affect the result. The mask is not
        differentiated.
      axis_name: mapped axis, or several, whose devices or examples share their statistics. The collectives are as in
        `bnjax.bn_apply`.
      axis_index_groups: groups of indices as in `jax.lax.psum`; each group has its own moments.

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
    checks.inexact("batch_moments", "x", x)
    checks.known_weights("batch_moments", mask)
    features = checks.feature_axes("batch_moments", x, axis)
    names = checks.axis_names("batch_moments", axis_name)
    groups = checks.index_groups("batch_moments", axis_index_groups)
    return _batch_moments(x, mask, features=features, names=names, groups=groups)


@partial(jax.jit, static_argnames=("features", "names", "groups"), inline=True)
def _batch_moments(x, mask, *, features, names, groups):
    checks.weights("batch_moments", mask, x)
    checks.bound_axes("batch_moments", names, groups)
    wide, mask = widened(x, mask)
    return collect(wide, mask, features, x.dtype, names, groups).moments


def merge_moments(*moments: Moments) -> Moments:
    """The moments of one batch whose parts have these moments.

        weight = sum_i weight_i        mean = sum_i weight_i mean_i / weight
        var = sum_i weight_i (var_i + |mean_i - mean|^2) / weight          (Chan, Golub & LeVeque, 1983)

    Merging is associative and commutative up to rounding; moments of weight 0 have no effect. A float32 weight counts
    to 2^24: single elements that are merged into more than that are lost, with a warning if the weights are known.
    Merge batches of elements, or small parts with each other first.

    Args:
      *moments: one or more `Moments`, of equal shapes.

    Returns:
      Moments of that shape, in the promoted dtypes.

    Raises:
      TypeError: for an argument that is not `Moments` of floating arrays.
      ValueError: without arguments, if shapes differ, or if the moments lie on different devices.

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
    for name, leaf in ((name, leaf) for m in moments for name, leaf in m._asdict().items()):
        sequence = isinstance(leaf, list | tuple)
        if sequence or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            got = type(leaf).__name__ if sequence else jnp.result_type(leaf)
            raise TypeError(
                f"merge_moments(...): expected floating arrays, got {name} of {got}. Convert it with "
                f"jnp.asarray({name}, jnp.float32)."
            )
    shapes = {np.shape(leaf) for m in moments for leaf in m}
    if len(shapes) != 1:
        raise ValueError(
            f"merge_moments(...): expected one or more moments of one shape, got {len(moments)} with shapes "
            f"{sorted(shapes)}. Merge moments of the same features."
        )
    _warn_of_lost_counts([m.weight for m in moments])
    try:
        parts = Moments(*(jnp.stack([sharded_as(leaf[0], v) for v in leaf]) for leaf in zip(*moments, strict=True)))
    except ValueError as error:
        raise ValueError(
            f"merge_moments(...): the moments cannot be put together ({str(error).splitlines()[0]}). Put all of them "
            "on the same devices first: jax.device_put(moments, sharding)."
        ) from error
    return merged(parts, (0,))


def _warn_of_lost_counts(weights):
    """Warn of a number of elements that is too small to change the sum of all, where the weights are known."""
    known = [checks.known(jnp.asarray(weight)) for weight in weights]
    numbers = np.asarray([weight for weight in known if weight is not None])
    if len(numbers) < len(weights):
        return
    total = np.sum(numbers, 0, dtype=numbers.dtype)
    lost = (numbers >= 1) & (numbers <= np.spacing(total) / 2)
    if lost.any():
        warnings.warn(
            f"merge_moments(...): a weight of {numbers[lost][0]:g} is lost beside {total.max():g}, because the next "
            f"{total.dtype} is further away. Merge small parts with each other first.",
            stacklevel=3,
        )


@jax.named_scope("bnjax.moments")
def collect(
    x: Array,
    mask: Array | None,
    features: tuple[int, ...],
    stored: Any,
    names: tuple[Hashable, ...] = (),
    groups: Groups = None,
    *,
    shift: Array | None = None,
    sharded: bool = True,
    domains: Domains | None = None,
) -> Collected:
    """The moments of a batch and their support, over the named axes too.

    Args:
      x, mask: the result of `widened`.
      features: the feature axes of `x`.
      stored: the dtype of `x` before it was widened, in which it is read.
      names, groups: the mapped axes and index groups, checked.
      shift: a guess of the mean, of the shape of the features, such as the running mean; None is 0. It changes how
        often `x` is read, never the result.
      sharded: whether the reduced axes may be sharded over devices.
      domains: the domains that the examples belong to, for the moments of each. The examples are then one of the
        feature axes, and in the result the domains are the first axis.
    """
    axes = tuple(a for a in range(x.ndim) if a not in features)
    on_mesh, on_vmap = kinds_of_axes(names, groups) if names else ((), ())
    if shift is None:
        shift = jnp.zeros([x.shape[a] for a in features], x.dtype)
    shift = shift if jnp.iscomplexobj(x) else shift.real
    shift = sharded_as(x, jnp.expand_dims(lax.stop_gradient(shift).astype(x.dtype), axes))
    anywhere = sharded and not on_vmap
    collected = _collect(x, mask, shift, domains, axes, on_mesh, groups if on_mesh else None, stored, anywhere)
    if on_vmap:
        # Merged outside the custom JVP, because the names of vmap axes are unbound when jit traces that rule. No data
        # move along these axes, so that autodiff may transpose the merge as it likes.
        collected = named(merge_over_axes(collected, on_vmap, groups))
    return _overflow_as_nan(collected)


def _overflow_as_nan(collected: Collected) -> Collected:
    """The moments with NaN for a variance whose sum of squares, valid elements x var, is near the largest number.

    There, some ways of reading x overflow to infinity, others to NaN, and others not at all. Normalized by an infinite
    variance, a feature would silently become `bias`. Below the limit, 1 / (valid x var) is a normal number, as the
    gradient needs.
    """
    moments, support = collected
    elements = moments.weight if support is None else support.valid
    var = jnp.where(elements * moments.var <= jnp.finfo(moments.var.dtype).max / 4, moments.var, jnp.nan)
    return Collected(moments._replace(var=var), support)


@partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6, 7, 8))
def _collect(x, mask, shift, domains, axes, names, groups, stored, anywhere):
    """`collect` over mesh axes: this device's part is read, and the parts are merged."""
    elements = math.prod(x.shape[a] for a in axes)
    if isinstance(elements, int) and elements < 2:
        moments = two_looks(x, mask, axes)
    else:
        read = read_anywhere if anywhere else read_locally
        moments = Moments(*read(x.astype(stored), shift, *([] if mask is None else [mask]), axes=axes))
    collected = Collected(moments, support_of(moments.weight, x.shape, mask, axes) if is_real(mask) else None)
    if domains is not None:
        collected = merge(collected, domains)
    if not names:
        return collected
    known = mask is None and domains is None and isinstance(elements, int) and elements > 0
    guess = jnp.squeeze(shift, axes) if domains is None else domains.guess
    return merge_over_axes(collected, names, groups, guess, elements if known else None)


@_collect.defjvp
def _collect_jvp(axes, names, groups, stored, anywhere, primals, tangents):
    # dmean = E[dx] and dvar = 2 E[Re(conj(x - mean) dx)]. The shift that the sums were taken around drops out, and the
    # two sums transpose to one elementwise pass. One psum sends both, forward and, transposed, backward. With domains,
    # sums over one are sums over its examples of sums over the other axes.
    x, mask, _, domains = primals
    collected = named(_collect(*primals, axes, names, groups, stored, anywhere))
    dx, *_ = tangents
    weight, mean, _ = collected.moments

    def at_elements(v):
        return jnp.expand_dims(v if domains is None else domains.rows(v), axes)

    mean = at_elements(mean)
    if mask is not None:
        x = jnp.where(valid(mask, x), x, mean)  # a masked NaN times a zero cotangent would be a NaN
    total = nonzero(weight)
    if is_real(mask):  # products with weights may leave the floating range, products with shares do not
        total, unit = relative(total, ())  # the inverse of a large total may not be a normal number
        mask, total = mask / at_elements(unit) / at_elements(total), jnp.ones_like(total)
    both = [jnp.squeeze(t, axes).astype(x.dtype) for t in sums(weigh(mask, dx), x, mean, axes)]
    if domains is not None:
        both = [domains.sum(t) for t in both]
    dmean, dvar = (t / total.astype(x.dtype) for t in sum_over(both, names, groups))
    dmoments = Moments(jnp.zeros_like(weight), dmean, 2 * dvar.real)
    return collected, Collected(dmoments, jax.tree.map(jnp.zeros_like, collected.support))


def merge_over_axes(
    part: Collected, names: tuple[Hashable, ...], groups: Groups, guess: Array | None = None, elements: Any = None
) -> Collected:
    """The moments and the support of all indices of the named axes, or of this index's group.

    Args:
      part: the moments and the support of this index.
      names, groups: the mapped axes and index groups, checked.
      guess: a guess of the mean, which affects how many collectives there are, never the result; None is 0.
      elements: the number of elements of each index, if it is the same for all and all weights are 1; else None.
    """
    on_mesh, on_vmap = kinds_of_axes(names, groups)
    if on_mesh and groups is None:
        guess = jnp.zeros_like(part.moments.mean) if guess is None else guess
        part = merge_over_mesh(part, guess, on_mesh, elements=elements)
    elif on_mesh:  # a sum over a group is a gather too
        part = merge(gather(part, on_mesh, groups), (0,))
    return merge(gather(part, on_vmap, groups), (0,)) if on_vmap else part
