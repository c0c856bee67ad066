"""Batch normalization as pure functions (Ioffe & Szegedy, 2015, algorithms 1 and 2).

    y = scale * (x - mean) / sqrt(var + epsilon) + bias

In training `mean` and `var` are the batch's moments, which the running statistics absorb; in evaluation they are the
running statistics. A call does four things, each of which is one function:

    validate            every argument is checked; x is widened to 32 bits or more
    choose_statistics   the batch's moments, or running statistics for a feature without a valid element
    normalize_by        the formula, whose derivative is in `normalize.py`
    update              the running statistics absorb the batch's, in `running.py`

The variants are made of the same four.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.moments import Batch, batch_of, collect, wider
from bnjax.core.normalize import normalize
from bnjax.core.options import Options, checked, fitted
from bnjax.core.records import BNParams, BNState, Collected, Moments
from bnjax.core.running import momentum_argument, update
from bnjax.core.schedules import Momentum
from bnjax.core.sharding import select, sharded_as


def bn_init(
    features: int | Sequence[int],
    *,
    scale: Any | None = 1.0,
    bias: Any | None = 0.0,
    dtype: Any = jnp.float32,
) -> tuple[BNParams, BNState]:
    """Parameters and running statistics of a new layer, which in evaluation is the identity up to epsilon.

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
    shape = checks.feature_shape("bn_init", features)
    dtype = checks.inexact_dtype("bn_init", dtype)

    def initial(name, value):
        if value is None:
            return None
        checks.initial("bn_init", name, value, shape, dtype)
        return jnp.broadcast_to(jnp.array(value, dtype), shape)

    wide = wider(dtype)
    state = BNState(jnp.zeros(shape, wide), jnp.ones(shape, jnp.finfo(wide).dtype), jnp.zeros(shape, jnp.int32))
    return BNParams(initial("scale", scale), initial("bias", bias)), state


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
    `params`, `state` and `x`. Statistics are exact under every transform; under `jit` over sharded arrays they are the
    statistics of the global batch, and no axis has to be named.

    `x` is read once for its statistics, around the running mean c:

        mean = c + E[x - c]                 var = E|x - c|^2 - |E[x - c]|^2

    With r = |mean - c|^2 / var, a relative rounding error e of the sums becomes about e (1 + r) in var, and
    e sqrt(1 + r) standard deviations in mean. If r > 8 for any feature, as on the first steps or after a jump of the
    data, `x` is read twice more, around its own mean, so that results are exact wherever the running mean is. On one
    CPU device, on one GPU and on each GPU of a `shard_map`, c is the mean of a sixteenth of `x`, which bounds r without
    a check; under a mask the CPU reads `x` twice, and the GPU around the running mean.

    Args:
      params: `scale` and `bias`. Each is None, has the shape of the features, or is conditional: x's rank, with each
        size 1 or x's.
      state: running statistics. None normalizes by the batch's statistics, in training and in evaluation.
      x: floating or complex, any shape. For complex `x`, `var` is E|x - mean|^2 and `state.mean` is complex.
      train: a Python bool. True normalizes by the batch and updates the state, False by the running statistics.
      axis: the feature axis of `x`, or several; features are in the order of increasing axes.
      momentum: weight of the OLD value, in [0, 1], as in Flax and Keras (PyTorch's momentum is 1 minus it), or a
        function of `state.count` such as `cumulative_average` or `debiased(0.99)`. The function is called in Python:
        your own `jit` keeps what it read from elsewhere while tracing.
      epsilon: number that is added to the variance, > 0.
      mask: array of x's rank that broadcasts to it, boolean or weights >= 0. A negative weight is an error, or 0 where
        only run time knows it. Only the ratios of weights count, and their sum must be finite in float32. Masked
        elements (weight 0), even NaN, do not affect any other element, nor the statistics. They are normalized like the
        others; a masked element whose output is not finite is treated as a constant when differentiating. The mask is
        not differentiated.
      axis_name: mapped axis, or several, whose devices or examples share statistics, merged by weight. The forward
        pass gathers 3 x features numbers (5 with real-valued weights), the backward pass has one psum of 2 x features.
        Under `vmap` each example is read around the mean of its own first sixteenth.
      axis_index_groups: groups of indices as in `jax.lax.psum`; each group has its own statistics and state.
      unbiased_var: whether the running variance is divided by n - sum(w^2) / n in place of n, which is n - 1 without
        real-valued weights. `y` is normalized by the biased variance, as in PyTorch.

    Returns:
      y: of x's shape and dtype. Reductions are float32 or wider.
      state: in the dtypes it came in; in evaluation unchanged.

    A feature with fewer than two valid values, or with statistics that are not finite, keeps its state and count. With
    one valid value var is 0, so that this value becomes `bias`. With none, the feature is normalized by the running
    statistics (by mean 0 and var 1 if state is None). A valid NaN or infinity gives NaN in the output and gradient of
    its feature. So does, under every transform, a variance that exceeds a quarter of the largest number divided by the
    number of values n (in float32 a standard deviation above 9e18 / sqrt(n)). In evaluation by running statistics,
    axis_name has no effect, and the mask affects only derivatives: masked elements whose output is not finite do not
    enter them.

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
    options = checked(
        "bn_apply",
        train,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
    )
    return apply(params, state, x, options, momentum=momentum, mask=mask)[:2]


def apply(
    params: Any,
    state: BNState | None,
    x: Array,
    options: Options,
    *,
    momentum: Any,
    mask: Array | None,
    earlier: Collected | None = None,
) -> tuple[Array, BNState | None, Collected | None]:
    """`bn_apply` with checked options, and the moments of the batch if the options ask for them.

    `earlier` are the moments of other parts of one larger batch. They are merged with the moments of this part: the
    state absorbs all of them, and all of them are returned. The output is normalized by the moments of this part.
    """
    options = fitted(options, x, mask)
    momentum = momentum_argument(options.call, momentum, state, options.train)
    return compiled_apply(params, state, x, mask, momentum, earlier, options=options)


@partial(jax.jit, static_argnames="options", inline=True)
def compiled_apply(
    params: Any,
    state: BNState | None,
    x: Array,
    mask: Array | None,
    momentum: tuple[Any, Any],
    earlier: Collected | None,
    *,
    options: Options,
) -> tuple[Array, BNState | None, Collected | None]:
    """`apply`, compiled once for each set of options."""
    batch = validate(params, state, x, mask, options)
    collected = None
    if state is not None and not options.train:
        mean, var = state.mean, state.var.real
    else:
        statistics = batch_statistics(batch, state, options)
        mean, var = choose_statistics(statistics.moments, state, batch)
        state, collected = update(state, statistics, earlier, momentum, options)
    scale, bias = params
    return normalize_by(mean, var, scale, bias, batch, options), state, collected


def validate(params: Any, state: BNState | None, x: Array, mask: Array | None, options: Options) -> Batch:
    """The batch to normalize, after all arguments have been checked."""
    features = checks.feature_axes(options.call, x, options.axis)
    checks.variables(options.call, params, state, x, features, options.axis)
    checks.weights(options.call, mask, x)
    if options.train or state is None:
        checks.bound_axes(options.call, options.axis_names, options.axis_index_groups)
    return batch_of(x, mask, features)


def batch_statistics(batch: Batch, state: BNState | None, options: Options) -> Collected:
    """The moments of the batch, over the named axes too. The running mean is a guess of the batch's mean."""
    shift = None if state is None else state.mean
    return collect(batch, options.axis_names, options.axis_index_groups, shift=shift)


def choose_statistics(moments: Moments, state: BNState | None, batch: Batch) -> tuple[Array, Array]:
    """Mean and variance to normalize by: the batch's, or the running ones for a feature without a valid element."""
    _, mean, var = moments
    if batch.mask is None and 0 not in batch.x.shape:
        return mean, var
    if state is None:
        running_mean, running_var = jnp.zeros_like(mean), jnp.ones_like(var)
    else:
        running_mean, running_var = state.mean.astype(mean.dtype), state.var.real.astype(var.dtype)
    some = moments.weight > 0
    return select(some, mean, sharded_as(mean, running_mean)), select(some, var, sharded_as(var, running_var))


@jax.named_scope("bnjax.normalize")
def normalize_by(
    mean: Array, var: Array, scale: Array | None, bias: Array | None, batch: Batch, options: Options
) -> Array:
    """The formula, in the output's dtype; statistics of the features' shape, scale and bias of that or conditional."""
    dtype = options.dtype or batch.dtype
    per_feature = (aligned(v, batch.x, batch.features) for v in (mean, var, scale, bias))
    return normalize(batch.x, *per_feature, batch.mask, options.epsilon, dtype).astype(dtype)


def aligned(v: Any, x: Array, features: tuple[int, ...]) -> Any:
    """`v`, of the shape of the features, with x's rank, which conditional scale and bias have, and sharded as `x`."""
    if v is None:
        return v
    return sharded_as(x, v if v.ndim == x.ndim else jnp.expand_dims(v, [a for a in range(x.ndim) if a not in features]))
