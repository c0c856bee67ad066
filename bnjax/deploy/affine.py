"""A layer in evaluation as one affine map, and that map in the kernel of a linear layer beside it.

    y = scale' * x + bias'      scale' = scale / sqrt(var + epsilon)        bias' = bias - mean * scale'

`bnjax.linen.fold_model` and `bnjax.nnx.fold_model` do it to whole models.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.apply import aligned
from bnjax.core.moments import wider
from bnjax.core.normalize import normalize, slopes
from bnjax.core.records import BNParams, BNState, serializable


@serializable
class Affine(NamedTuple):
    """A scale and a bias for each feature: y = scale * x + bias."""

    scale: Array
    bias: Array


def fold(params: BNParams, state: BNState, *, epsilon: float = 1e-5) -> Affine:
    """One scale and one bias for each feature, which do what the layer does in evaluation.

        bn_apply(params, state, x, train=False)[0] = scale' * x + bias'

    Args:
      params, state: of the layer, of shape `features`; scale and bias may be None.
      epsilon: that of the layer.

    Returns:
      scale' and bias' of shape `features`, in float32 or wider. The output differs by rounding, which grows with
      |mean| / sqrt(var + epsilon).

    Raises:
      ValueError: without a state: a layer that normalizes by its batch is no affine map.

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
        raise ValueError("fold(state=None): a layer without running statistics normalizes by its batch; it stays.")
    epsilon = checks.positive("fold", "epsilon", epsilon)
    params = BNParams(*(None if v is None else jnp.asarray(v) for v in params))
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var).real
    for name, v in params._asdict().items():
        if v is not None and v.shape != mean.shape:
            raise ValueError(
                f"fold(params=...): params.{name} has shape {v.shape}, state.mean {mean.shape}. Pass those of one "
                "index, class or example: they have a scale and a bias of their own."
            )
    dtypes = (wider(v.dtype) for v in (mean, *params) if v is not None)
    zero = jnp.zeros(mean.shape, functools.reduce(jnp.promote_types, dtypes))
    scale = slopes(zero, var, params.scale, epsilon)[1]
    return Affine(scale, normalize(zero, mean, var, *params, None, epsilon))


def fold_into_previous(kernel: Array, bias: Array | None, affine: Affine, *, axis: int = -1) -> tuple[Array, Array]:
    """Kernel and bias of a linear layer with the layer after it folded in.

        kernel' = kernel * scale        bias' = bias * scale + bias of the layer

    Args:
      kernel: of a dense layer or of a convolution of any kind: transposed, grouped, depthwise, dilated, strided.
      bias: of shape (features,), or None.
      affine: what `fold` gives.
      axis: of the output's features in the kernel: -1 in Flax, but -2 for ConvTranspose(transpose_kernel=True).

    Returns:
      kernel, and bias of shape (features,), which is there now if it was not; in the dtype that each had.

    Raises:
      ValueError: if the kernel has another number of features on that axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> affine = bnjax.Affine(scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.0, 1.0]))
      >>> kernel, bias = bnjax.fold_into_previous(jnp.ones((1, 2)), jnp.ones(2), affine)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0, 3.0]], [2.0, 4.0])
    """
    features = checks.feature_axes("fold_into_previous", kernel, axis)
    _check_fits("fold_into_previous", kernel, affine, kernel.shape[features[0]])
    scale, shift = affine
    scaled = kernel.astype(scale.dtype) * aligned(scale, kernel, features)
    moved = shift if bias is None else bias.astype(scale.dtype) * scale + shift
    return scaled.astype(kernel.dtype), moved.astype((kernel if bias is None else bias).dtype)


def fold_into_next(kernel: Array, bias: Array | None, affine: Affine, *, groups: int = 1) -> tuple[Array, Array]:
    """Kernel and bias of a linear layer with the layer before it folded in.

        kernel' = kernel * scale        bias' = bias + sum kernel * bias of the layer

    with the sum over all that enters an output. Exact where the kernel sees no padding of zeros: those stand for what
    the layer would have made `bias`. For a transposed convolution only a kernel of one place is so.

    Args:
      kernel: (..., inputs / groups, outputs).
      bias: of shape (outputs,), or None.
      affine: what `fold` gives, of shape (inputs,).
      groups: of a convolution (`feature_group_count`).

    Returns:
      kernel, and bias of shape (outputs,), in the dtype that each had.

    Raises:
      ValueError: if the kernel has another number of inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> affine = bnjax.Affine(scale=jnp.array([2.0, 3.0]), bias=jnp.array([0.0, 1.0]))
      >>> kernel, bias = bnjax.fold_into_next(jnp.ones((2, 1)), jnp.ones(1), affine)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0], [3.0]], [2.0])
    """
    _check_fits("fold_into_next", kernel, affine, kernel.shape[-2] * groups)
    # The outputs of a group stand together, and see the inputs of their group.
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
            f"affine.scale has shape {affine.scale.shape}. Fold layers that stand side by side."
        )
    if jnp.iscomplexobj(affine.bias) and not jnp.iscomplexobj(kernel):
        raise TypeError(
            f"{call}(kernel=...): a {kernel.dtype} kernel cannot hold a complex layer. Pass kernel.astype(complex)."
        )
