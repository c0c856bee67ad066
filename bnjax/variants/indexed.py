"""Batch normalization with running statistics for each of several indices: timesteps, domains, kinds of examples.

Timesteps: Cooijmans et al. (2017), section 3. Domains: Chang et al. (2019). Clean and adversarial examples: Xie et al.
(2020). With one index for the batch the computation is `bn_apply` on the state that the index selects. With an index
for each example the steps are those of `bn_apply`, on the moments of each index's examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.domains import Domains, row_sharding
from bnjax.core.jax_internals import mesh_axes
from bnjax.core.layer import BatchNorm, aligned, initial, known_or_running
from bnjax.core.moments import collect
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.running import rates
from bnjax.core.schedules import Momentum
from bnjax.core.sharding import is_explicit, sharded_as


@dataclass(frozen=True, kw_only=True)
class IndexedBatchNorm(BatchNorm):
    """Statistics for each of several indices as a value: the options of `bnjax.indexed_bn_apply`.

    Args:
      num_indices: number of indices; the statistics have a leading axis of that size.
      indexed_params: whether `init` makes a scale and a bias for each index.
      axis, momentum, ...: as in `bnjax.BatchNorm`.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> norm = bnjax.IndexedBatchNorm(num_indices=3, momentum=0.0)
      >>> params, state = norm.init(1)
      >>> y, state = norm.apply(params, state, jnp.array([[1.0], [3.0]]), train=True, index=1)
      >>> state.mean.tolist()
      [[0.0], [2.0], [0.0]]
    """

    num_indices: int
    indexed_params: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive_integer(self.call, "num_indices", self.num_indices)
        checks.boolean(self.call, "indexed_params", self.indexed_params)
        self._set(num_indices=int(self.num_indices))

    def init(
        self, features: int | Sequence[int], *, scale: Any = 1.0, bias: Any = 0.0, dtype: Any = jnp.float32
    ) -> tuple[BNParams, BNState]:
        """Parameters and running statistics, as `bnjax.indexed_bn_init` makes them."""
        params, state = initial(self.call, features, scale, bias, dtype)

        def stacked(v):
            return jnp.repeat(v[None], self.num_indices, 0)

        return jax.tree.map(stacked, params) if self.indexed_params else params, jax.tree.map(stacked, state)

    def apply(  # pyright: ignore[reportIncompatibleMethodOverride] a call needs an index
        self, params: BNParams, state: BNState, x: Array, train: bool, mask: Array | None = None, *, index: Any
    ) -> tuple[Array, BNState]:
        """y and the new state, as from `bnjax.indexed_bn_apply` with the same arguments."""
        return self.apply_part(params, state, x, train, mask, moments=False, index=index)[:2]

    def numbers(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: Any, train: bool, index: Any
    ) -> dict[str, Any]:
        _check_state(self.call, state, self.num_indices)
        _check_index(self.call, index, self.num_indices)
        # A count for each index, for all of its features, gets the rank of the state, which a schedule's result needs.
        count = jnp.expand_dims(state.count, tuple(range(np.ndim(state.count), np.ndim(state.mean))))
        at = _clamped(index, self.num_indices)
        if not at.ndim:
            count = _taken(count, at)
        momentum = rates(self.call, self.momentum, state._replace(count=count), train)
        return {"momentum": momentum, "index": at}

    def run(
        self, params: Any, state: Any, x: Array, mask: Array | None, numbers: Any, earlier: Any, train: bool
    ) -> tuple[Array, Any, Collected | None]:
        index, shape = numbers["index"], np.shape(state.mean)
        if len(shape) != 1 + len(self.features):
            raise ValueError(
                f"{self.call}(state=...): expected the state of indexed_bn_init, with an axis of indices before "
                f"{len(self.features)} of features, got state.mean of shape {shape}. Pass what indexed_bn_init "
                "returned."
            )
        if index.ndim:
            _check_examples(self.call, index, x, self.features)
            return super().run(params, state, x, mask, numbers, earlier, train)

        def own(tree):
            return jax.tree.map(lambda v: _taken(v, index), tree)

        def put(tree, new):
            return jax.tree.map(lambda v, n: _put(v, n, index), tree, new)

        params = _tables(params, shape, own)
        y, new, batch = super().run(params, own(state), x, mask, numbers, own(earlier), train)
        if batch is not None:
            none = jax.tree.map(lambda leaf: jnp.zeros((shape[0], *leaf.shape), leaf.dtype), batch)
            batch = put(none if earlier is None else earlier, batch)
        return y, put(state, new) if train else state, batch

    # The methods below also serve an index for each example: statistics are then tables with a row for each index.

    def check(self, params: Any, state: Any, x: Array, mask: Array | None, train: bool) -> None:
        shape = np.shape(state.mean)
        if len(shape) == 1 + len(self.features):

            def first(v):
                return _taken(v, 0)

            params, state = _tables(params, shape, first), jax.tree.map(first, state)
        super().check(params, state, x, mask, train)

    def train(
        self, params: Any, state: Any, x: Array, mask: Array | None, numbers: Any, stored: Any
    ) -> tuple[Array, Collected]:
        if not numbers["index"].ndim:
            return super().train(params, state, x, mask, numbers, stored)
        examples, domains = self._domains(x, numbers["index"], state.mean)
        features = tuple(sorted((examples, *self.features)))
        names, groups = self.names, self.axis_index_groups
        batch = collect(x, mask, features, stored, names, groups, sharded=False, domains=domains)
        mean, var = known_or_running(batch.moments, state, x, mask)
        return self._normalized_by_rows(x, mean, var, params, mask, numbers["index"]), batch

    def evaluate(self, params: Any, state: BNState, x: Array, mask: Array | None, numbers: Any, stored: Any) -> Array:
        if not numbers["index"].ndim:
            return super().evaluate(params, state, x, mask, numbers, stored)
        return self._normalized_by_rows(x, state.mean, state.var.real, params, mask, numbers["index"])

    def _domains(self, x, index, mean):
        """The axis of the examples, and each example's domain: its index. The running mean is a guess of the mean."""
        examples = next(a for a in range(x.ndim) if a not in self.features)
        sharding = row_sharding(x, (examples, *self.features))
        return examples, Domains(index, mean, self.num_indices, sum(a < examples for a in self.features), sharding)

    def _normalized_by_rows(self, x, mean, var, params, mask, index):
        """The formula, with each example's rows of the tables."""
        examples, domains = self._domains(x, index, mean)
        inner = [a for a in range(x.ndim) if a not in self.features and a != examples]

        def rows(table):
            return jnp.expand_dims(domains.rows(table), inner)

        params = _tables(params, mean.shape, rows)
        scale, bias = (_varying(aligned(v, x, self.features), x) for v in params)
        return self.normalized(x, rows(mean), rows(var), BNParams(scale, bias), mask)


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
    layer = IndexedBatchNorm(num_indices=num_indices, indexed_params=indexed_params, call="indexed_bn_init")
    return layer.init(features, scale=scale, bias=bias, dtype=dtype)


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
    six reductions of arrays of batch x features numbers, for any num_indices. If `x` has no other axes these arrays are
    as large as `x`. Over axis_name the collectives are as in `bnjax.bn_apply`, of num_indices x features numbers.

    Args:
      params, state: the variables from `indexed_bn_init`. A scale or bias of the state's shape has a row for each
        index. (To tell it apart, a conditional scale or bias of that very shape needs one more axis.) A count of shape
        (num_indices,) counts the updates of an index for all of its features.
      index: an integer; or an integer array, which may be traced: a scalar, or of shape (batch,), with an index for
        each example. Arrays are clamped to [0, num_indices), so that timesteps past the last one use its statistics.
        The batch axis is the first axis of x that is not a feature axis. A scalar is the index of all examples, on all
        devices of axis_name; if they differ, pass an array.
      x, train and the rest: as in `bnjax.bn_apply`.

    Returns:
      y and the state, which differs from the given one only at `index`. An index with fewer than two valid values keeps
      its state and count.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for an index that is not an integer, has another shape, or is a
        Python integer out of range.

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
    number = getattr(state, "mean", np.zeros(1)).shape[:1] or (1,)  # `numbers` rejects what is not a state
    layer = IndexedBatchNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        num_indices=number[0],
        call="indexed_bn_apply",
    )
    return layer.apply(params, state, x, train, mask, index=index)


