"""The call of a BatchNorm layer by Flax's conventions for axes, masks and dtypes, for Linen and NNX alike.

A layer holds variables; the pure functions compute. The frameworks differ in where variables are kept and how dtypes
promote: an adapter, `Storage`, handles both.
"""

from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.core import checks
from bnjax.core.jax_internals import is_traced
from bnjax.core.layer import BatchNorm
from bnjax.core.merging import with_support
from bnjax.core.moments import wider
from bnjax.core.records import BNParams, BNState, Collected, Moments
from bnjax.variants.adaptive import AdaptiveBatchNorm
from bnjax.variants.conditional import chosen_params
from bnjax.variants.indexed import IndexedBatchNorm


@dataclass
class Variables:
    """What a layer holds, as one call reads it; all arrays in any dtype.

    `count` is None if the call has no count. The batch's moments are merged into `earlier`.
    """

    params: BNParams
    mean: Array
    var: Array
    count: Array | None
    earlier: Collected | None = None


class Storage(Protocol):
    """The variables of one layer of Linen or NNX, for one call.

    `remedy` says what to do if the layer's statistics do not fit the features, whose sizes replace its braces.
    """

    remedy: str

    def read(self, x: Array, features: list[int], train: bool) -> Variables:
        """The variables of a layer with features of these sizes, created where the framework creates them."""
        ...

    def promoted(self, x: Array, variables: Variables) -> tuple[Array, BNParams, Any]:
        """`x` and the parameters as the framework promotes them, and the dtype of the output."""
        ...

    def write(self, state: BNState, batch: Collected | None, train: bool) -> None:
        """Store the results of the call, with the `complete` moments of the batch in a layer that collects them."""
        ...


_BOOLEANS = ("frozen", "frozen_params")
_BOOLEANS_OF_FLAX = ("use_scale", "use_bias", "force_float32_reductions")


def _check_switches(call: str, layer: Any, use_running_average: Any) -> None:
    # Flax accepts 0, 1 and arrays as bools, so of its own options only what is certainly wrong is rejected.
    switches = {"use_running_average": use_running_average}
    switches |= {name: getattr(layer, name, False) for name in _BOOLEANS_OF_FLAX}
    for name, value in switches.items():
        if isinstance(value, str) or is_traced(value):
            checks.boolean(call, name, value)
    for name in _BOOLEANS:
        checks.boolean(call, name, getattr(layer, name, False))


def options_of(layer: Any, kind: type[BatchNorm], **others: Any) -> BatchNorm:
    """The value of `kind` with the options that the layer has as attributes, except for `others`."""
    own = {field.name: getattr(layer, field.name) for field in fields(kind) if hasattr(layer, field.name)}
    return kind(**{**own, **others})


def call_layer(
    layer: Any,
    storage: Storage,
    x: Any,
    use_running_average: bool,
    *,
    axis_name: Any,
    mask: Any,
    label: Any = None,
    kind: type[BatchNorm] = BatchNorm,
    **inputs: Any,
) -> Array:
    """The output of a BatchNorm layer, Flax's or ours, whose storage is read and written.

    Args:
      layer: an object with the options of a BatchNorm layer as attributes.
      storage: where its variables are.
      x: floating, complex or integer.
      use_running_average: whether the running statistics normalize.
      axis_name: mapped axis, or several, whose devices share statistics here.
      mask: broadcastable to `x`. One of lower rank than `x` may not reach a feature axis.
      label: the class of each example, for conditional parameters.
      kind: the class of the pure layer, `bnjax.BatchNorm` or a variant.
      **inputs: further arguments of its call.
    """
    call = layer.__class__.__name__  # not by type(): a layer may come with other options in front of it
    x = array(x, call)
    _check_switches(call, layer, use_running_average)
    train = not use_running_average and not getattr(layer, "frozen", False)
    if not train and not use_running_average and kind is AdaptiveBatchNorm:
        kind = BatchNorm  # frozen, in training: by only the running statistics
    axes = feature_axes(x, layer.axis, call)
    features = tuple(x.shape[a] for a in axes)
    variables = storage.read(x, list(features), train)
    _check_ones(call, variables, features, issubclass(kind, IndexedBatchNorm))
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
    groups = None if axis_name is None else layer.axis_index_groups  # without an axis Flax ignores them
    norm = options_of(layer, kind, axis=axes, axis_name=axis_name, axis_index_groups=groups, dtype=dtype, call=call)
    y, state, batch = norm.apply_part(
        params,
        BNState(mean, variables.var, count),
        x,
        train,
        None if mask is None else _of_rank(mask, x, axes, call),
        variables.earlier,
        **inputs,
    )
    if real:  # complex scale and bias do not make the mean complex
        state = state._replace(mean=state.mean.real)
    storage.write(state, batch or variables.earlier, train)  # in evaluation nothing is added
    return y


