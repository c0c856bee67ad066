"""Batch normalization as pure functions (Ioffe & Szegedy, 2015, algorithms 1 and 2).

    y = scale * (x - mean) / sqrt(var + epsilon) + bias

In training `mean` and `var` are the batch's moments, which the running statistics absorb; in evaluation they are the
running statistics. The formula and its derivative are in `normalize.py`, the moments and theirs in `moments.py`.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.array_moments import Moments, serializable, sharded_as
from bnjax.core.moments import Support, merge_along, supported_moments, wider
from bnjax.core.normalize import normalize
from bnjax.core.schedules import Momentum


@serializable
class BNParams(NamedTuple):
    """Learned scale (gamma) and bias (beta), of the shape of the features; None where there is none."""

    scale: Array | None
    bias: Array | None


@serializable
class BNState(NamedTuple):
    """Running mean and variance, and how many updates each feature absorbed; of the shape of the features."""

    mean: Array
    var: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  a tuple counts too


@serializable
class Collected(NamedTuple):
    """What a layer saw: the moments, and what stands behind their weight."""

    moments: Moments
    support: Support


def bn_init(
    features: int | Sequence[int],
    *,
    scale: Any | None = 1.0,
    bias: Any | None = 0.0,
    dtype: Any = jnp.float32,
) -> tuple[BNParams, BNState]:
    """Parameters and running statistics of a fresh layer: the identity map in evaluation, up to epsilon.

    Args:
      features: number of features, or one number per feature axis in increasing axis order.
      scale: initial scale, a number or an array that broadcasts to `features`. 0 starts a residual branch at zero;
        None leaves scale out.
      bias: initial bias, likewise.
      dtype: of scale and bias, floating or complex. Statistics are kept in it widened to 32 bits at least; the
        variance is real and the count is int32.

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

    Compiled once per shape and set of options. Differentiable to any order, forward and reverse, in `params`, `state`
    and `x`. Statistics are exact under every transform; under `jit` over sharded arrays they are those of the global
    batch without naming anything.

    `x` is read once for its statistics, around the running mean c:

        mean = c + E[x - c]                 var = E|x - c|^2 - |E[x - c]|^2

    With r = |mean - c|^2 / var, a relative rounding error e of the sums becomes about e (1 + r) in var, and
    e sqrt(1 + r) standard deviations in mean. Where r > 8 for some feature, as on the first steps or after a jump of
    the data, `x` is read twice more, around its own mean, so that results are as exact wherever the running mean is.
    One CPU device takes for c the mean of a sixteenth of `x`, which needs no guard; under a mask it reads `x` twice.

    Args:
      params: `scale` and `bias`, each None, of the shape of the features, or conditional: of x's rank with each size
        1 or x's.
      state: running statistics; None normalizes by the batch's, in training and in evaluation.
      x: floating or complex, any shape. For complex `x`, `var` is E|x - mean|^2 and `state.mean` is complex.
      train: a Python bool. True normalizes by the batch and updates the state, False by the running statistics.
      axis: the feature axis of `x`, or several; features follow in increasing axis order.
      momentum: weight of the OLD value, in [0, 1], as in Flax and Keras (PyTorch's is 1 minus it), or a function of
        `state.count` such as `cumulative_average` or `debiased(0.99)`.
      epsilon: added to the variance, > 0.
      mask: of x's rank and broadcastable to it, boolean or weights >= 0 (a negative one counts as 0), of which only
        the ratios count; their sum has to be finite in float32. Places of weight 0 may hold anything, NaN included;
        they do not enter the statistics and are normalized like all others, and where their output is not finite they
        are constants to derivatives. It is not differentiated.
      axis_name: mapped axis, or several, whose devices or examples share statistics, merged by weight: one gather of
        3 x features numbers forward (5 with real-valued weights), one psum of 2 x features backward. Examples under
        `vmap` are each read around the mean of their own first sixteenth.
      axis_index_groups: as in `jax.lax.psum`; each group has statistics and a state of its own.
      unbiased_var: the running variance takes the sum of squares divided by n - sum(w^2) / n in place of n, which is
        n - 1 without real-valued weights. `y` is normalized by the biased one, as in PyTorch.

    Returns:
      y: of x's shape and dtype. Reductions are float32 or wider.
      state: in the dtypes it came in; in evaluation unchanged.

    Where the data carry too little, per feature: fewer than two valid values, or statistics that are not finite, leave
    state and count as they were. With one valid value var is 0, so that value becomes `bias`. With none, `x` is
    normalized by the running statistics (by mean 0 and var 1 where state is None). A NaN or infinity at a valid place
    shows in the output of its feature. Mask and axis_name play no part in evaluation by running statistics
    (but for derivatives: what is not finite at a masked place does not enter them).

    Raises:
      TypeError, ValueError: while tracing, for shapes, dtypes and Python values that do not fit; the message names
        the argument, what came and what to pass. A momentum known only at run time is clamped to [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.bn_init(2)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = bnjax.bn_apply(params, state, x, train=True, momentum=0.9)
      >>> y.round(3).tolist(), state.mean.round(3).tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.2..., 2.0])
    """
    return bn_collect(
        params,
        state,
        x,
        train,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased_var=unbiased_var,
        collect=False,
    )[:2]


def bn_collect(
    params: Any,
    state: BNState | None,
    x: Array,
    train: bool,
    *,
    axis: Any,
    momentum: Any,
    epsilon: float,
    mask: Array | None,
    axis_name: Any,
    axis_index_groups: Any,
    unbiased_var: bool,
    collect: bool,
    earlier: Collected | None = None,
    dtype: Any = None,
    call: str = "bn_apply",
) -> tuple[Array, BNState | None, Collected | None]:
    """`bn_apply`, and in training, if `collect`, the batch's moments. Errors name `call`.

    `earlier` moments, of other parts of one larger batch, are merged with those of this part: it is the moments of all
    parts that the state absorbs and that come back. The output is normalized by this part's own. `dtype` is that of
    the output, by default x's: a layer whose output is wider than its input need not widen the input first.
    """
    options, rate = canonical(
        call, train, state, axis, momentum, epsilon, axis_name, axis_index_groups, unbiased_var, collect, dtype
    )
    return apply_canonical(params, state, x, mask, rate, earlier, options=options)


class Options(NamedTuple):
    """What is static in a call, checked and in one spelling."""

    call: str
    train: bool
    axis: Any
    schedule: Any
    epsilon: float
    names: tuple[Any, ...]
    groups: Any
    unbiased_var: bool
    collect: bool
    dtype: Any


def canonical(
    call, train, state, axis, momentum, epsilon, axis_name, axis_index_groups, unbiased_var, collect, dtype=None
) -> tuple[Options, Any]:
    """The options, and the momentum with its complement, None if it is a function among the options."""
    checks.boolean(call, "train", train)
    checks.boolean(call, "unbiased_var", unbiased_var)
    schedule, momentum = static_schedule(momentum, state, train)
    options = Options(
        call,
        train,
        checks.static_axis(call, axis),
        schedule,
        checks.positive(call, "epsilon", epsilon),
        checks.axis_names(call, axis_name),
        checks.index_groups(call, axis_index_groups),
        unbiased_var,
        collect,
        dtype,
    )
    return options, None if callable(momentum) else checks.momentum(call, momentum)


def static_schedule(value: Any, state: Any, train: bool) -> tuple[Any, Any]:
    """A number or function of the count as (None, number), or as (function, function) where it may be compiled in.

    A function that is another object at each call, such as a lambda in a loop, would be compiled each time. It is
    evaluated here, so that only numbers enter what is compiled.
    """
    lasts = type(value).__eq__ is not object.__eq__ or "<" not in getattr(value, "__qualname__", "<")
    if not callable(value) or (lasts and isinstance(value, Hashable)):
        return (value if callable(value) else None), value
    used = train and hasattr(state, "count")
    return None, value(jnp.asarray(state.count)) if used else 0.0


@partial(jax.jit, static_argnames="options", inline=True)
def apply_canonical(params, state, x, mask, rate, earlier, *, options):
    features, wide, mask = widened(params, state, x, mask, options)
    collected = None
    if state is not None and not options.train:
        mean, var = state.mean, state.var.real
    else:
        batch = batch_collected(wide, mask, features, state, x.dtype, options)
        mean, var = usable(batch.moments, state, x, mask)
        state, collected = absorbed(state, batch, earlier, rate, options)
    scale, bias = params
    dtype = options.dtype or x.dtype
    y = normalize(wide, *(aligned(v, x, features) for v in (mean, var, scale, bias)), mask, options.epsilon, dtype)
    return y.astype(dtype), state, collected


def batch_collected(x, mask, features, state, dtype, options):
    """The moments of widened `x`, looked at around the running mean, over the named axes too."""
    shift = None if state is None else state.mean
    return Collected(*supported_moments(x, mask, features, options.names, options.groups, dtype=dtype, shift=shift))


def widened(params, state, x, mask, options):
    """The feature axes, `x` in 32 bits or more, and the mask. All arguments are checked.

    `x` is widened once, so that the parts of its gradient are summed before they are rounded.
    """
    checks.inexact(options.call, "x", x)
    features = checks.feature_axes(options.call, x, options.axis)
    checks.variables(options.call, params, state, x, features, options.axis)
    checks.weights(options.call, mask, x)
    if options.train or state is None:
        checks.bound_axes(options.call, options.names, options.groups)
    return features, x.astype(wider(x.dtype)), None if mask is None else sharded_as(x, mask)


def aligned(v, x, features) -> Any:
    """`v`, of the shape of the features, with x's rank, which conditional scale and bias have, and sharded as `x`."""
    if v is None:
        return v
    return sharded_as(x, v if v.ndim == x.ndim else jnp.expand_dims(v, [a for a in range(x.ndim) if a not in features]))


