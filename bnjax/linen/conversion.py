"""Conversion of an existing Linen model: its BatchNorm layers compute through bnjax.

A Linen module creates its layers while it runs, so there are no layers to replace beforehand. Flax's interceptors see
every call of a method. `convert` gives a model a subclass of its class, whose methods run under such an interceptor.

Interceptors are not part of the cache key of `jax.jit`: a function that was compiled without an interceptor would stay
so under one. Therefore a converted model is another object of another class, and the active conversion is a user
context of JAX, which is part of that key.
"""

import functools
import inspect
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from bnjax.flax_shared.conversion import VARIANTS, Conversion, Where, conversion
from bnjax.linen import norm as norm_module
from bnjax.linen.norm import BatchNorm

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
_FLAX_CALL = inspect.unwrap(nn.BatchNorm.__call__)


def exact_batch_norm(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Interceptor for `flax.linen.intercept_methods` under which every `flax.linen.BatchNorm` computes through bnjax.

    Variables, arguments and results are the same as without it. For compiled code use `convert`, because the cache key
    of `jax.jit` does not contain interceptors: a function compiled outside of the context keeps Flax's formula inside
    it, a function compiled inside keeps bnjax's formula outside, and so do blocks under `flax.linen.jit`.

    Args:
      next_function, args, kwargs, context: as Flax passes them to an interceptor.

    Returns:
      The result of the intercepted call.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> model = nn.BatchNorm(use_running_average=False)
      >>> x = 1e4 + jax.random.normal(jax.random.key(0), (256, 1))
      >>> with nn.intercept_methods(bnjax.linen.exact_batch_norm):
      ...     y, _ = model.init_with_output(jax.random.key(0), x)
      >>> y.std().round(2).tolist()
      1.0
    """
    if getattr(context.orig_method, "func", None) is _FLAX_CALL:
        return norm_module.batch_norm(context.module, *args, **kwargs)
    return next_function(*args, **kwargs)


def convert(model: nn.Module, *, to: type | None = None, where: Where | None = None, **changes: Any) -> Any:
    """The same Linen model, with every `flax.linen.BatchNorm` in it computed by bnjax.

    `init`, `apply`, `bind`, `tabulate`, names, variables and checkpoints stay the same, except for a variable `count`
    if the momentum or a limit is a function. Options of bnjax's own layers in the model are changed as well. A subclass
    of `flax.linen.BatchNorm` is converted where it calls `super().__call__`.

    The original and the converted model may be compiled in either order: the converted one is another object of another
    class, and its blocks under `flax.linen.jit` are compiled separately. Two conversions with equal arguments are
    equal; functions are equal only if they are the same object, so two equal lambdas give two conversions.

    Args:
      model: an unbound Linen module, or, inside another module's method, a submodule that was just created.
      to: the class to convert to, `BatchNorm`, `AdaptiveBatchNorm`, `GhostBatchNorm` or `RenormBatchNorm`; by default
        each layer keeps its kind.
      where: function from a layer's path in the variables, such as "block/BatchNorm_0", to whether it is converted; by
        default every layer is.
      **changes: options of `BatchNorm`: `axis_name` (None removes the model's own), `axis_index_groups`, `momentum`,
        `epsilon`, `unbiased_var`, `frozen`, `frozen_params`; of `AdaptiveBatchNorm`:
        `source_weight`; of `GhostBatchNorm`: `ghost_size`; of `RenormBatchNorm`: `r_max`, `d_max`, `average`. Other
        options stay as in the model.

    Returns:
      A module of a subclass of the model's class, with the same class name.

    Raises:
      TypeError, ValueError: for an object that is not a Linen module, a bound module, an option that the layers do not
        have, or a value that the option does not accept.

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
        model = model.clone()  # A module with a parent is not cloned: its parent's method, now running, created it.
    return wrapped(model, *(c for c in contexts(model) if not isinstance(c, _Converting)), changed)


def check_model(call: str, model: Any) -> None:
    """Check that a model is a Linen module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{call}(model={type(model).__name__}): expected a Linen module. For an NNX model use bnjax.nnx.{call}."
            if not isinstance(model, type)
            else f"{call}(model={model.__name__}): expected a module, got a class. Pass {model.__name__}(...)."
        )


def contexts(module: nn.Module) -> tuple[Any, ...]:
    """The contexts in which a module's methods run, the outermost first."""
    return module._contexts if isinstance(module, _Wrapped) else ()  # pyright: ignore[reportPrivateUsage]


def class_of(module: nn.Module) -> type:
    """The class of a module as its author wrote it."""
    return type(module).__mro__[2] if isinstance(module, _Wrapped) else type(module)


def wrapped(module: nn.Module, *entered: Any) -> Any:
    """Change the module's class to one whose methods run in the contexts `c.active()`, and return the module."""
    object.__setattr__(module, "__class__", _class(class_of(module), entered))
    return module


@functools.cache
def _class(cls: type, entered: tuple[Any, ...]) -> type:
    """A subclass of a Linen module. It keeps the class's name, from which Flax makes the names of layers."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    methods = {name: _run_under(entered, f) for name, f in methods.items() if hasattr(f, "method_handler_wrapped")}
    return type(cls)(cls.__name__, (_Wrapped, cls), body | methods | {"_contexts": entered})


def _run_under(entered: tuple[Any, ...], method: Any) -> Any:
    """A method of a module, run in the contexts. `wraps` copies Flax's mark, without which Flax would wrap it again."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        with ExitStack() as stack:
            for context in entered:
                stack.enter_context(context.active())
            return method(*args, **kwargs)

    return run


class _Wrapped:
    """The first base class of a converted or folded Linen module."""

    _contexts: tuple[Any, ...] = ()

    def _register_submodules(self, name, val):
        # Submodules of a bound model can be called directly, `model.bind(variables).encoder(x)`, and would then run
        # outside of the contexts. Flax passes every submodule in an attribute to this private method.
        super()._register_submodules(name, val)  # pyright: ignore[reportAttributeAccessIssue]
        for module in jax.tree.leaves(self.__dict__[name], is_leaf=lambda leaf: isinstance(leaf, nn.Module)):
            if isinstance(module, nn.Module) and module.parent is self and not isinstance(module, _Wrapped):
                wrapped(module, *self._contexts)

    def __reduce__(self):
        module: Any = self
        fields = {name: getattr(self, name) for name in module.__dataclass_fields__ if name != "parent"}
        return _rebuilt, (class_of(module), self._contexts, fields)


def _rebuilt(cls, entered, fields):
    return wrapped(cls(**fields), *entered)


class _Converting(NamedTuple):
    """The context in which layers are converted; the innermost one decides."""

    conversion: Conversion

    @contextmanager
    def active(self) -> Generator[None, None, None]:
        with ExitStack() as stack:
            if _active.value is None:
                stack.enter_context(nn.intercept_methods(_intercept))
            if _active.value != self.conversion:
                stack.enter_context(_active(self.conversion))
            yield


_active = jax.make_user_context(None)


def _intercept(next_function, args, kwargs, context):
    kind = _kind(context)
    if kind is None:
        return next_function(*args, **kwargs)
    return inspect.unwrap(kind.__call__)(converted(context), *args, **kwargs)


def _kind(context):
    """The layer that computes the call, or None if the call is not converted."""
    changed, kind = _active.value, _KINDS.get(getattr(context.orig_method, "func", None))
    if changed is None or kind is None or not changed.converts("/".join(context.module.path)):
        return None
    return changed.to if changed.to is not None and kind.__name__ in VARIANTS else kind


def converted(context: nn.module.InterceptorContext) -> Any:
    """The module that is called, with the options that a conversion changes."""
    kind = _kind(context)
    return context.module if kind is None else _Changed(context.module, kind, dict(_active.value.changes))


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