def _check_ones(call, variables, features, indexed):
    """Check that statistics do not differ from the features by only axes of size 1, as other libraries keep them."""
    for name, value in (("mean", variables.mean), ("var", variables.var)):
        shape = value.shape[1:] if indexed and value.ndim > len(features) else value.shape
        if shape != features and [n for n in shape if n != 1] == [n for n in features if n != 1]:
            raise ValueError(
                f"{call}(...): the layer's {name} has shape {value.shape}, but the features have the shape {features}. "
                f"Their sizes agree: pass the statistics without axes of size 1, {name}.reshape({features})."
            )


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


def _of_rank(mask, x, axes, call) -> Any:
    """The mask with x's rank. It may lack leading axes, as in NumPy, where this is unambiguous."""
    mask = mask if isinstance(mask, np.ndarray) else jnp.asarray(mask)  # NumPy's stay known under jit
    if mask.shape == x.shape:
        return mask
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    fits = checks.broadcasts(mask.shape, x.shape)
    # One size for each example would mask features wherever a batch has as many examples as features.
    by_feature = any(shape[a] != 1 for a in axes)
    leading = mask.shape == x.shape[: mask.ndim] and any(n != 1 for n in mask.shape)
    if fits and (mask.ndim == x.ndim or not (by_feature or leading)):
        return mask.reshape(shape)
    problem = "does not broadcast to x"
    if fits:
        problem = "could mask features" if by_feature else "fits the first axes of x as well as the last"
    places = combinations(range(x.ndim), mask.ndim)
    meant = [p for p in places if all(n in (1, x.shape[a]) for n, a in zip(mask.shape, p, strict=True))]
    remedies = [
        f"{_index(p, x.ndim)} for {'axis' if len(p) == 1 else 'axes'} {str(p).strip('(,)')} of x" for p in meant
    ]
    raise ValueError(
        f"{call}(mask=...): mask has shape {mask.shape}, which {problem}: x has shape {x.shape}, features on axis "
        f"{axes[0] if len(axes) == 1 else axes}, and sizes are aligned from the last axis, as in NumPy. Pass "
        f"{', or '.join(remedies) or 'a mask with each size 1 or that of x'}."
    )


def _index(places, ndim):
    """The expression that puts the axes of a mask at these places among `ndim`."""
    return f"mask[{', '.join(':' if a in places else 'None' for a in range(ndim))}]"


def counts(layer: Any) -> bool:
    """Whether an option of the layer is a function of the number of updates."""
    return any(callable(getattr(layer, name, None)) for name in ("momentum", "r_max", "d_max"))


def feature_axes(x: Array, axis: Any, call: str = "BatchNorm") -> tuple[int, ...]:
    """`axis`, one or several, as increasing non-negative integers; as in Flax, an axis may be named twice."""
    axes = np.atleast_1d(checks.static_axis(call, axis)).tolist()
    return tuple(sorted({checks.feature_axes(call, x, a)[0] for a in axes}))


def array(x: Any, call: str) -> Array:
    """`x` as an array. A tuple, such as an image and its label, is an error: JAX would stack its members."""
    if isinstance(x, tuple | list | dict):
        raise TypeError(
            f"{call}(x=...): expected an array, got a {type(x).__name__}. Pass the array in it, or jnp.asarray of a "
            "list of numbers."
        )
    return jnp.asarray(x)


def promoting() -> Any:
    """Flax's rules for the dtypes of results, which are JAX's standard ones, even if JAX is set to strict ones."""
    return jax.numpy_dtype_promotion("standard")


def complete(batch: Collected | None, mean: Array, var: Array) -> Collected:
    """The moments with their support, as a layer with this mean and variance stores them; by default of no element.

    Such moments have no effect when merged with others.
    """
    zeros = jnp.zeros_like(var.real)
    return with_support(batch or Collected(Moments(zeros, jnp.zeros_like(mean), zeros), None))
