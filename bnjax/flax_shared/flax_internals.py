"""The Flax APIs without a stability guarantee that bnjax uses.

Linen: the submodules in a module's field, what Flax does when a bound module gets one, the mark of the methods that
Flax has wrapped, and a module's identity, which its clones share. NNX: the names of collections for types of variables,
the Linen module around an NNX layer, and whether a class of modules is a pytree.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.nnx import variablelib
from flax.nnx.bridge import wrappers


def map_modules(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A field's value with `function(suffix, leaf)` in place of each leaf; Flax names it by the field and the
    suffix."""
    return nn.module._map_over_modules_in_tree(function, tree)  # pyright: ignore[reportPrivateUsage]


def is_method(function: Any) -> bool:
    """Whether Flax has wrapped a function of a Linen module, as it wraps methods and static methods."""
    return hasattr(function, "method_handler_wrapped")


def identity(module: nn.Module) -> Any:
    """What a module and its clones share."""
    return module._id


class Registering:
    """A base class of Linen modules that is notified when an attribute of a bound module gets submodules."""

    def registered(self, name: str) -> None:
        """Called when the attribute `name` holds submodules."""

    def _register_submodules(self, name, val):
        super()._register_submodules(name, val)  # pyright: ignore[reportAttributeAccessIssue]
        self.registered(name)


def collection_of(kind: type) -> str:
    """The name of the collection of a type of NNX variables."""
    return variablelib.variable_name_from_type(kind, allow_register=True)


def linen_module_around() -> Any:
    """The Linen module whose call runs an NNX layer here, if any."""
    return wrappers.current_linen_module()


def is_pytree(kind: Any) -> bool:
    """Whether a class of NNX modules is a pytree."""
    return kind._pytree__is_pytree
