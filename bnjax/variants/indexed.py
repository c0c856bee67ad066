"""Batch normalization with running statistics for each of several indices: timesteps, domains, kinds of examples.

Timesteps: Cooijmans et al. (2017), section 3. Domains: Chang et al. (2019). Clean and adversarial examples: Xie et al.
(2020). With one index for the batch the computation is `bn_apply` on the state that the index selects. With an index
for each example it is the same four steps as `bn_apply`, on the moments of each index's examples.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.apply import aligned, apply, bn_init, choose_statistics, normalize_by, validate
from bnjax.core.domains import Domains, row_sharding
from bnjax.core.jax_internals import mesh_axes
from bnjax.core.moments import collect
from bnjax.core.options import Options, checked, fitted
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.running import momentum_argument, update
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

        y, state[index] = bn_apply(params, state[index], x, train)                          one index
        y[index == k], state[k] = bn_apply(params, state[k], x[index == k], train)          an index for each example

    With an index for each timestep this is recurrent batch normalization; with one for each domain, domain-specific
    batch normalization (Chang et al., 2019); with one for clean and one for adversarial examples, AdvProp (Xie et al.,
    2020).

    With an index for each example, `x` is read once for its statistics, each example around the mean of its own first
    sixteenth, and twice under a mask. The examples' moments are then merged by index (Chan, Golub & LeVeque, 1983) in
    six sums over arrays of batch x features numbers, whatever num_indices is. If `x` has no other axes these arrays are
    as large as `x`. Over axis_name the forward pass gathers 3 x num_indices x features numbers (5 with real-valued
    weights), and the backward pass has one psum of 2 x num_indices x features for the statistics.

    Args:
      params, state: the variables from `indexed_bn_init`. A scale or bias of the state's shape has a row for each
        index. (A conditional scale or bias of that very shape needs one more axis, to tell it apart.) A count of shape
        (num_indices,) counts the updates of an index for all of its features.
      index: an integer; or an integer array, which may be traced, that is a scalar or has shape (batch,), with an index
        for each example. Arrays are clamped to [0, num_indices), so that timesteps past the last one use the statistics
        of the last one. The batch axis is the first axis of x that is not a feature axis. A scalar is the index of all
        examples of all devices or examples of axis_name; where they differ, pass the vector.
      x, train and the rest: as in `bnjax.bn_apply`.

    Returns:
      y and the state, which may differ from the given one at `index` alone. An index with fewer than two valid values
      keeps its state and count.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for an index that is no integer, of another shape, or a Python
        integer out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.indexed_bn_init(1, 3)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, state = bnjax.indexed_bn_apply(params, state, x, train=True, index=1, momentum=0.0)
      >>> state.mean[:, 0].tolist(), state.count[:, 0].tolist()
      ([0.0, 2.0, 0.0], [0, 1, 0])

      >>> x, index = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 2, 2])
      >>> y, state = bnjax.indexed_bn_apply(params, state, x, train=True, index=index, momentum=0.0)
      >>> y[:, 0].round(3).tolist(), state.mean[:, 0].tolist()
      ([-1.0, 1.0, -1.0, 1.0], [2.0, 2.0, 20.0])
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

    The collected moments lead with an axis of indices, and have weight 0 but at the indices of this batch.
    """
    call = options.call
    if not isinstance(state, BNState):
        raise TypeError(f"{call}(state=...): expected the state of indexed_bn_init, got {type(state).__name__}.")
    options = fitted(options, x, mask)
    features = checks.feature_axes(call, x, options.axis)
    shape = np.shape(state.mean)
    if len(shape) != 1 + len(features):
        raise ValueError(
            f"{call}(state=...): expected the state of indexed_bn_init, with an axis of indices before "
            f"{len(features)} of features, got state.mean of shape {shape}. Pass what indexed_bn_init returned."
        )
    _check_index(call, index, shape[0], x, features)
    _check_count(call, state)
    if np.ndim(index):
        by_feature = jnp.expand_dims(state.count, tuple(range(np.ndim(state.count), np.ndim(state.mean))))
        momentum = momentum_argument(call, momentum, state._replace(count=by_feature), options.train)
        return _apply_to_each(params, state, x, mask, momentum, earlier, index, options=options)
    at = _clamped(index, shape[0])

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


