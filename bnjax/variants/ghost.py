"""Ghost batch normalization: each group of examples is normalized by its own statistics.

Hoffer, Hubara & Soudry (2017), algorithm 1. Everything else is as in `bn_apply`, which it equals in evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.layer import BatchNorm, aligned, known_or_running
from bnjax.core.merging import merge, merge_together
from bnjax.core.moments import collect, merge_over_axes
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.schedules import Momentum
from bnjax.core.sharding import shards


@dataclass(frozen=True, kw_only=True)
class GhostBatchNorm(BatchNorm):
    """Ghost batch normalization as a value: `bnjax.BatchNorm` that trains like `bnjax.ghost_bn_apply`.

    Args:
      ghost_size: number of examples in a group, > 0.
      axis, momentum, ...: as in `bnjax.BatchNorm`.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> norm = bnjax.GhostBatchNorm(ghost_size=2)
      >>> params, state = norm.init(1)
      >>> y, state = norm.apply(params, state, jnp.array([[1.0], [3.0], [10.0], [30.0]]), train=True)
      >>> y[:, 0].round(3).tolist()
      [-1.0, 1.0, -1.0, 1.0]
    """

    ghost_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive_integer(self.call, "ghost_size", self.ghost_size)
        self._set(ghost_size=int(self.ghost_size))

    def train(
        self, params: Any, state: Any, x: Array, mask: Array | None, numbers: Any, stored: Any
    ) -> tuple[Array, Collected]:
        examples = next((a for a in range(x.ndim) if a not in self.features), None)
        number = 0 if examples is None else x.shape[examples]
        known = isinstance(number, int)  # a symbolic dimension of jax.export is not
        # Over a named axis even a device's only group has its own statistics.
        one_group = known and (number == 0 or (self.ghost_size >= number and not self.names))
        if examples is None or one_group:
            return super().train(params, state, x, mask, numbers, stored)
        self._check_groups(number, shards(x, examples))
        size = min(self.ghost_size, number) if known else self.ghost_size
        whole = number - number % size
        params = BNParams(*(aligned(v, x, self.features) for v in params))

        def groups_of(size, begin, end):
            part: Any = jax.tree.map(lambda v: _sliced(v, examples, slice(begin, end)), (params, x, mask))
            return self._train_groups(*part, state=state, examples=examples, size=size, stored=stored)

        y, batch = groups_of(size, 0, whole)
        if known and whole < number:
            y_last, last = groups_of(number - whole, whole, number)
            y, batch = lax.concatenate([y, y_last], examples), merge_together(batch, last)
        guess = None if state is None else state.mean
        return y, merge_over_axes(batch, self.names, self.axis_index_groups, guess) if self.names else batch

    def _train_groups(self, params, x, mask, *, state, examples, size, stored):
        """Examples in groups of one size: the output, normalized by group, and the merged moments of all groups."""

        def grouped(v):  # a group is one more axis, before the axis of its examples
            if v.shape[examples] == 1:
                return jnp.expand_dims(v, examples)
            return v.reshape(*v.shape[:examples], v.shape[examples] // size, size, *v.shape[examples + 1 :])

        shape, position = x.shape, sum(a < examples for a in self.features)  # position of groups among the feature axes
        of_groups = self._fitted(
            features=(*self.features[:position], examples, *(a + 1 for a in self.features[position:]))
        )
        params, x, mask = jax.tree.map(grouped, (params, x, mask))
        batch = collect(x, mask, of_groups.features, stored, sharded=False)
        if state is not None:  # running statistics, for a group without a valid element
            like = batch.moments.weight.shape
            mean, var = (jnp.broadcast_to(jnp.expand_dims(v, position), like) for v in (state.mean, state.var))
            state = BNState(mean, var, state.count)
        mean, var = known_or_running(batch.moments, state, x, mask)
        y = of_groups.normalized(x, mean, var, params, mask)
        return y.reshape(shape), merge(batch, (position,))

    def _check_groups(self, number, shards):
        """Check that groups can be cut: a symbolic batch is a multiple of the size, a shard holds whole groups."""
        size = self.ghost_size
        if not isinstance(number, int):
            if number % size != 0:
                raise ValueError(
                    f"{self.call}(x=...): the batch is the symbolic dimension {number}, which is not known to be a "
                    f'multiple of ghost_size={size}. Export with a batch such as "{size}*g", or with a number.'
                )
        elif shards > 1 and (number % min(size, number) or number // min(size, number) % shards):
            raise ValueError(
                f"{self.call}(x=...): the batch of {number} is explicitly sharded over {shards} devices, which do not "
                f"hold whole groups of ghost_size={size}. Pass a ghost_size that divides {number // shards}, or "
                "reshard x so that each device holds the whole axis."
            )


def ghost_bn_apply(
    params: BNParams,
    state: BNState | None,
    x: Array,
    train: bool,
    *,
    ghost_size: int,
    axis: checks.Axis = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased_var: bool = False,
) -> tuple[Array, BNState | None]:
    """Ghost batch normalization (Hoffer, Hubara & Soudry, 2017, algorithm 1): a large batch, the noise of small ones.

        y = scale * (x - mean_g) / sqrt(var_g + epsilon) + bias          for each group g of `ghost_size` examples

    Groups are contiguous along the first axis that is not a feature axis; the last group may be smaller. The running
    statistics absorb the merged moments of all groups in one update. Up to rounding these are the moments of the whole
    batch.

    Args:
      ghost_size: number of examples in a group, > 0. If it is the size of the batch or more, the function is
        `bn_apply`; with an axis_name, each device is then one group.
      axis_name: mapped axis, or several, over which the running statistics are merged. Groups do not extend over
        devices.
      params, state, x, train and the rest: as in `bnjax.bn_apply`.

    Returns:
      y and the state, as from `bnjax.bn_apply`. A group is read once, around the mean of its first sixteenth, and that
      part twice; under a mask it is read twice. A feature without a valid value in a group is normalized there by the
      running statistics. Under sharded jit a group that lies on one device is normalized without communication.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for a `ghost_size` that is not a positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.bn_init(1)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> y, state = bnjax.ghost_bn_apply(params, state, x, train=True, ghost_size=2, momentum=0.0)
      >>> y[:, 0].round(3).tolist(), state.mean.tolist()
      ([-1.0, 1.0, -1.0, 1.0], [11.0])
    """
    layer = GhostBatchNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        ghost_size=ghost_size,
        call="ghost_bn_apply",
    )
    return layer.apply(params, state, x, train, mask)


def _sliced(v, axis, examples):
    """An array of x's rank for some of the examples."""
    return v if v.shape[axis] == 1 else v[(slice(None),) * axis + (examples,)]