def _tables(params, shape, row):
    """The parameters, with `row` applied to tables of this shape, which have a row for each index."""
    if not isinstance(params, BNParams):
        return params  # `check` rejects it
    return BNParams(*(row(v) if v is not None and np.shape(v) == shape else v for v in params))


def _varying(v, x):
    """`v` typed as varying over the mesh like `x`, so that its derivative is summed over examples before devices."""
    return v if v is None or not mesh_axes() else v + lax.full_like(x, 0, v.dtype, shape=v.shape)


def _taken(values, at):
    """The row `at`."""
    if not is_explicit(values):
        return lax.dynamic_index_in_dim(values, at, 0, keepdims=False)
    return jnp.sum(jnp.where(_is_row(values, at), values, 0), 0, dtype=values.dtype)


def _put(values, row, at):
    """`values` with the row `at` replaced."""
    if not is_explicit(values):
        return lax.dynamic_update_index_in_dim(values, row, at, 0)
    return jnp.where(_is_row(values, at), sharded_as(values, row[None]), values)


def _is_row(values, at):
    """Where the index is `at`, of the shape of `values`: explicit sharding has no slices of a sharded axis."""
    return lax.broadcasted_iota(jnp.int32, values.shape, 0, out_sharding=jax.typeof(values).sharding) == at


