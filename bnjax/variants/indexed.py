"""Batch normalization with running statistics for each of several indices: timesteps, domains, kinds of examples.

Timesteps: Cooijmans et al. (2017), section 3. Domains: Chang et al. (2019). Clean and adversarial examples: Xie et al.
(2020). The computation is `bn_apply` on the state that the index selects.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.apply import apply, bn_init
from bnjax.core.options import Options, checked
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.schedules import Momentum
from bnjax.core.sharding import is_explicit, sharded_as


def indexed_bn_init(
    features: int | Sequence[int],
    num_indices: int,
    *,
    scale: Any | None = 1.0,
    bias: Any | None = 0.0,
    dtype: Any = jnp.float32,
    indexed_params: bool = False,
) -> tuple[BNParams, BNState]:
    """Variables for `indexed_bn_apply`: running statistics for each of several indices.

    Args:
      features: as in `bnjax.bn_init`.
      num_indices: number of timesteps, domains or kinds of data, > 0.
      scale, bias, dtype: as in `bnjax.bn_init`.
      indexed_params: whether each index has its own scale and bias; by default all indices share one.

    Returns:
      `BNParams`, and a `BNState` whose arrays have shape (num_indices, *features); so have scale and bias if indexed.

    Raises:
      TypeError, ValueError: as `bnjax.bn_init`, and for a `num_indices` that is not a positive integer.

    Example:
      >>> import bnjax
      >>> params, state = bnjax.indexed_bn_init(64, 10)
      >>> params.scale.shape, state.mean.shape
      ((64,), (10, 64))
    """
    checks.positive_integer("indexed_bn_init", "num_indices", num_indices)
    params, state = bn_init(features, scale=scale, bias=bias, dtype=dtype)

    def stacked(v):
        return jnp.repeat(v[None], num_indices, 0)

    return jax.tree.map(stacked, params) if indexed_params else params, jax.tree.map(stacked, state)


def indexed_bn_apply(
    params: BNParams,
    state: BNState,
    x: Array,
    train: bool,
    *,
    index: Any,
    axis: checks.Axis = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased_var: bool = False,
) -> tuple[Array, BNState]:
    """Batch normalization with running statistics for each index (for timesteps: Cooijmans et al., 2017, section 3).

        y, state[index] = bn_apply(params, state[index], x, train)

    With an index for each timestep this is recurrent batch normalization; with one for each domain, domain-specific
    batch normalization (Chang et al., 2019); with one for clean and one for adversarial examples, AdvProp (Xie et al.,
    2020).

    Args:
      params, state: the variables from `indexed_bn_init`. A scale or bias of the state's shape has a row for each
        index. (A conditional scale or bias of that very shape needs one more axis, to tell it apart.)
      index: an integer, or a scalar integer array, which may be traced. An array is clamped to [0, num_indices), so
        that timesteps past the last one use the statistics of the last one.
      x, train and the rest: as in `bnjax.bn_apply`.

    Returns:
      y and the state, which may differ from the given one at `index` alone.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for an index that is no integer, or known to be out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.indexed_bn_init(1, 3)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, state = bnjax.indexed_bn_apply(params, state, x, train=True, index=1, momentum=0.0)
      >>> state.mean[:, 0].tolist(), state.count[:, 0].tolist()
      ([0.0, 2.0, 0.0], [0, 1, 0])
    """
    options = checked(
        "indexed_bn_apply",
        train,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
    )
    return apply_indexed(params, state, x, options, momentum=momentum, mask=mask, index=index)[:2]


def apply_indexed(
    params: Any,
    state: BNState | None,
    x: Array,
    options: Options,
    *,
    momentum: Any,
    mask: Array | None,
    index: Any,
    earlier: Collected | None = None,
) -> tuple[Array, Any, Collected | None]:
    """`indexed_bn_apply` with checked options, as `bnjax.core.apply.apply` is `bn_apply`.

    The collected moments lead with an axis of indices, and have weight 0 but at this index.
    """
    call = options.call
    if not isinstance(state, BNState):
        raise TypeError(f"{call}(state=...): expected the state of indexed_bn_init, got {type(state).__name__}.")
    checks.inexact(call, "x", x)
    features = checks.feature_axes(call, x, options.axis)
    shape = np.shape(state.mean)
    if len(shape) != 1 + len(features):
        raise ValueError(
            f"{call}(state=...): expected the state of indexed_bn_init, with an axis of indices before "
            f"{len(features)} of features, got state.mean of shape {shape}. Pass what indexed_bn_init returned."
        )
    at = _clamped(call, index, shape[0])

    def own(tree):
        return jax.tree.map(lambda v: _taken(v, at), tree)

    def put(tree, new):
        return jax.tree.map(lambda v, n: _put(v, n, at), tree, new)

    params = BNParams(*(own(v) if v is not None and np.shape(v) == shape else v for v in params))
    y, new, collected = apply(params, own(state), x, options, momentum=momentum, mask=mask, earlier=own(earlier))
    if collected is not None:
        zeros = jax.tree.map(lambda leaf: jnp.zeros((shape[0], *leaf.shape), leaf.dtype), collected)
        collected = put(zeros if earlier is None else earlier, collected)
    return y, put(state, new) if options.train else state, collected


def _taken(values, at):
    """The row `at`."""
    if not is_explicit(values):
        return lax.dynamic_index_in_dim(values, at, 0, keepdims=False)
    return jnp.sum(jnp.where(_is_row(values, at), values, 0), 0, dtype=values.dtype)


def _put(values, row, at):
    """`values` with another row `at`."""
    if not is_explicit(values):
        return lax.dynamic_update_index_in_dim(values, row, at, 0)
    return jnp.where(_is_row(values, at), sharded_as(values, row[None]), values)


def _is_row(values, at):
    """Where the index is `at`, of the shape of `values`: explicit sharding has no slices of an axis that may be cut."""
    return lax.broadcasted_iota(jnp.int32, values.shape, 0, out_sharding=jax.typeof(values).sharding) == at


def _clamped(call, index, number):
    """`index` in [0, number); one that is known has to be there already."""
    if isinstance(index, bool) or not jnp.issubdtype(jnp.result_type(index), jnp.integer) or np.ndim(index):
        raise TypeError(
            f"{call}(index=...): expected an integer or a scalar integer array, got {index!r}. "
            "For an index per example, vmap over the examples."
        )
    if not isinstance(index, Array | np.ndarray) and not 0 <= index < number:
        raise ValueError(
            f"{call}(index={index}): the state has {number} indices. Pass 0 to {number - 1}, or an array, "
            "which is clamped."
        )
    index = jnp.asarray(index)
    if index.dtype.itemsize < 4:
        index = index.astype(jnp.int32)  # in a narrower dtype the bound would wrap
    return jnp.clip(index, 0, number - 1)