@partial(jax.jit, static_argnames="options", inline=True)
def _apply_to_each(params, state, x, mask, momentum, earlier, index, *, options):
    """`apply_indexed` with an index for each example."""
    shape, features = np.shape(state.mean), checks.feature_axes(options.call, x, options.axis)

    def tables(params, table):
        return BNParams(*(table(v) if v is not None and np.shape(v) == shape else v for v in params))

    def first(v):
        return _taken(v, 0)

    batch = validate(tables(params, first), jax.tree.map(first, state), x, mask, options)
    rest = batch.axes
    position = sum(a < rest[0] for a in features)
    sharding = row_sharding(batch.x, (rest[0], *features))
    domains = Domains(_clamped(index, shape[0]), shape[0], position, sharding)

    def rows(table):
        return jnp.expand_dims(domains.rows(table), rest[1:])

    mean, var, collected = state.mean, state.var.real, None
    if options.train:
        examples = batch._replace(features=tuple(sorted((rest[0], *features))))
        names, groups = options.axis_names, options.axis_index_groups
        statistics = collect(examples, names, groups, sharded=False, domains=domains)
        mean, var = choose_statistics(statistics.moments, state, batch)
        state, collected = update(state, statistics, earlier, momentum, options)
    scale, bias = (_varying(aligned(v, batch.x, features), batch.x) for v in tables(params, rows))
    return normalize_by(rows(mean), rows(var), scale, bias, batch, options), state, collected


def _varying(v, x):
    """`v` typed as varying over the mesh like `x`: its derivative is then summed over the examples before devices."""
    return v if v is None or not mesh_axes() else v + lax.full_like(x, 0, v.dtype, shape=v.shape)


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


def _check_count(call, state):
    """Each index counts its own updates, of each feature or of all of them."""
    shape, got = np.shape(state.mean), np.shape(state.count)
    if got not in (shape, shape[:1]):
        raise ValueError(
            f"{call}(state=...): state.count has shape {got}, but each of the {shape[0]} indices counts its own "
            f"updates, in shape {shape} or {shape[:1]}. Pass jnp.broadcast_to(count, {shape}), if all had as many."
        )


def _check_index(call, index, number, x, features):
    """An index is an integer in range, or an integer array that is a scalar or has one for each example."""
    if isinstance(index, bool) or not (isinstance(index, int) or hasattr(index, "dtype")):
        raise TypeError(
            f"{call}(index=...): expected an integer or an integer array, got {index!r}. "
            "Pass an integer for all examples, or jnp.asarray of a list with one for each."
        )
    if not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise TypeError(
            f"{call}(index=...): expected an integer or an integer array, got {jnp.result_type(index)}. "
            "Convert it with index.astype(jnp.int32)."
        )
    if np.ndim(index):
        rest = [a for a in range(x.ndim) if a not in features]
        if not rest:
            raise ValueError(
                f"{call}(index=...): got shape {np.shape(index)}, but all axes of x, of shape {x.shape}, are feature "
                "axes, so that there is one example. Pass a scalar, or an x with an axis of examples."
            )
        if np.shape(index) != (x.shape[rest[0]],):
            raise ValueError(
                f"{call}(index=...): expected a scalar or one index for each example, shape ({x.shape[rest[0]]},), "
                f"since x has shape {x.shape} and its examples along axis {rest[0]}, got shape {np.shape(index)}. "
                "Pass integers of shape (batch,)."
            )
    elif not isinstance(index, Array | np.ndarray) and not 0 <= index < number:
        raise ValueError(
            f"{call}(index={index}): the state has {number} indices. Pass 0 to {number - 1}, or an array, "
            "which is clamped."
        )


def _clamped(index, number):
    """The index in [0, number)."""
    index = jnp.asarray(index)
    if index.dtype.itemsize < 4:
        index = index.astype(jnp.int32)  # in a narrower dtype the bound would wrap
    return jnp.clip(index, 0, number - 1)
