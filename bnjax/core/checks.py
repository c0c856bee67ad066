"""Checks of arguments while tracing: shapes, dtypes and Python values, never array contents.

Every message names the call and the argument, then what came, what was expected, and what to do. An option with several
spellings is returned in a canonical one, the only one that the mathematics handles.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.core.jax_internals import is_traced

Axis = int | Sequence[int]
AxisName = Hashable | Sequence[Hashable]


class UnboundAxisNameError(NameError, ValueError):
    """`axis_name` names no mapped axis: a NameError as in JAX, and a ValueError like every other bad argument here."""


def feature_shape(call: str, features: Any) -> tuple[int, ...]:
    """The shape given by `features`, one integer or several."""
    shape = tuple(features) if isinstance(features, Sequence) else (features,)
    if not shape or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0 for n in shape):
        raise ValueError(
            f"{call}(features={features!r}): expected a non-negative integer or several. "
            "Pass the size of each feature axis."
        )
    return tuple(int(n) for n in shape)


def inexact_dtype(call: str, dtype: Any) -> Any:
    """The dtype, after a check that it is floating or complex."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{call}(dtype={jnp.dtype(dtype).name}): expected a floating or complex dtype. Pass jnp.float32, say."
        )
    return jnp.dtype(dtype)


def initial(call: str, name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Check that an initial value broadcasts to the features, and is real unless the dtype is complex."""
    if np.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{call}({name}=...): complex, but dtype is {dtype}. Pass dtype=jnp.complex64.")
    got = np.shape(value)
    if not broadcasts(got, shape):
        raise ValueError(
            f"{call}({name}=...): shape {got} does not broadcast to features {shape}. Pass a number or one per feature."
        )


def inexact(call: str, name: str, x: Any) -> None:
    """Check that an argument is an array of floating or complex numbers."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(
            f"{call}({name}=...): expected a floating or complex array, got {type(x).__name__}. "
            f"Convert it with jnp.asarray({name}, jnp.float32)."
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{call}({name}=...): expected a floating or complex dtype, got {x.dtype}. "
            f"Convert it with {name}.astype(jnp.float32)."
        )


def feature_axes(call: str, x: Array, axis: Axis, name: str = "x") -> tuple[int, ...]:
    """The feature axes of an argument, by default `x`, as increasing non-negative integers."""
    static = static_axis(call, axis)
    axes = static if isinstance(static, tuple) else (static,)
    if any(not -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(
            f"{call}(axis={axis!r}): {name} has shape {x.shape}, so each axis must be in [{-x.ndim}, {x.ndim}). "
            f"Pass the axis of {name} that holds the features."
        )
    canonical = tuple(sorted(int(a) % x.ndim for a in axes))
    if len(set(canonical)) != len(canonical):
        raise ValueError(
            f"{call}(axis={axis!r}): an axis of {name}, which has shape {x.shape}, is repeated. Name each feature "
            "axis once."
        )
    return canonical


def static_axis(call: str, axis: Any) -> int | tuple[int, ...]:
    """The axis argument, an integer or several, in a hashable form."""
    axis = axis.tolist() if isinstance(axis, np.ndarray) else axis
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    if not axes or any(isinstance(a, bool) or not isinstance(a, int | np.integer) for a in axes):
        raise TypeError(
            f"{call}(axis={axis!r}): expected an integer or several. Pass the axis or axes of the features."
        )
    return axes if isinstance(axis, Iterable) else axis


def axis_names(call: str, axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """The names as a tuple, which is empty for None."""
    if isinstance(axis_name, set | frozenset):
        raise TypeError(
            f"{call}(axis_name={axis_name}): the order of a set differs between the hosts of a program. "
            "Pass the names as a tuple."
        )
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)


def index_groups(call: str, groups: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...] | None:
    """The index groups in a hashable form."""
    try:
        return None if groups is None else tuple(tuple(int(i) for i in group) for group in groups)
    except TypeError as error:
        raise TypeError(
            f"{call}(axis_index_groups={groups}): expected a list of lists of indices, as in jax.lax.psum."
        ) from error


def bound_axes(call: str, names: tuple[Hashable, ...], groups: Sequence[Sequence[int]] | None) -> None:
    """Check that every name is a mapped axis here, and that the groups hold each index once."""
    if len(set(names)) != len(names):
        raise ValueError(f"{call}(axis_name={names}): an axis is repeated and would count twice. Name each axis once.")
    size = 1
    for name in names:
        try:
            size *= lax.axis_size(name)
        except NameError as error:
            raise UnboundAxisNameError(
                f"{call}(axis_name={name!r}): no mapped axis of that name is in scope. Call it inside jax.vmap, "
                f"jax.pmap or jax.shard_map over an axis named {name!r}; under jit over sharded arrays leave axis_name "
                "out, since statistics are global there already."
            ) from error
    if groups is None:
        return
    if not names:
        raise ValueError(
            f"{call}(axis_index_groups={groups}): groups divide a mapped axis, but axis_name is None. "
            "Pass the axis_name they belong to."
        )
    if sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"{call}(axis_index_groups={groups}): expected each index of {names} once, 0 to {size - 1}. "
            "List every index in exactly one group."
        )


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to the target, whose sizes may be symbolic dimensions of `jax.export`."""
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1], strict=False))


def _broadcasts(value: Any, x: Array) -> bool:
    """Whether `value` has x's rank, with each size 1 or x's."""
    return np.ndim(value) == x.ndim and broadcasts(np.shape(value), x.shape)


def weights(call: str, mask: Any, x: Array) -> None:
    """Check that a mask is None, or boolean or real, and that it has x's rank and broadcasts to `x`."""
    if mask is None:
        return
    if not hasattr(mask, "dtype"):
        raise TypeError(
            f"{call}(mask=...): expected an array, got {type(mask).__name__}. Convert it with jnp.asarray(mask)."
        )
    if not _broadcasts(mask, x):
        raise ValueError(
            f"{call}(mask=...): expected x's rank with each size 1 or x's, x has shape {x.shape}, got "
            f"{np.shape(mask)}. Reshape mask so that its axes line up with those of x."
        )
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer) or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise TypeError(
            f"{call}(mask=...): expected booleans or non-negative real weights, got {mask.dtype}. "
            "Pass mask != 0 or its real part."
        )


