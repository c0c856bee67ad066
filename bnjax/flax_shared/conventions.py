"""The call of a BatchNorm layer by Flax's conventions for axes, masks and dtypes, for Linen and NNX alike.

A layer holds variables; the pure functions compute. What differs between the frameworks is where variables are kept and
how dtypes promote: an adapter, `Storage`, does that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from bnjax.core import checks
from bnjax.core.apply import apply
from bnjax.core.moments import wider
from bnjax.core.options import checked
from bnjax.core.records import BNParams, BNState, Collected, Moments, Support
from bnjax.variants.conditional import chosen_params


@dataclass
class Variables:
    """What a layer holds, as one call reads it; all arrays in any dtype.

    `count` is None where no option is a function of it. `collect` asks for the moments of the batch, and `earlier` are
    moments that those are merged into.
    """

    params: BNParams
    mean: Array
    var: Array
    count: Array | None
    collect: bool = False
    earlier: Collected | None = None


class Storage(Protocol):
    """The variables of one layer of Linen or NNX, for one call.

    `remedy` says what to do where the layer's statistics do not fit the features, whose sizes replace its braces.
    """

    remedy: str

    def read(self, x: Array, features: list[int], train: bool) -> Variables:
        """The variables of a layer with features of these sizes, created where the framework creates them."""
        ...

    def promoted(self, x: Array, variables: Variables) -> tuple[Array, BNParams, Any]:
        """`x` and the parameters as the framework promotes them, and the dtype of the output."""
        ...

    def write(self, variables: Variables, state: BNState, collected: Collected | None, train: bool) -> None:
        """Store what came out of the call."""
        ...


_BOOLEANS = ("unbiased_var", "frozen", "frozen_params")
_BOOLEANS_OF_FLAX = ("use_scale", "use_bias", "force_float32_reductions")


def _check_switches(call: str, layer: Any, use_running_average: Any) -> None:
    # To Flax 0, 1 and arrays are bools as well, so that of its own options only what is certainly wrong is refused.
    switches = {"use_running_average": use_running_average}
    switches |= {name: getattr(layer, name, False) for name in _BOOLEANS_OF_FLAX}
    for name, value in switches.items():
        if isinstance(value, str | Tracer):
            checks.boolean(call, name, value)
    for name in _BOOLEANS:
        checks.boolean(call, name, getattr(layer, name, False))


def call_layer(
    layer: Any,
    storage: Storage,
    x: Any,
    use_running_average: bool,
    *,
    axis_name: Any,
    mask: Any,
    label: Any = None,
    apply: Callable[..., Any] = apply,
) -> Array:
    """The output of a BatchNorm layer, Flax's or ours, whose storage is read and written.

    Args:
      layer: an object with the options of a BatchNorm layer as attributes.
      storage: where its variables are.
      x: floating, complex or integer.
      use_running_average: whether the running statistics normalize.
      axis_name: mapped axis, or several, whose devices share statistics here.
      mask: broadcastable to `x`, of any rank up to x's. One of lower rank has no features: it is an error if it would
        mask features alone, or if its sizes are those of x's first axes as well.
      label: the class of each example, for conditional parameters.
      apply: `bnjax.core.apply.apply`, or a variant's function in its place.
    """
    call = layer.__class__.__name__  # not by type(): a layer may come with other options in front of it
    x = array(x, call)
    _check_switches(call, layer, use_running_average)
    train = not use_running_average and not getattr(layer, "frozen", False)
    axes = feature_axes(x, layer.axis, call)
    features = tuple(x.shape[a] for a in axes)
    variables = storage.read(x, list(features), train)
    lead = variables.mean.ndim - len(features)  # statistics of several indices lead with an axis of them
    if variables.mean.shape[lead:] != features:
        sizes = features[0] if len(features) == 1 else features
        raise ValueError(
            f"{call}(x=...): x has shape {x.shape} and so features {features} on axis {layer.axis}, but the layer's "
            f"mean has shape {variables.mean.shape}. {storage.remedy.format(sizes)}"
        )
    x, params, dtype = storage.promoted(x, variables)
    if getattr(layer, "frozen_params", False):
        params = jax.lax.stop_gradient(params)
    if label is not None:
        params = chosen_params(call, params, jnp.asarray(label), x, axes)
    real = jnp.isrealobj(x) and jnp.isrealobj(variables.mean)
    x, mean = _computed(x, variables.mean, params)
    count = jnp.zeros(mean.shape, jnp.int32) if variables.count is None else variables.count
    options = checked(
        call,
        train,
        axis=axes,
        epsilon=layer.epsilon,
        axis_name=axis_name,
        axis_index_groups=None if axis_name is None else layer.axis_index_groups,  # without an axis Flax ignores them
        unbiased_var=getattr(layer, "unbiased_var", False),
        collect=variables.collect,
        dtype=jnp.dtype(dtype),
    )
    y, state, collected = apply(
        params,
        BNState(mean, variables.var, count),
        x,
        options,
        momentum=layer.momentum,
        mask=None if mask is None else _of_rank(jnp.asarray(mask), x, axes, call),
        earlier=variables.earlier,
    )
    if real:  # complex scale and bias do not make the mean complex
        state = state._replace(mean=state.mean.real)
    storage.write(variables, state, collected, train)
    return y


def _computed(x, mean, params):
    """`x` and the mean in dtypes that the pure function takes: complex if any of the variables is."""
    # Half precision cannot hold integers.
    x = x.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32)
    with promoting():
        wide = jnp.result_type(x.dtype, *(v for v in (mean, *params) if v is not None))
        if jnp.issubdtype(wide, jnp.complexfloating):
            mean = mean.astype(jnp.promote_types(mean.dtype, jnp.complex64))
    # The pure function widens half precision itself, after it has read it.
    return x if wide == wider(x.dtype) else x.astype(wide), mean


def _of_rank(mask, x, axes, call):
    """The mask with x's rank; like a NumPy operand it may lack leading axes.

    A mask of examples, without an axis of features, would mask features instead wherever the sizes agree by chance.
    """
    if not checks.broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"{call}(mask=...): mask has shape {mask.shape}, which does not broadcast to that of x, {x.shape}. "
            f"{_remedy(mask, x, axes) or 'Reshape it so that its last axes are those of x.'}"
        )
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    if mask.ndim < x.ndim and any(shape[a] != 1 for a in axes):
        features_only = all(n == 1 for a, n in enumerate(shape) if a not in axes)
        remedy = _remedy(mask, x, axes)
        if features_only or remedy:
            raise ValueError(
                f"{call}(mask=...): mask has shape {mask.shape}, which broadcasts to that of x, {x.shape}, by its last "
                f"axes, and so masks features, axis {axes if len(axes) > 1 else axes[0]} of x. {remedy}"
                f"To mask features pass mask.reshape{shape}."
            )
    return mask.reshape(shape)


def _remedy(mask, x, axes):
    """How to reshape a mask that fits the first or the last axes of x but the features; empty if it fits neither."""
    others = [a for a in range(x.ndim) if a not in axes]
    for fitting in others[: mask.ndim], others[-mask.ndim :]:
        if len(fitting) == mask.ndim and all(n in (1, x.shape[a]) for a, n in zip(fitting, mask.shape, strict=True)):
            shape = [1] * x.ndim
            for a, n in zip(fitting, mask.shape, strict=True):
                shape[a] = n
            last = x.ndim - mask.ndim == 1 and fitting == list(range(mask.ndim))
            spelled = "mask[..., None]" if last else f"mask.reshape{tuple(shape)}"
            return f"To mask examples or positions pass {spelled}, of shape {tuple(shape)}. "
    return ""


def counts(layer: Any) -> bool:
    """Whether an option of the layer is a function of the number of updates."""
    return any(callable(getattr(layer, name, None)) for name in ("momentum", "r_max", "d_max"))


def feature_axes(x: Array, axis: Any, call: str = "BatchNorm") -> tuple[int, ...]:
    """`axis`, one or several, as increasing non-negative integers; as in Flax one may be named twice."""
    axes = np.atleast_1d(checks.static_axis(call, axis)).tolist()
    return tuple(sorted({checks.feature_axes(call, x, a)[0] for a in axes}))


def array(x: Any, call: str) -> Array:
    """`x` as an array. A tuple, an image and its label say, is an error: JAX would stack its members."""
    if isinstance(x, tuple | list | dict):
        raise TypeError(
            f"{call}(x=...): expected an array, got a {type(x).__name__}. Pass the array in it, or jnp.asarray of a "
            "list of numbers."
        )
    return jnp.asarray(x)


def promoting() -> Any:
    """Flax's rules for the dtypes of results, which are JAX's standard ones, also where JAX is set to strict ones."""
    return jax.numpy_dtype_promotion("standard")


def nothing(mean: Array, var: Array) -> Collected:
    """The moments of no element at all, which merge with any others without an effect."""
    zeros = jnp.zeros_like(var.real)
    return Collected(Moments(zeros, jnp.zeros_like(mean), zeros), Support(zeros, zeros))
