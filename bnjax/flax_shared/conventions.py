"""What the Linen and the NNX layer share: Flax's conventions for axes, masks and dtypes, around the pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.core import checks
from bnjax.core.apply import BNParams, BNState, Collected, bn_collect
from bnjax.core.array_moments import Moments
from bnjax.core.moments import Support, wider


def feature_axes(x: Array, axis: Any, call: str = "BatchNorm") -> tuple[int, ...]:
    """`axis`, one or several, as increasing non-negative integers; as in Flax one may be named twice."""
    axes = np.atleast_1d(checks.static_axis(call, axis)).tolist()
    return tuple(sorted({checks.feature_axes(call, x, a)[0] for a in axes}))


def array(x: Any, call: str) -> Array:
    """`x` as an array. A tuple would be stacked, whatever is meant by it: the image and the label of a batch, say."""
    if isinstance(x, tuple | list | dict):
        raise TypeError(
            f"{call}(x=...): expected an array, got a {type(x).__name__}. Pass the array in it, or jnp.asarray of a "
            "list of numbers."
        )
    return jnp.asarray(x)


def promoting() -> Any:
    """Flax's rules for the dtypes of results, which are JAX's standard ones, also where JAX is set to strict ones."""
    return jax.numpy_dtype_promotion("standard")


def batch_norm(
    params: BNParams,
    mean: Array,
    var: Array,
    count: Array | None,
    x: Array,
    train: bool,
    *,
    dtype: Any,
    mask: Any,
    axis_name: Any,
    axis_index_groups: Any,
    call: str,
    apply: Callable[..., Any] = bn_collect,
    **options: Any,
) -> tuple[Array, BNState, Collected | None]:
    """`bn_collect`, or a variant of it, by Flax's conventions.

    Args:
      params: scale and bias of any dtype.
      mean, var: running statistics of any dtype.
      count: None where nobody counts.
      x: floating, complex or integer.
      train: whether the batch's statistics serve.
      dtype: of the output.
      mask: broadcastable to `x`, of any rank up to x's.
      axis_name, axis_index_groups: groups without an axis are nothing, as in Flax.
      call: the name of the layer's class, for errors.
      apply: `bn_collect`, or what a variant has in its place.
      **options: of `apply`.

    Returns:
      y, the state, and what was collected.
    """
    inexact = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32  # half precision cannot hold integers
    x = x.astype(inexact)
    with promoting():
        wide = jnp.result_type(inexact, *(v for v in (mean, *params) if v is not None))
        complex_mean = jnp.promote_types(mean.dtype, jnp.complex64)
    real = jnp.isrealobj(x) and jnp.isrealobj(mean)  # complex scale and bias do not make the mean complex
    if jnp.issubdtype(wide, jnp.complexfloating):
        mean = mean.astype(complex_mean)
    if mask is not None:
        mask = jnp.asarray(mask)
        if not checks.broadcasts(mask.shape, x.shape):
            raise ValueError(
                f"{call}(mask=...): mask has shape {mask.shape}, which does not broadcast to that of x, {x.shape}. "
                "Reshape it so that its last axes are x's."
            )
        mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    y, state, collected = apply(
        params,
        BNState(mean, var, jnp.zeros(mean.shape, jnp.int32) if count is None else count),
        x if wide == wider(x.dtype) else x.astype(wide),
        train,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=None if axis_name is None else axis_index_groups,
        dtype=jnp.dtype(dtype),
        call=call,
        **options,
    )
    assert state is not None
    if real:
        state = state._replace(mean=state.mean.real)
    return y, state, collected


def nothing(mean: Array, var: Array) -> Collected:
    """What a layer has seen before it has seen anything."""
    zeros = jnp.zeros_like(var.real)
    return Collected(Moments(zeros, jnp.zeros_like(mean), zeros), Support(zeros, zeros))


def _broadcasts(shape, target):
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
