"""Conditional batch normalization: a scale and a bias for each class (de Vries et al., 2017)."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.core import checks
from bnjax.core.domains import row_sharding, rows
from bnjax.core.records import BNParams


def conditional_params(params: BNParams, label: Array, x: Array, *, axis: checks.Axis = -1) -> BNParams:
    """The scale and bias of each example's class, for conditional batch normalization (de Vries et al., 2017).

        y = scale[label] * (x - mean) / sqrt(var + epsilon) + bias[label]

    Args:
      params: scale and bias, each None or of shape (classes, *features).
      label: integers of shape (batch,); they are clamped to [0, classes).
      x: the input of `bn_apply`. Its first axis that is not a feature axis is the batch axis.
      axis: the feature axis of `x`, or several.

    Returns:
      Scale and bias in the dtypes of params and of x's rank: of the batch's size on the batch axis, of x's sizes on the
      feature axes, and of size 1 on all others.

    Raises:
      TypeError: if the labels are not integers.
      ValueError: if there is not one label for each example, or a parameter has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> classes = bnjax.BNParams(scale=jnp.array([[1.0], [2.0]]), bias=None)
      >>> x, label = jnp.array([[1.0], [3.0]]), jnp.array([0, 1])
      >>> bnjax.bn_apply(bnjax.conditional_params(classes, label, x), None, x, True)[0].round(2).tolist()
      [[-1.0], [2.0]]
    """
    return chosen_params("conditional_params", params, label, x, axis)


def chosen_params(call: str, params: BNParams, label: Array, x: Array, axis: checks.Axis) -> BNParams:
    """`conditional_params`; errors name `call`."""
    features = checks.feature_axes(call, x, axis)
    shape = tuple(x.shape[a] for a in features)
    expected = ", ".join(map(str, ("classes", *shape)))
    for name, table in zip(("scale", "bias"), params, strict=True):
        if table is not None and (np.shape(table)[1:] != shape or not np.shape(table)[0]):
            raise ValueError(
                f"{call}(params=...): expected {name} of shape ({expected}), got {np.shape(table)}. "
                f"Give each class a value for each feature of x, which has shape {x.shape}."
            )
    rest = [a for a in range(x.ndim) if a not in features]
    if not jnp.issubdtype(jnp.result_type(label), jnp.integer):
        raise TypeError(f"{call}(label=...): expected integers, got {jnp.result_type(label)}.")
    if not rest or np.shape(label) != (x.shape[rest[0]],):
        raise ValueError(
            f"{call}(label=...): expected one for each example, x has shape {x.shape}, got shape "
            f"{np.shape(label)}. Pass integers of shape (batch,)."
        )

    def chosen(table):
        if table is None:
            return None
        values = rows(table, label, row_sharding(x, (rest[0], *features)))
        order = np.argsort([rest[0], *features])
        return jnp.expand_dims(values.transpose(order), rest[1:])

    return BNParams(*map(chosen, params))
