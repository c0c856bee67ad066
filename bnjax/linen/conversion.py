"""Conversion of an existing Linen model: its BatchNorm layers compute through bnjax.

A Linen module creates its layers while it runs, so there are no layers to replace beforehand. Flax's interceptors see
every call of a method. `convert` gives a model a subclass of its class, whose methods run under such an interceptor.

Interceptors are not part of the cache key of `jax.jit`: a function that was compiled without an interceptor would not
run under one. Therefore a converted model is another object of another class, and the active conversion is a user
context of JAX, which is part of that key.
"""

import dataclasses
import inspect
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from bnjax.core.trees import owns_statistics
from bnjax.flax_shared import flax_internals
from bnjax.flax_shared.conversion import VARIANTS, Conversion, Where, conversion, instead, other_library
from bnjax.flax_shared.found import Found
from bnjax.linen import norm as norm_module
from bnjax.linen.norm import BatchNorm
from bnjax.linen.wrapping import class_of, contexts, wrapped

_KINDS = {
    inspect.unwrap(nn.BatchNorm.__call__): BatchNorm,
    **{
        inspect.unwrap(layer.__call__): layer
        for layer in vars(norm_module).values()
        if isinstance(layer, type) and issubclass(layer, BatchNorm)
    },
}
"""The layer that computes a call, by the function called. A key by class would skip the code that a subclass adds
around `super().__call__`."""


def convert(model: nn.Module, *, to: type | None = None, where: Where | None = None, **changes: Any) -> Any:
    """The same Linen model, with every `flax.linen.BatchNorm` in it computed by bnjax.

    `init`, `apply`, `bind`, `tabulate`, names, variables and checkpoints stay the same, except for a variable `count`
    if the momentum or a limit is a function. Options of bnjax's own layers in the model are changed as well. A subclass
    of `flax.linen.BatchNorm` is converted where it calls `super().__call__`, and so are NNX layers in
    `flax.nnx.bridge.to_linen`. Modules that are taken out of a converted model, such as `model.layers[0]`, stay
    converted. Converting a model again adds changes to the earlier ones.

    A layer that `where` leaves out is not converted: a layer of Flax stays one. To convert every layer and change the
    options of some, convert twice: `convert(convert(model), frozen=True, where=...)`.

    A module creates its layers in its call, so that only the first call of the model (`init`, `apply`, or tracing them)
    shows what is converted. That call warns if nothing was, and names what it could not convert: modules with a running
    mean and variance that are not Flax's, and subclasses that override `__call__` without `super().__call__`.

    The original and the converted model may be compiled in either order: the converted one is another object of another
    class, and its blocks under `flax.linen.jit` are compiled separately. Two conversions with equal arguments are
    equal; functions are equal only if they are the same object, so two equal lambdas give two conversions.

    Args:
      model: an unbound Linen module, or, inside another module's method, a submodule that was just created.
      to: the class to convert to, `BatchNorm`, `AdaptiveBatchNorm`, `GhostBatchNorm` or `RenormBatchNorm`; by default
        each layer keeps its kind.
      where: function from a layer's path in the variables of this model, such as "block/BatchNorm_0", to whether it is
        converted; by default every layer is.
      **changes: options of `BatchNorm`: `axis_name` (None removes the model's own), `axis_index_groups`, `momentum`,
        `epsilon`, `unbiased_var`, `frozen`, `frozen_params`; of `AdaptiveBatchNorm`:
        `source_weight`; of `GhostBatchNorm`: `ghost_size`; of `RenormBatchNorm`: `r_max`, `d_max`, `average`. Other
        options stay as in the model.

    Returns:
      A module of a subclass of the model's class, with the same class name.

    Raises:
      TypeError, ValueError: for an object that is not a Linen module, a bound module, an option that the layers do not
        have, or a value that the option does not accept.
      ValueError: in the first call of the model, if `where` matches none of its layers.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         return nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(3)(x))
      >>> model = bnjax.linen.convert(Network(), axis_name=None, momentum=0.9)
      >>> x = 1e4 + jax.random.normal(jax.random.key(0), (256, 1))
      >>> variables = model.init(jax.random.key(0), x, False)
      >>> y, updates = jax.jit(model.apply, static_argnums=2, static_argnames="mutable")(
      ...     variables, x, True, mutable=("batch_stats",))
      >>> y.std(0).round(2).tolist()
      [1.0, 1.0, 1.0]
    """
    check_model("convert", model)
    layers = {name: getattr(norm_module, name) for name in VARIANTS}
    changed = _Converting(conversion("linen", to, where, changes, layers))
    if not isinstance(model.parent, nn.Module):
        if model.scope is not None:
            raise ValueError(
                f"convert(model={type(model).__name__}): the module is bound to variables. Convert it, then call bind."
            )
        model = _part(model, changed, {})
    else:  # its parent's method, now running, created it
        model = wrapped(model, *_entered(model, changed))
    object.__setattr__(model, "_found", Found(type(model).__name__, changed.conversion, waiting={()}))
    return model