def known_weights(call: str, mask: Any) -> None:
    """Check that real-valued weights are numbers of 0 or more, where they are known before the call is compiled."""
    if not hasattr(mask, "dtype") or jnp.issubdtype(mask.dtype, jnp.bool_) or jnp.iscomplexobj(mask):
        return
    numbers = known(mask) if isinstance(mask, Array) else np.asarray(mask)
    if numbers is not None and not np.all(numbers >= 0):
        raise ValueError(
            f"{call}(mask=...): expected booleans or weights of 0 or more, got {numbers[~(numbers >= 0)][0]}. Pass how "
            "much each element counts; 0 leaves it out."
        )


def boolean(call: str, name: str, value: Any) -> None:
    """Check that an argument is a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{call}({name}=...): expected a Python bool, got {value!r} of {type(value)}. It selects the "
            f"computation while tracing: write True or False, or make {name} a static argument of the jitted function."
        )


def positive_integer(call: str, name: str, value: Any) -> None:
    """Check that an argument is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{call}({name}={value!r}): expected a positive integer. Pass 1 or more.")


def positive(call: str, name: str, value: Any) -> float:
    """The argument as a float, after a check that it is positive and finite in float32."""
    try:
        number = float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            f"{call}({name}=...): expected a Python number, got {type(value).__name__}. "
            f"{name} is static: pass it as a number, not as an array of a jitted function."
        ) from error
    if not 0 < np.float32(number) < math.inf:
        raise ValueError(f"{call}({name}={value!r}): expected a number that is positive in float32. Pass 1e-5, say.")
    return number


def known(values: Array) -> np.ndarray | None:
    """The numbers in an array; None if it is traced, or if another host holds a part of it."""
    unknown = is_traced(values) or not values.is_fully_addressable
    return None if unknown else np.asarray(jax.device_get(values))


