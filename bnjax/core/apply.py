"""Batch normalization as two pure functions around `bnjax.BatchNorm` (Ioffe & Szegedy, 2015, algorithms 1 and 2)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.layer import BatchNorm, initial
from bnjax.core.records import BNParams, BNState
from bnjax.core.schedules import Momentum


def bn_init(
    features: int | Sequence[int],
    *,
    scale: Any | None = 1.0,
    bias: Any | None = 0.0,
    dtype: Any = jnp.float32,
) -> tuple[BNParams, BNState]:
    """Parameters and running statistics of a new layer, which by default is the identity in evaluation, up to epsilon.

    Args:
      features: number of features, or one number per feature axis in increasing axis order.
      scale: initial scale, a number or an array that broadcasts to `features`; 0 starts a residual branch at zero.
        None leaves the scale out.
      bias: initial bias, likewise.
      dtype: dtype of scale and bias, floating or complex. The running statistics have this dtype widened to at least
        32 bits; the variance is real and the count is int32.

    Returns:
      `BNParams(scale, bias)` and `BNState(mean=0, var=1, count=0)`.

    Raises:
      TypeError, ValueError: for features that are not non-negative integers, a dtype that is neither floating nor
        complex, or an initial value that does not broadcast to `features`.

    Example:
      >>> import bnjax
      >>> params, state = bnjax.bn_init(64, scale=0.0)
      >>> params.scale.shape, state.count.dtype
      ((64,), dtype('int32'))
    """
    return initial("bn_init", features, scale, bias, dtype)


def bn_apply(
    params: BNParams,
    state: BNState | None,
    x: Array,
    train: bool,
    *,
    axis: checks.Axis = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased_var: bool = False,
) -> tuple[Array, BNState | None]:
    """Batch normalization (Ioffe & Szegedy, 2015, algorithms 1 and 2).

        y = scale * (x - mean) / sqrt(var + epsilon) + bias
        running = momentum * running + (1 - momentum) * batch          for mean and var, in training

    The call is compiled once per shape and set of options. It is differentiable to any order, forward and reverse, in
    `params`, `state` and `x`. Statistics are exact under every transform and for every running mean. Under `jit` over
    sharded arrays they are the statistics of the global batch, without an axis name.

    Args:
      params: `scale` and `bias`. Each is None, has the shape of the features, or is conditional: x's rank, with each
        size 1 or x's.
      state: running statistics. None normalizes by the batch's statistics, in training and in evaluation.
      x: floating or complex, any shape. For complex `x`, `var` is E|x - mean|^2 and `state.mean` is complex.
      train: a Python bool. True normalizes by the batch and updates the state, False by the running statistics.
      axis: the feature axis of `x`, or several; features are in the order of increasing axes.
      momentum: weight of the OLD value, in [0, 1], as in Flax and Keras (PyTorch's momentum is 1 minus it), or a
        function of `state.count` such as `cumulative_average` or `debiased(0.99)`. The function is called in Python, so
        under your own `jit` any other value that it reads is fixed while tracing.
      epsilon: number added to the variance, > 0.
      mask: array of x's rank that broadcasts to it, boolean or weights >= 0. A negative weight is an error, or counts
        as 0 if it is known only at run time. Only the ratios of weights count, and their sum must be finite in float32.
        Masked elements (weight 0), even NaN, do not affect any other element, nor the statistics. They are normalized
        like the others; a masked element whose output is not finite is treated as a constant when differentiating. The
        mask is not differentiated.
      axis_name: mapped axis, or several, whose devices or examples share statistics, merged by weight. There is usually
        one collective in the forward pass and one in the backward pass.
      axis_index_groups: groups of indices as in `jax.lax.psum`; each group has its own statistics and state.
      unbiased_var: whether the running variance is divided by n - sum(w^2) / n in place of n = sum(w); without
        real-valued weights this is n - 1. `y` is normalized by the biased variance, as in PyTorch.

    Returns:
      y: of x's shape and dtype. Reductions are float32 or wider.
      state: in the dtypes of the given one; unchanged in evaluation.

    A feature with fewer than two valid values, or with statistics that are not finite, keeps its state and count. With
    one valid value var is 0 and the output is `bias`. With none, the feature is normalized by the running statistics
    (by mean 0 and var 1 if state is None). A valid NaN or infinity gives NaN in the output and gradient of its feature.
    So does a variance above the largest finite number / (4 n), with n the number of values (in float32 a standard
    deviation above 9e18 / sqrt(n)), under every transform. In evaluation by running statistics, axis_name has no
    effect, and the mask affects only derivatives: they leave out masked elements whose output is not finite.

    Raises:
      TypeError, ValueError: while tracing, for shapes, dtypes and Python values that do not fit; the message names
        the argument, what came and what to pass. A momentum that is known only at run time is clamped to [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.bn_init(2)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = bnjax.bn_apply(params, state, x, train=True, momentum=0.9)
      >>> y.round(3).tolist(), state.mean.round(3).tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.2..., 2.0])
    """
    layer = BatchNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        call="bn_apply",
    )
    return layer.apply(params, state, x, train, mask)