def usable(batch, state, x, mask):
    """The mean and variance to normalize by: the batch's, or the running ones for a feature without a valid value."""
    mean, var = batch.mean, batch.var
    if mask is None and 0 not in x.shape:
        return mean, var
    idle = (
        (jnp.zeros_like(mean), jnp.ones_like(var))
        if state is None
        else (state.mean.astype(mean.dtype), state.var.real.astype(var.dtype))
    )
    pairs = zip((mean, var), idle, strict=True)
    return (select(batch.weight > 0, new, sharded_as(new, old)) for new, old in pairs)


def absorbed(state, batch, earlier, rate, options, std_epsilon=None):
    """The state after an update by this batch, and what was collected, both with the earlier parts if there are any."""
    if earlier is not None:
        batch = joined(earlier, batch)
    if state is not None:
        if options.schedule is not None:
            rate = checks.momentum(options.call, options.schedule(state.count))
        checks.rate(options.call, rate, state.count)
        state = absorb(state, *batch, rate, options.unbiased_var, std_epsilon)
    return state, batch if options.collect else None


def joined(first, second):
    """Moments and support of two parts together."""
    both: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    return Collected(*merge_along(both.moments, both.support, 0))


def absorb(state, batch, support, rate, unbiased_var, std_epsilon=None):
    """`state` after one update, where the batch carries information; dtypes stay.

    Averages are those of mean and var, or of mean and sqrt(var + std_epsilon).
    """
    batch, support = jax.tree.map(lambda v: sharded_as(state.mean, v), (batch, support))
    var = batch.var
    enough = support.valid >= 2
    if unbiased_var:
        divisor = batch.weight - support.mean_weight
        enough &= divisor > 0
        var = var * jnp.where(enough, batch.weight / jnp.where(enough, divisor, 1), 1)
    enough &= jnp.isfinite(batch.mean) & jnp.isfinite(var)

    def average(old, new):
        dtype = wider(old.dtype, new.dtype)
        keep, take = (jnp.asarray(r).astype(dtype) for r in rate)
        excess = (keep - 1) + take  # both are rounded: without this a constant would drift by excess / take
        return keep * old.astype(dtype) + (take * new.astype(dtype) - excess * old.astype(dtype))

    mean = average(state.mean, batch.mean)
    if std_epsilon is None:
        var = average(state.var, var)
    else:
        dtype = wider(state.var.dtype, var.dtype)
        std = average(*(jnp.sqrt(v.real.astype(dtype) + std_epsilon) for v in (state.var, var)))
        var = jnp.maximum(std * std - std_epsilon, 0)
    return BNState(
        select(enough, mean.astype(state.mean.dtype), state.mean),
        select(enough, var.astype(state.var.dtype), state.var),
        state.count + enough.astype(state.count.dtype),
    )


def select(which, new, old):
    """`new` where `which`, else `old`, arrays of one shape, sharded as `old`."""
    return jnp.where(sharded_as(old, which), sharded_as(old, new), old)