def momentum(call: str, value: Any) -> Any:
    """The momentum, a float or an array, after a check of the numbers that are known."""
    if isinstance(value, np.ndarray) and value.ndim:
        value = jnp.asarray(value)
    if isinstance(value, Array):
        if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
            raise TypeError(f"{call}(momentum=...): expected real numbers, got {value.dtype}.")
        numbers = known(value)
        if numbers is not None and not np.all((numbers >= 0) & (numbers <= 1)):
            raise ValueError(
                f"{call}(momentum=...): expected numbers in [0, 1], the weight of the old value, got {numbers}. "
                "For PyTorch's momentum p pass 1 - p."
            )
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray) or np.ndim(value):
        raise TypeError(
            f"{call}(momentum={value!r}): expected a number or a function of state.count, got {type(value).__name__}. "
            "For a plain average of all batches, PyTorch's momentum=None, pass bnjax.cumulative_average."
        )
    if not 0 <= value <= 1:
        raise ValueError(
            f"{call}(momentum={value!r}): expected a number in [0, 1], the weight of the old value. "
            "For PyTorch's momentum p pass 1 - p."
        )
    return float(value)


def rate(call: str, rate: tuple[Any, Any], like: Array) -> None:
    """Check that the momentum is a number, or has a shape that broadcasts to the state's."""
    if not broadcasts(np.shape(rate[0]), like.shape):
        raise ValueError(
            f"{call}(momentum=...): shape {np.shape(rate[0])} does not broadcast to features {like.shape}. "
            "Pass a number, or one per feature."
        )


def variables(call: str, params: Any, state: Any, x: Array, features: tuple[int, ...]) -> None:
    """Check that scale, bias and running statistics fit `x` and its features, and are complex only if `x` is."""
    for name, value, fields in ("params", params, ("scale", "bias")), ("state", state, ("mean", "var", "count")):
        if not (value is None and name == "state") and not all(hasattr(value, field) for field in fields):
            raise TypeError(
                f"{call}({name}=...): expected bnjax.BN{name.title()}{fields}, got {type(value).__name__}. "
                "Pass what bn_init returned."
            )
    arrays = {f"params.{k}": v for k, v in zip(("scale", "bias"), params, strict=True) if v is not None}
    if state is not None:
        arrays |= {f"state.{k}": v for k, v in zip(("mean", "var"), state, strict=False)}
    for name, value in arrays.items():
        inexact(call, name, value)
    shape = tuple(x.shape[a] for a in features)
    axis = features[0] if len(features) == 1 else features
    named = {"scale": params.scale, "bias": params.bias}
    for name, value in named.items():
        if value is not None and np.shape(value) != shape and not _broadcasts(value, x):
            raise ValueError(
                f"{call}(params=...): params.{name} has shape {np.shape(value)}, but x has shape {x.shape} and so "
                f"features {shape} on axis {axis}. Pass the axis that bn_init was given, initialize with "
                f"bn_init({_text(shape)}), or give {name} x's rank with each size 1 or x's."
            )
    if state is not None:
        for name, value in state._asdict().items():
            one_count = name == "count" and not np.ndim(value)  # for all features, as PyTorch counts
            if np.shape(value) != shape and not one_count:
                raise ValueError(
                    f"{call}(x=...): x has shape {x.shape} and so features {shape} on axis {axis}, but state.{name} "
                    f"has shape {np.shape(value)}. Pass the axis that bn_init was given, or initialize with "
                    f"bn_init({_text(shape)})."
                )
        if not jnp.issubdtype(getattr(state.count, "dtype", type(state.count)), jnp.integer):
            got = getattr(state.count, "dtype", type(state.count).__name__)
            raise TypeError(
                f"{call}(state=...): state.count has the dtype {got}, but it counts updates. Pass an integer array, "
                "count.astype(jnp.int32), or zeros if nothing was counted."
            )
        named["mean"] = state.mean
        if jnp.iscomplexobj(x) and not jnp.iscomplexobj(state.mean):
            raise TypeError(
                f"{call}(x=...): x is {x.dtype}, but state.mean is {state.mean.dtype} and cannot hold a complex mean. "
                "Initialize with bn_init(..., dtype=jnp.complex64)."
            )
    if not jnp.iscomplexobj(x):
        for name, value in named.items():
            if value is not None and jnp.iscomplexobj(value):
                raise TypeError(
                    f"{call}(x=...): x is {x.dtype}, but {name} is {value.dtype}, and y has x's dtype. "
                    f"Pass a complex x, or a real {name}."
                )


def _text(shape: tuple[int, ...]) -> str:
    return str(shape[0] if len(shape) == 1 else shape)
