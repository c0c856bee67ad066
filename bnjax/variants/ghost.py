"""Ghost batch normalization: each group of examples is normalized by its own statistics.

Hoffer, Hubara & Soudry (2017), algorithm 1. Everything else is as in `bn_apply`, which it equals in evaluation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.core import checks
from bnjax.core.apply import aligned, choose_statistics, compiled_apply, normalize_by, validate
from bnjax.core.moments import Batch, collect, merge_over_axes, merge_parts, merge_together
from bnjax.core.options import Options, checked, fitted
from bnjax.core.records import BNParams, BNState, Collected
from bnjax.core.running import momentum_argument, update
from bnjax.core.schedules import Momentum
from bnjax.core.sharding import shards
from bnjax.core.weights import is_real


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
        `bn_apply`; if an axis is named, each device is then one group.
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
    options = checked(
        "ghost_bn_apply",
        train,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
    )
    return apply_ghost(params, state, x, options, momentum=momentum, mask=mask, ghost_size=ghost_size)[:2]


def apply_ghost(
    params: Any,
    state: BNState | None,
    x: Array,
    options: Options,
    *,
    momentum: Any,
    mask: Array | None,
    ghost_size: int,
    earlier: Collected | None = None,
) -> tuple[Array, BNState | None, Collected | None]:
    """`ghost_bn_apply` with checked options, as `bnjax.core.apply.apply` is `bn_apply`."""
    checks.positive_integer(options.call, "ghost_size", ghost_size)
    options = fitted(options, x, mask)
    momentum = momentum_argument(options.call, momentum, state, options.train)
    return _apply_ghost(params, state, x, mask, momentum, earlier, size=int(ghost_size), options=options)


@partial(jax.jit, static_argnames=("size", "options"), inline=True)
def _apply_ghost(params, state, x, mask, momentum, earlier, *, size, options):
    batch = validate(params, state, x, mask, options)
    examples = next((a for a in range(x.ndim) if a not in batch.features), None)
    number = 0 if examples is None else x.shape[examples]
    known = isinstance(number, int)  # a symbolic dimension of jax.export is not
    # Over a named axis even the only group of a device has statistics of its own.
    one_group = known and (number == 0 or (size >= number and not options.axis_names))
    if examples is None or one_group or not (options.train or state is None):
        return compiled_apply(params, state, x, mask, momentum, earlier, options=options)
    _check_groups(number, size, shards(x, examples), options.call)
    size = min(size, number) if known else size
    whole = number - number % size
    params = BNParams(*(aligned(v, batch.x, batch.features) for v in params))
    y, statistics = _normalize_groups(
        *_sliced(params, batch, examples, slice(0, whole)), state, examples, size, options
    )
    if known and whole < number:
        last = _sliced(params, batch, examples, slice(whole, number))
        y_last, statistics_last = _normalize_groups(*last, state, examples, number - whole, options)
        y, statistics = lax.concatenate([y, y_last], examples), merge_together(statistics, statistics_last)
    names, groups = options.axis_names, options.axis_index_groups
    statistics = merge_over_axes(statistics, names, groups, is_real(batch.mask))
    state, collected = update(state, statistics, earlier, momentum, options)
    return y, state, collected


def _check_groups(number, size, shards, call):
    """Groups can be cut: a symbolic batch is a multiple of their size, and a sharded one holds whole groups."""
    if not isinstance(number, int):
        if number % size != 0:
            raise ValueError(
                f"{call}(x=...): the batch is the symbolic dimension {number}, which is not known to be a multiple "
                f'of ghost_size={size}. Export with a batch such as "{size}*g", or with a number.'
            )
    elif shards > 1 and (number % min(size, number) or number // min(size, number) % shards):
        raise ValueError(
            f"{call}(x=...): the batch of {number} is explicitly sharded over {shards} devices, which do not hold "
            f"groups of ghost_size={size} as a whole. Pass a ghost_size that divides {number // shards}, or reshard x "
            "so that each device holds the whole axis."
        )


def _sliced(params, batch, axis, examples):
    """Parameters of x's rank, and the batch, for some of the examples."""

    def part(v) -> Any:
        return v if v is None or v.shape[axis] == 1 else v[(slice(None),) * axis + (examples,)]

    return BNParams(*map(part, params)), batch._replace(x=part(batch.x), mask=part(batch.mask))


def _normalize_groups(params, batch, state, examples, size, options):
    """Examples in groups of one size: normalized by group, and the moments of all groups together."""
    shape = batch.x.shape

    def grouped(v) -> Any:  # a group is one more axis, before the axis of its examples
        if v is None or v.shape[examples] == 1:
            return v if v is None else jnp.expand_dims(v, examples)
        return v.reshape(*v.shape[:examples], v.shape[examples] // size, size, *v.shape[examples + 1 :])

    position = sum(a < examples for a in batch.features)  # of the groups among the feature axes
    features = (*batch.features[:position], examples, *(a + 1 for a in batch.features[position:]))
    groups = Batch(grouped(batch.x), grouped(batch.mask), features, batch.dtype)
    statistics = collect(groups, (), None, sharded=False)
    if state is not None:
        running = (jnp.expand_dims(v, position) for v in (state.mean, state.var))
        mean, var = (jnp.broadcast_to(v, statistics.moments.weight.shape) for v in running)
        state = BNState(mean, var, state.count)
    mean, var = choose_statistics(statistics.moments, state, groups)
    y = normalize_by(mean, var, grouped(params.scale), grouped(params.bias), groups, options)
    return y.reshape(shape), merge_parts(statistics, position)