def convert_part(model: nn.Module, changed: Conversion, prefix: tuple[str, ...], found: Found) -> Any:
    """A Linen model inside an NNX model, converted; `changed` is the conversion of the NNX model."""
    to = None if changed.to is None else getattr(norm_module, changed.to.__name__)
    part = _part(model, _Converting(changed._replace(to=to), prefix, part=bool(prefix), bridged=True), {})
    object.__setattr__(part, "_found", found)
    return part


def _part(module, changed, memo):
    """A copy of an unbound module that is converted, as are the modules in its fields: they can be taken out of it."""
    key = flax_internals.identity(module)
    if key not in memo:
        copied = memo[key] = module.clone()
        for field in dataclasses.fields(copied):
            if field.init and field.name not in ("parent", "name"):
                value = _parts(getattr(copied, field.name), field.name, changed, memo)
                object.__setattr__(copied, field.name, value)
        wrapped(copied, *_entered(module, changed))
    return memo[key]


def _entered(module, changed):
    """The contexts of a module that is converted, perhaps again; changes of an earlier conversion stay."""
    entered = contexts(module)
    earlier = entered[-1] if entered else None
    if isinstance(earlier, _Converting) and earlier.merges_with(changed):
        return *entered[:-1], changed._replace(conversion=earlier.conversion.followed_by(changed.conversion))
    return *entered, changed


def _parts(value, name, changed, memo):
    """A field's value with converted modules in it, named as Flax names them when it binds the model."""
    found = []

    def convert_one(suffix, leaf):
        if not isinstance(leaf, nn.Module) or leaf.scope is not None or isinstance(leaf.parent, nn.Module):
            return leaf
        if any(isinstance(c, _Converting) and not c.part for c in contexts(leaf)):
            return leaf  # it was converted on its own, which takes precedence
        found.append(leaf)
        return _part(leaf, changed.below(f"{name}{suffix}"), memo)

    mapped = flax_internals.map_modules(convert_one, value)
    return mapped if found else value


