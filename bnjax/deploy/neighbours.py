"""Adjacent layers of a model, according to the program of its evaluation.

Two layers are adjacent if the outputs of the first are the inputs of the second and have no other use. Between them
there may be reshapes that keep the features on the last axis, and changes of floating dtype. Folding adjacent layers
changes no other value of the model.
"""

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.traced.program import Operation, Value, read

_START = "the start"  # the maker of the model's arguments and of constants


class Neighbours:
    """Which outputs of layers are inputs of other layers, according to the marks in a program."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        """Trace `function(*args)`."""
        # Whether an argument may put the model in training.
        self.switched: bool = any(isinstance(leaf, bool) for leaf in jax.tree.leaves(args))
        # By the path of a layer: the values of its inputs, outputs and kernels, one per call.
        self._inputs: dict[str, list[Value]] = {}
        self._outputs: dict[str, list[Value]] = {}
        self._kernels: dict[str, list[Value]] = {}
        for mark in read(function, *args).marks():
            found = {"in": self._inputs, "out": self._outputs, "kernel": self._kernels}[mark.role]
            found.setdefault(mark.path, []).append(mark.results[0] if mark.role == "out" else mark.operands[0])

    def calls(self, path: str) -> bool:
        """Whether the model calls a layer."""
        return path in self._inputs

    def kernel_conflict(self, path: str) -> str | None:
        """Why a layer's kernel must not change, or None. A call uses the kernel twice: in its mark and the product."""
        for kernel in (kernels := self._kernels[path]):
            if _maker(kernel) != _START:
                return f"the kernel of {path!r} is computed, as by weight normalization, which would undo the folding"
            if len(kernel.users) > 2 * kernels.count(kernel):
                return f"the kernel of {path!r} is used elsewhere too"
        return None

    def previous(self, path: str) -> str:
        """The maker of a layer's input: a layer's path in quotes, or an operation."""
        return " and ".join(dict.fromkeys(map(_maker, self._inputs.get(path, []))))

    def next(self, path: str) -> list[str]:
        """The layers whose inputs are all outputs of this layer."""
        made = set(self._outputs.get(path, []))
        return [other for other, values in self._inputs.items() if {_origin(v)[0] for v in values} <= made]

    def users(self, path: str) -> str:
        """The users of a layer's output: layers' paths in quotes, and operations other than reshapes."""
        found, values = [], list(self._outputs.get(path, []))
        while values:
            for user in values.pop().users:
                if _keeps_features(user):
                    values += user.results
                else:
                    found.append(_name(user))
        return " and ".join(dict.fromkeys(found))

    def between(self, first: str, second: str) -> str | None:
        """Why two layers are not adjacent, or None."""
        outputs = self._outputs.get(first, [])
        origins = [_origin(v) for v in self._inputs.get(second, [])]
        if not origins or any(v not in outputs for v, _ in origins):
            return (
                f"the input of {second!r} is not the output of {first!r}. Leave out pairs with an activation, a "
                "reshape of the features or another layer between them"
            )
        if Counter(v for v, _ in origins) != Counter(outputs) or any(shared for _, shared in origins):
            return f"the output of {first!r} is used by {self.users(first)}, not only by {second!r}"
        return None


def _origin(value: Value) -> tuple[Value, bool]:
    """The value before all reshapes, and whether it or a reshape of it has another use."""
    shared = len(value.users) > 1
    while value.maker is not None and _keeps_features(value.maker):
        value = value.maker.operands[0]
        shared |= len(value.users) > 1
    return value, shared


def _maker(value: Value) -> str:
    """What makes a value before all reshapes: a layer's path in quotes, or an operation."""
    value, _ = _origin(value)
    if value.maker is None:
        return _START if value.outer is None else _maker(value.outer)
    return _name(value.maker)


def _name(operation: Operation) -> str:
    return repr(operation.path) if operation.role else operation.kind


def _keeps_features(operation: Operation) -> bool:
    """Whether an operation changes only the axes before the last, or the floating dtype."""
    kind = operation.kind
    if kind in ("name", "copy", "copy_p", "sharding_constraint"):
        return not operation.role
    if kind not in ("reshape", "squeeze", "broadcast_in_dim", "convert_element_type"):
        return False
    x, y = operation.operands[0], operation.results[0]
    if kind == "convert_element_type":
        return jnp.issubdtype(x.dtype, jnp.inexact) and jnp.issubdtype(y.dtype, jnp.inexact)
    last = kind != "broadcast_in_dim" or operation.params["broadcast_dimensions"][-1:] == (len(y.shape) - 1,)
    return last and x.shape[-1:] == y.shape[-1:] != () and prod(x.shape) == prod(y.shape)