def _check_state(call, state, number):
    """Check that the state has a row for each index, which counts its own updates, per feature or for all features."""
    if not isinstance(state, BNState):
        raise TypeError(f"{call}(state=...): expected the state of indexed_bn_init, got {type(state).__name__}.")
    shape, got = np.shape(state.mean), np.shape(state.count)
    if shape[:1] != (number,):
        raise ValueError(
            f"{call}(state=...): expected the state of indexed_bn_init, with an axis of {number} indices before those "
            f"of features, got state.mean of shape {shape}. Pass what indexed_bn_init returned."
        )
    if got not in (shape, shape[:1]):
        raise ValueError(
            f"{call}(state=...): state.count has shape {got}, but each of the {shape[0]} indices counts its own "
            f"updates, in shape {shape} or {shape[:1]}. Pass jnp.broadcast_to(count, {shape}) if all have the same."
        )


def _check_index(call, index, number):
    """Check that an index is an integer in range, or an integer array."""
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
    if not isinstance(index, Array | np.ndarray) and not 0 <= index < number:
        raise ValueError(
            f"{call}(index={index}): the state has {number} indices. Pass 0 to {number - 1}, or an array, "
            "which is clamped."
        )


def _check_examples(call, index, x, features):
    """Check that an index that is not a scalar has one for each example."""
    rest = [a for a in range(x.ndim) if a not in features]
    if not rest:
        raise ValueError(
            f"{call}(index=...): got shape {index.shape}, but all axes of x, of shape {x.shape}, are feature "
            "axes, so that there is one example. Pass a scalar, or an x with an axis of examples."
        )
    if index.shape != (x.shape[rest[0]],):
        raise ValueError(
            f"{call}(index=...): expected a scalar or one index for each example, shape ({x.shape[rest[0]]},), "
            f"since x has shape {x.shape} and its examples along axis {rest[0]}, got shape {index.shape}. "
            "Pass integers of shape (batch,)."
        )


def _clamped(index, number):
    """The index in [0, number)."""
    index = jnp.asarray(index)
    if index.dtype.itemsize < 4:
        index = index.astype(jnp.int32)  # in a narrower dtype the bound would wrap
    return jnp.clip(index, 0, number - 1)
