"""Linen models whose methods run in contexts: converted and folded ones.

A wrapped model is an object of a subclass of its class, made for the contexts. Flax clones a module for each call, and
a clone keeps its class. The contexts distinguish the classes, and so the models, for `==` and for the caches of
`jax.jit`.
"""

import functools
import inspect
from contextlib import ExitStack
from typing import Any

import flax.linen as nn
import jax

from bnjax.flax_shared import flax_internals


def contexts(module: nn.Module) -> tuple[Any, ...]:
    """The contexts in which a module's methods run, the outermost first."""
    return module._contexts if isinstance(module, _Wrapped) else ()  # pyright: ignore[reportPrivateUsage]


def class_of(module: nn.Module) -> type:
    """The class of a module as its author wrote it."""
    return module._written if isinstance(module, _Wrapped) else type(module)  # pyright: ignore[reportPrivateUsage]


def wrapped(module: nn.Module, *entered: Any) -> Any:
    """Change the module's class to one whose methods run in contexts, and return the module.

    A context has `active()`. If it depends on the place in the model, it has instead `active_in(module, method)`,
    `below(name)` for a submodule, and `within(parent)`, whether it comes from a context of the parent.
    """
    object.__setattr__(module, "__class__", _class(class_of(module), entered))
    return module


def _class(cls: type, entered: tuple[Any, ...]) -> type:
    """A subclass of a Linen module. It keeps the class's name, from which Flax makes the names of layers.

    Equal contexts give the same class as long as a module of it lives. Python's own list of subclasses finds it and,
    unlike a cache, does not keep it.
    """
    for made in cls.__subclasses__():
        if vars(made).get("_written") is cls and vars(made)["_contexts"] == entered:
            return made
    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    methods = {name: _run_under(entered, f) for name, f in methods.items() if flax_internals.is_method(f)}
    return type(cls)(cls.__name__, (_Wrapped, cls), body | methods | {"_contexts": entered, "_written": cls})


def _run_under(entered: tuple[Any, ...], method: Any) -> Any:
    """A method of a module, run in the contexts. `wraps` copies Flax's mark, without which Flax would wrap it again."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        if not (args and isinstance(args[0], nn.Module)):
            return method(*args, **kwargs)  # Flax marks static methods too
        with ExitStack() as stack:
            for context in entered:
                placed = hasattr(context, "active_in")
                stack.enter_context(context.active_in(args[0], method.__name__) if placed else context.active())
            return method(*args, **kwargs)

    return run


class _Wrapped(flax_internals.Registering):
    """The first base class of a converted or folded Linen module's class."""

    _contexts: tuple[Any, ...]
    _written: type
    _found: Any = None  # what the conversion of this model finds, if `convert` returned it

    def __init_subclass__(cls, **options: Any):
        # A wrapped class has the fields, constructor, equality and hash of the author's class. Flax would generate new
        # ones, and an author's `__init_subclass__` may register the class.
        if "_contexts" not in vars(cls):
            super().__init_subclass__(**options)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and super().__eq__(other)  # an author's `__eq__` may ignore the class

    def __hash__(self) -> int:
        return super().__hash__()

    def clone(self, **options: Any) -> Any:
        """Flax's clone, which reports what its conversion finds together with the original."""
        module: Any = super().clone(**options)  # pyright: ignore[reportAttributeAccessIssue]
        object.__setattr__(module, "_found", self._found)
        return module

    def registered(self, name: str) -> None:
        # Submodules of a bound model can be called directly, `model.bind(variables).encoder(x)`, and would then run
        # outside the contexts.
        for module in jax.tree.leaves(self.__dict__[name], is_leaf=lambda leaf: isinstance(leaf, nn.Module)):
            if not isinstance(module, nn.Module) or module.parent is not self:
                continue
            of_own = [
                c for c in contexts(module) if not (c.within(self) if hasattr(c, "within") else c in self._contexts)
            ]
            if not of_own:
                wrapped(module, *(c.below(module.name) if hasattr(c, "below") else c for c in self._contexts))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds a class by its name, which is that of the author's class.
        made, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        cls = self._written
        made, *arguments = (cls if value is type(self) else value for value in (made, *arguments))
        return _rebuilt, (self._contexts, made, *arguments), *state


def _rebuilt(entered, made, *arguments):
    return wrapped(made(*arguments), *entered)