def check_model(call: str, model: Any) -> None:
    """Check that a model is a Linen module."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise TypeError(f"{call}(model={model.__name__}): expected a module, got a class. Pass {model.__name__}(...).")
    advice = instead(model, lambda value: isinstance(value, nn.Module))
    if isinstance(model, list | tuple | dict):
        advice = "Pass one module at a time, or an nn.Sequential of them."
    advice = advice or f"For an NNX model use bnjax.nnx.{call}."
    raise TypeError(f"{call}(model={type(model).__name__}): expected a Linen module. {advice}")


class _Converting(NamedTuple):
    """The context in which layers are converted; if several change an option, the innermost one takes precedence.

    `prefix` is the path of the module in the converted model, of which it may be a `part`. A part that is `bridged` is
    called by an NNX module, as a separate model.
    """

    conversion: Conversion
    prefix: tuple[str, ...] = ()
    part: bool = False
    bridged: bool = False

    def below(self, name: str) -> "_Converting":
        """The context of a submodule. Without `where` a path has no effect, and equal contexts share a class."""
        return _Converting(self.conversion, self.prefix + (name,) * (self.conversion.where is not None), part=True)

    def merges_with(self, later: "_Converting") -> bool:
        """Whether a later conversion is of the same layers."""
        return self[1:] == later[1:] and self.conversion.where == later.conversion.where

    def within(self, parent: nn.Module) -> bool:
        """Whether it is the context of a part of the parent."""
        return self.part and self.conversion in [c.conversion for c in contexts(parent) if isinstance(c, _Converting)]

    @contextmanager
    def active_in(self, module: nn.Module, method: str) -> Generator[None, None, None]:
        """The context for a call of a method of the module."""
        if self.part and not self.bridged and any(active.conversion == self.conversion for active in _active.value):
            yield  # inside the whole model
            return
        place = _Place(() if module.scope is None else module.path, self.prefix)
        active = _Active(self.conversion, *(_Place() if self.conversion.where is None else place))
        outer: Any = _recording.get()
        found = vars(module).get("_found")
        starts = outer is None and found is not None and found.waiting and method != "setup" and bool(module.scope)
        recording = (found, place) if starts else (outer[0], place) if outer and self.bridged else None
        with ExitStack() as stack:
            if not _active.value:
                stack.enter_context(nn.intercept_methods(_intercept))
            if active not in _active.value:
                stack.enter_context(_active((*_active.value, active)))
            if recording:
                stack.callback(_recording.reset, _recording.set(recording))
            yield
        if starts:
            _finish(found, module, method, place)


class _Place(NamedTuple):
    """Where a module is: its path in the model that runs, and in the model that was converted."""

    path: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()

    def of(self, path: tuple[str, ...]) -> str:
        """The path in the converted model of a path in the model that runs."""
        inside = path[: len(self.path)] == self.path
        return "/".join((*self.prefix, *path[len(self.path) :]) if inside else path)


class _Active(NamedTuple):
    conversion: Conversion
    path: tuple[str, ...]
    prefix: tuple[str, ...]

    def of(self, path: tuple[str, ...]) -> str:
        """The path in the converted model of a path in the model that runs."""
        return _Place(self.path, self.prefix).of(path)


_active = jax.make_user_context(())
# What the running model finds, if it is to be reported, and the place to which paths are relative.
_recording: ContextVar[Any] = ContextVar("recording", default=None)


def _intercept(next_function, args, kwargs, context):
    function: Any = getattr(context.orig_method, "func", None)
    # Known by name, because importing it would load NNX.
    if getattr(function, "__qualname__", "") == "ToLinen.__call__" and function.__module__.startswith("flax.nnx"):
        bridged = _Changed(context.module, type(context.module), {"nnx_class": _nnx_class(context.module)})
        return function(bridged, *args, **kwargs)
    kind, layer = _kind(context), _KINDS.get(function)
    if kind is not None:
        y = inspect.unwrap(kind.__call__)(converted(context), *args, **kwargs)
    else:
        y = next_function(*args, **kwargs)
    if _recording.get() is not None:
        _record(context.module, layer, kind)
    return y


def _conversions(module):
    """The conversions of the module that is called; the last one takes precedence."""
    return [active.conversion for active in _active.value if active.conversion.converts(active.of(module.path))]


def _kind(context):
    """The layer that computes the call, or None if the call is not converted."""
    kind = _KINDS.get(getattr(context.orig_method, "func", None))
    changed = _conversions(context.module) if kind is not None else []
    if kind is None or not changed:
        return None
    kinds = [c.to for c in changed if c.to is not None]
    return kinds[-1] if kinds and kind.__name__ in VARIANTS else kind


def converted(context: nn.module.InterceptorContext) -> Any:
    """The module that is called, with the options that a conversion changes."""
    kind = _kind(context)
    if kind is None:
        return context.module
    changes = {name: value for c in _conversions(context.module) for name, value in c.changes}
    return _Changed(context.module, kind, changes)


def _nnx_class(module):
    """The class of an NNX module inside a Linen module, changed so that it makes converted modules."""
    recording: Any = _recording.get()
    conversions, make = _active.value, module.nnx_class

    def made(*args, **kwargs):
        made_module = make(*args, **kwargs)
        for active in conversions:
            place = active if recording is None or active.conversion.where is not None else recording[1]
            path = place.of(module.path)
            found = Found("", active.conversion) if recording is None else recording[0]
            prefix = tuple(path.split("/")) if path else ()
            other_library("nnx").convert_part(made_module, active.conversion, prefix, found)
        return made_module

    return made


def _record(module, layer, kind):
    """Note a module that was called: a layer, or one with statistics that cannot be converted."""
    found, place = _recording.get()
    path = place.of(module.path)
    if layer is not None:
        found.layers[path] = kind is not None and found.conversion.converts(path)
        found.left.pop(path, None)
        if kind is not None and found.conversion.to is not None and found.conversion.to.__name__ != kind.__name__:
            found.leave(path, f"{layer.__name__} keeps its class, since its call is not that of BatchNorm")
    elif path not in {*found.layers, *found.left} and () in _with_statistics(module.scope, class_of(module).__name__):
        found.leave(path, _reason(class_of(module)))


def _reason(cls):
    if issubclass(cls, nn.BatchNorm):
        return f"{cls.__name__} overrides __call__ without super().__call__"
    return f"{cls.__name__} holds running statistics, but is no BatchNorm layer of Flax or bnjax"


def _with_statistics(scope, owner=""):
    """The paths below a scope, of an `owner` with this class name, with a running mean and a running variance."""
    ranks: dict[Any, dict[str, int]] = {}
    for collection, tree in nn.meta.unbox(scope.variables()).items():
        for (*path, name), value in flatten_dict(tree).items():
            ranks.setdefault((tuple(path), collection), {})[name] = getattr(value, "ndim", 0)
    return {
        path for (path, collection), names in ranks.items() if owns_statistics(collection, names, "" if path else owner)
    }


def _finish(found, module, method, place):
    """Report what was found, once all is: a call of a method, or a block that was compiled before, may skip layers."""
    with_statistics = _with_statistics(module.scope)
    paths = {"/".join(map(str, (*place.prefix, *path))) for path in with_statistics}  # NNX layers have numbers
    unseen = {path: found.conversion.converts(path) for path in paths - {*found.layers, *found.left}}
    found.layers.update({path: False for path, converts in unseen.items() if not converts})
    complete = not any(unseen.values()) and (method == "__call__" or (bool(paths) and not module.is_initializing()))
    found.tell(everything=complete and found.waiting <= {place.prefix})
    if complete:
        found.waiting.discard(place.prefix)


class _Changed:
    """A layer with changed options. An option is taken from the changes, else the layer, else the class `kind`."""

    def __init__(self, module, kind, changes):
        self._sources = module, kind
        self.__dict__.update(changes)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  errors name the layer by it
        return self._sources[1]

    def __getattr__(self, name):
        module, kind = self._sources
        return getattr(module if hasattr(module, name) else kind, name)
