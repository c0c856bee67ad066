"""The recorder of the calls of a model's layers, in Linen and in NNX. This module needs Flax.

While a model runs, each call of a layer is passed to `record(call)`. Its result goes to the layer's caller: that of
`call()`, or of `call.marked()`, which marks the layer's input and output in the program of a trace.
"""

import weakref
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bnjax.traced.program import mark


class Call(NamedTuple):
    """A call of a layer."""

    path: str
    layer: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Any = None  # of Linen's interceptor
    method: str = "__call__"

    @property
    def x(self) -> Any:
        """The first argument, or None."""
        return next(iter((*self.args, *self.kwargs.values())), None)

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def marked(self, kernel: Any = None) -> Any:
        """The result of the call, whose first argument, result and `kernel` are marked."""
        if kernel is not None:
            mark("kernel", self.path, kernel)
        x = mark("in", self.path, jnp.asarray(self.x))
        args, kwargs = (x, *self.args[1:]), self.kwargs
        if not self.args:
            args, kwargs = (), {**kwargs, next(iter(kwargs)): x}
        return mark("out", self.path, self.function(*args, **kwargs))


# A user context is part of jit's cache key. Without it a block under `flax.linen.jit` that was traced before would not
# be traced again, and its layers would not be seen.
_recorded = jax.make_user_context(None)


@contextmanager
def recorded_linen(record: Callable[[Call], Any]) -> Generator[None, None, None]:
    """A context in which each call of a method of a Linen module is recorded, except `setup`."""
    running: list[tuple[nn.Module, str]] = []

    def interceptor(function, args, kwargs, context):
        module, method = context.module, context.method_name
        # A subclass that calls `super().__call__` is one layer.
        if method == "setup" or any(module is other and method == its for other, its in running):
            return function(*args, **kwargs)
        running.append((module, method))
        try:
            return record(Call("/".join(module.path), module, function, args, kwargs, context, method))
        finally:
            running.pop()

    with nn.intercept_methods(interceptor), _recorded(object()):
        yield


def record_nnx(model: Any, paths: Collection[str], record: Callable[[Call], Any]) -> None:
    """Record the calls of an NNX model's modules in `paths` while `record` lives. The model is a copy to discard."""
    for names, module in [*nnx.iter_modules(model)]:
        path, layer = "/".join(map(str, names)), cast(Any, module)
        if path in paths:
            layer.__class__ = _recorded_class(type(layer))
            # A weak reference, because the caches of `jax.jit` keep it. References to two functions differ, so that
            # functions under `nnx.jit` are traced again.
            layer.bnjax_record, layer.bnjax_path = weakref.ref(record), path


@cache  # NNX itself keeps every class of a module
def _recorded_class(cls):
    """A subclass whose calls are recorded. NNX transforms call copies of a module, which keep its class and its static
    attributes."""

    @wraps(cls.__call__)
    def call(self, *args, **kwargs):
        return self.bnjax_record()(Call(self.bnjax_path, self, partial(cls.__call__, self), args, kwargs))

    return type(cls)(cls.__name__, (cls,), {"__call__": call})
