"""A layer in evaluation as an affine map, and that map folded into the kernel of an adjacent linear layer.

    y = scale' * x + bias'      scale' = scale / sqrt(var + epsilon)        bias' = bias - mean * scale'

`bnjax.linen.fold_model` and `bnjax.nnx.fold_model` fold whole models.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.layer import aligned
from bnjax.core.moments import wider
from bnjax.core.normalize import normalize, slopes
from bnjax.core.records import BNParams, BNState, serializable


@serializable
class Affine(NamedTuple):
    """A scale and a bias for each feature: y = scale * x + bias."""

    scale: Array  # (*features,)
    bias: Array  # (*features,)


def fold(params: BNParams, state: BNState, *, epsilon: float = 1e-5) -> Affine:
    """The affine map that a layer computes in evaluation (Ioffe & Szegedy, 2015, algorithm 2, line 11).

        bn_apply(params, state, x, train=False)[0] = scale' * x + bias'

    Args:
      params, state: parameters and running statistics of one layer, of shape `features`; scale and bias may be None.
      epsilon: epsilon of the layer, > 0.

    Returns:
      scale' and bias' of shape `features`, in float32 or wider. The outputs of the map and of the layer differ by a
      rounding error, which grows with |mean| / sqrt(var + epsilon).

    Raises:
      ValueError: if state is None, because a layer that normalizes by its batch is not an affine map, and for scale or
        bias of another shape than the statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, _ = bnjax.bn_init(2, scale=4.0)
      >>> state = bnjax.BNState(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 16.0]), count=jnp.array([1, 1]))
      >>> scale, bias = bnjax.fold(params, state)
      >>> scale.round(3).tolist(), bias.round(3).tolist()
      ([2.0, 1.0], [-2.0, -2.0])
    """
    if state is None:
        raise ValueError(
            "fold(state=None): a layer without running statistics normalizes by its batch, which is not an affine map. "
            "Keep this layer."
        )
    epsilon = checks.positive("fold", "epsilon", epsilon)
    params = BNParams(*(None if v is None else jnp.asarray(v) for v in params))
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var).real
    for name, v in params._asdict().items():
        if v is not None and v.shape != mean.shape:
            raise ValueError(
                f"fold(params=...): params.{name} has shape {v.shape}, state.mean {mean.shape}. Pass the parameters "
                "and the state of one index, class or example: each has its own affine map."
            )
    dtypes = (wider(v.dtype) for v in (mean, *params) if v is not None)
    zero = jnp.zeros(mean.shape, functools.reduce(jnp.promote_types, dtypes))
    scale = slopes(zero, var, params.scale, epsilon)[1]
    return Affine(scale, normalize(zero, mean, var, *params, None, epsilon))


def fold_into_previous(kernel: Array, bias: Array | None, affine: Affine, *, axis: int = -1) -> tuple[Array, Array]:
    """Kernel and bias of a linear layer, with the normalization that follows it folded in.

        kernel' = kernel * affine.scale        bias' = bias * affine.scale + affine.bias

    Args:
      kernel: kernel of a dense layer or of any convolution: transposed, grouped, depthwise, dilated, strided.
      bias: bias of shape (features,), or None.
      affine: the result of `fold`, of shape (features,).
      axis: axis of the kernel that holds the output features: -1 in Flax, but -2 for
        ConvTranspose(transpose_kernel=True).

    Returns:
      kernel: in its own dtype.
      bias: of shape (features,), in its own dtype, or in the kernel's if it was None.

    Raises:
      ValueError: if the kernel has another number of features on that axis, or the bias another shape.
      TypeError: if kernel or bias are not floating or complex arrays, or the affine map is complex and the kernel real.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> affine = bnjax.Affine(scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.0, 1.0]))
      >>> kernel, bias = bnjax.fold_into_previous(jnp.ones((1, 2)), jnp.ones(2), affine)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0, 3.0]], [2.0, 4.0])
    """
    checks.inexact("fold_into_previous", "kernel", kernel)
    features = checks.feature_axes("fold_into_previous", kernel, axis, "kernel")
    _check_fits("fold_into_previous", kernel, affine, kernel.shape[features[0]])
    _check_bias("fold_into_previous", bias, kernel.shape[features[0]])
    scale, shift = affine
    scaled = kernel.astype(scale.dtype) * aligned(scale, kernel, features)
    moved = shift if bias is None else bias.astype(scale.dtype) * scale + shift
    return scaled.astype(kernel.dtype), moved.astype((kernel if bias is None else bias).dtype)


def fold_into_next(kernel: Array, bias: Array | None, affine: Affine, *, groups: int = 1) -> tuple[Array, Array]:
    """Kernel and bias of a linear layer, with the normalization that precedes it folded in.

        kernel' = kernel * affine.scale        bias' = bias + sum(kernel * affine.bias)

    The sum runs over all kernel elements of an output feature. The result is exact if no zeros are padded into the
    layer's input: the normalization maps such a zero to affine.bias, and the folded layer does not. A transposed
    convolution pads zeros unless its kernel has size 1.

    Args:
      kernel: kernel of shape (..., inputs / groups, outputs).
      bias: bias of shape (outputs,), or None.
      affine: the result of `fold`, of shape (inputs,).
      groups: number of groups of a convolution (`feature_group_count`), > 0.

    Returns:
      kernel: in its own dtype.
      bias: of shape (outputs,), in its own dtype, or in the kernel's if it was None.

    Raises:
      ValueError: if the kernel has fewer than two axes or another number of inputs, the bias has another shape, or
        `groups` is not a positive integer that divides the number of outputs.
      TypeError: if kernel or bias are not floating or complex arrays, or the affine map is complex and the kernel real.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> affine = bnjax.Affine(scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.0, 1.0]))
      >>> kernel, bias = bnjax.fold_into_next(jnp.ones((2, 1)), jnp.ones(1), affine)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0], [3.0]], [2.0])
    """
    checks.inexact("fold_into_next", "kernel", kernel)
    checks.positive_integer("fold_into_next", "groups", groups)
    if kernel.ndim < 2:
        raise ValueError(
            f"fold_into_next(kernel=...): expected shape (..., inputs / groups, outputs), got {kernel.shape}. Pass the "
            "kernel of a dense layer or of a convolution."
        )
    if kernel.shape[-1] % groups:
        raise ValueError(
            f"fold_into_next(groups={groups}): the kernel has shape {kernel.shape} and so {kernel.shape[-1]} outputs, "
            "which is not a multiple of groups. Pass the convolution's feature_group_count."
        )
    _check_fits("fold_into_next", kernel, affine, kernel.shape[-2] * groups)
    _check_bias("fold_into_next", bias, kernel.shape[-1])
    # The outputs of one group are contiguous, and depend only on the inputs of that group.
    scale, shift = (jnp.repeat(v.reshape(groups, -1).T, kernel.shape[-1] // groups, axis=1) for v in affine)
    scale, shift = (jnp.expand_dims(v, tuple(range(kernel.ndim - 2))) for v in (scale, shift))
    wide = kernel.astype(scale.dtype)
    moved = jnp.sum(wide * shift, axis=tuple(range(kernel.ndim - 1)))
    if bias is not None:
        moved += bias.astype(moved.dtype)
    return (wide * scale).astype(kernel.dtype), moved.astype((kernel if bias is None else bias).dtype)


def _check_fits(call, kernel, affine, features):
    if affine.scale.shape != (features,):
        raise ValueError(
            f"{call}(kernel=...): the kernel has shape {kernel.shape} and so {features} features there, but "
            f"affine.scale has shape {affine.scale.shape}. Fold layers that are adjacent."
        )
    if jnp.iscomplexobj(affine.bias) and not jnp.iscomplexobj(kernel):
        raise TypeError(
            f"{call}(kernel=...): a {kernel.dtype} kernel cannot hold a complex layer. Pass kernel.astype(complex)."
        )


def _check_bias(call, bias, features):
    if bias is None:
        return
    checks.inexact(call, "bias", bias)
    if bias.shape != (features,):
        raise ValueError(
            f"{call}(bias=...): expected shape ({features},), one for each output of the kernel, got {bias.shape}. "
            "Pass the bias of the layer whose kernel this is, or None."
        )
