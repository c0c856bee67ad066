"""The BatchNorm layers of a Linen model that somebody else wrote, computed by bnjax.

A Linen module makes its layers while it runs, so that there is nothing to replace beforehand. Flax's interceptors see
every call of a method; `convert` gives a model a class of its own, whose methods put the interceptor around themselves.

Interceptors are no part of the key by which `jax.jit` knows a function: a function that was compiled without one stays
so under it. Therefore a converted model is another object, of another class, and what is converted is a user context of
JAX, which is in that key.
"""

import functools
import inspect
from collections.abc import Iterator
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
"""The layer that computes, by the function called: so a subclass that calls super().__call__ keeps what it adds."""
_FLAX_CALL = inspect.unwrap(nn.BatchNorm.__call__)


def exact_batch_norm(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Interceptor for `flax.linen.intercept_methods` under which every `flax.linen.BatchNorm` computes through bnjax.

    Variables, arguments and results are those of `BatchNorm`. `convert` does the same to a model, and is what to use
    wherever something is compiled: `jax.jit` does not know that an interceptor is there. A function that it compiled
    outside of the context keeps Flax's formula inside of it, one that it compiled inside keeps this one outside, and so
    do blocks under `flax.linen.jit`.

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
    """The same Linen model, whose `flax.linen.BatchNorm` layers compute through bnjax, wherever they are made.

    `init`, `apply`, `bind`, `tabulate`, names, variables and checkpoints are those of the model, but for a variable
    `count` where the momentum or a limit is a function. Layers of bnjax in the model are changed as well; a subclass of
    `flax.linen.BatchNorm` is converted where it calls `super().__call__`.

    The converted model may be compiled beside the original, whichever comes first: it is another object, of another
    class, and blocks of it under `flax.linen.jit` are compiled anew. Two conversions by equal arguments are equal, but
    for functions written twice, such as a lambda.

    Args:
      model: a Linen module that is not bound. Inside another module's method it may be a submodule just made.
      to: the layer to convert to, `BatchNorm`, `GhostBatchNorm` or `RenormBatchNorm`; by default each layer's own kind.
      where: which layers to convert: a function of the layer's path in the variables, such as "block/BatchNorm_0".
        By default all of them.
      **changes: `axis_name` (None takes away what the model's author wrote), `axis_index_groups`, `momentum`,
        `epsilon`, `unbiased_var`, `frozen`, `frozen_params`, as `BatchNorm` has them, and those of the variant:
        `ghost_size`; `r_max`, `d_max`. What is not named stays as the model has it.

    Returns:
      A module of a subclass of model's class, with its name.

    Raises:
      TypeError, ValueError: for something other than a Linen module, a bound one, a change that the layers do not have,
        or a value that they do not take.

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
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert(model={type(model).__name__}): expected a Linen module. For an NNX model use bnjax.nnx.convert."
            if not isinstance(model, type)
            else f"convert(model={model.__name__}): expected a module, got a class. Pass {model.__name__}(...)."
        )
    layers = {name: getattr(norm_module, name) for name in VARIANTS}
    changed = _Converting(conversion("linen", to, where, changes, layers))
    if not isinstance(model.parent, nn.Module):
        if model.scope is not None:
            raise ValueError(
                f"convert(model={type(model).__name__}): the module is bound to variables. Convert it, then call bind."
            )
        model = model.clone()  # one with a parent was made just now, in a method of that
    return wrapped(model, *(c for c in contexts(model) if not isinstance(c, _Converting)), changed)


def contexts(module: nn.Module) -> tuple[Any, ...]:
    """Those in which a module's methods run, the outermost first."""
    return module._contexts if isinstance(module, _Wrapped) else ()


def class_of(module: nn.Module) -> type:
    """The class of a module as its author wrote it."""
    return type(module).__mro__[2] if isinstance(module, _Wrapped) else type(module)


def wrapped(module: nn.Module, *entered: Any) -> Any:
    """The module itself, of a class whose methods run in the contexts `c.active()`, and in no others."""
    object.__setattr__(module, "__class__", _class(class_of(module), entered))
    return module


@functools.cache
def _class(cls: type, entered: tuple[Any, ...]) -> type:
    """A subclass of a Linen module. Flax names layers by the name of their class, which is kept."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    methods = {name: _run_under(entered, f) for name, f in methods.items() if hasattr(f, "method_handler_wrapped")}
    return type(cls)(cls.__name__, (_Wrapped, cls), body | methods | {"_contexts": entered})


def _run_under(entered: tuple[Any, ...], method: Any) -> Any:
    """A method of a module, run in the contexts. The wrapper keeps Flax's mark, so that it is wrapped once."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        with ExitStack() as stack:
            for context in entered:
                stack.enter_context(context.active())
            return method(*args, **kwargs)

    return run


class _Wrapped:
    """A base class before that of a Linen module."""

    _contexts: tuple[Any, ...] = ()

    def _register_submodules(self, name, val):
        # A bound model's submodules can be called without it: `model.bind(variables).encoder(x)`. Every submodule in an
        # attribute comes through this private method.
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
    """The context in which layers are converted so; the innermost counts."""

    conversion: Conversion

    @contextmanager
    def active(self) -> Iterator[None]:
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
    """The layer that computes the call, None if it is not one to convert."""
    changed, kind = _active.value, _KINDS.get(getattr(context.orig_method, "func", None))
    if changed is None or kind is None or not changed.converts("/".join(context.module.path)):
        return None
    return changed.to if changed.to is not None and kind.__name__ in VARIANTS else kind


def converted(context: nn.module.InterceptorContext) -> Any:
    """The module that is called, with the options that a conversion gives it."""
    kind = _kind(context)
    return context.module if kind is None else _Changed(context.module, kind, dict(_active.value.changes))


class _Changed:
    """A layer with other options: those of the changes, else its own, else the defaults of the kind that computes."""

    def __init__(self, module, kind, changes):
        self._sources = module, kind
        self.__dict__.update(changes)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  errors name the layer by it
        return self._sources[1]

    def __getattr__(self, name):
        module, kind = self._sources
        return getattr(module if hasattr(module, name) else kind, name)
