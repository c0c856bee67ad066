"""Adjacent layers of a model.

A model is traced in evaluation. The trace names the inputs and the outputs of its linear layers and norms, by
`jax.ad_checkpoint.checkpoint_name`, which computes the identity. Two layers are adjacent if the outputs of the first
are the inputs of the second and have no other use. Between them there may be reshapes that keep the features on the
last axis, and changes of floating dtype. Folding adjacent layers changes no other value of the model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_TAG = "bnjax_fold"
_START = "the start"  # the maker of the model's arguments and of constants
# Operations that call another program once, and return its results. Loops and branches are followed separately.
_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


def named_call(path: str, kernel: Any, call: Callable[[Any], Any], x: Any) -> Any:
    """`call(x)`, with names for the layer's input, its output, and its kernel (None for a norm)."""
    if kernel is not None:
        checkpoint_name(kernel, f"{_TAG}:of:{path}")
    return checkpoint_name(call(checkpoint_name(jnp.asarray(x), f"{_TAG}:in:{path}")), f"{_TAG}:out:{path}")


class Neighbours:
    """Which outputs of layers are inputs of other layers, according to a model's jaxpr.

    The values of the program are numbered. `_before` leads from the result of a reshape to its operand.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any):
        """Trace `function(*args, **kwargs)`. Leaves without a shape and a dtype, such as a bool, stay static."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        # Whether an argument may say that the model trains.
        self.switched: bool = any(isinstance(leaf, bool) for leaf in leaves)
        where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

        def call(*arrays):
            filled = dict(zip(where, arrays, strict=True))
            args, kwargs = jax.tree.unflatten(tree, [filled.get(i, leaf) for i, leaf in enumerate(leaves)])
            return [leaf for leaf in jax.tree.leaves(function(*args, **kwargs)) if isinstance(leaf, Array)]

        # By the number of a value: its users. A user that is a reshape comes with the number of its result.
        self._uses: list[list[tuple[str, int | None]]] = []
        self._makers: list[str] = []
        self._before: dict[int, int] = {}
        # By the path of a layer: the numbers of its inputs, outputs and kernels, one per call.
        self._inputs: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}
        self._kernels: dict[str, list[int]] = {}
        jaxpr = jax.make_jaxpr(call)(*(leaves[i] for i in where)).jaxpr
        for v in self._read(jaxpr, [self._new(_START) for _ in jaxpr.invars]):
            self._uses[v].append(("the model's result", None))

    def _new(self, maker):
        self._uses.append([])
        self._makers.append(maker)
        return len(self._makers) - 1

    def _read(self, jaxpr, given):
        """Number the values of a program whose arguments have the numbers `given`; return those of its results."""
        numbers = dict(zip(jaxpr.invars, given, strict=True))

        def numbered(variables):
            return [self._new(_START) if hasattr(v, "val") else numbers[v] for v in variables]

        numbers |= {v: self._new(_START) for v in jaxpr.constvars}
        for equation in jaxpr.eqns:
            inputs = numbered(equation.invars)
            programs = [p for p in map(_program, _flat(equation.params.values())) if p is not None]
            inlined = equation.primitive.name in _INLINED and len(programs) == 1
            if inlined and len(programs[0].invars) == len(inputs):
                results = self._read(programs[0], inputs)
            else:
                results = self._operation(equation, inputs)
                for program in programs:  # a loop or a branch, whose last arguments are the operation's last operands
                    makers = [self._makers[self._origin(v)[0]] for v in inputs][-len(program.invars) :]
                    makers = [_START] * (len(program.invars) - len(makers)) + makers
                    for v in self._read(program, [self._new(maker) for maker in makers]):
                        self._uses[v].append(("the result of a loop", None))
            numbers |= dict(zip(equation.outvars, results, strict=True))
        return numbered(jaxpr.outvars)

    def _operation(self, equation, inputs):
        kind = equation.primitive.name
        tag, _, named = str(equation.params.get("name", "")).partition(":") if kind == "name" else ("", "", "")
        role, _, path = named.partition(":")
        layer = repr(path) if tag == _TAG else None
        results = [self._new(layer or kind) for _ in equation.outvars]
        if layer is not None:
            found = {"in": self._inputs, "out": self._outputs, "of": self._kernels}[role]
            found.setdefault(path, []).append(results[0] if role == "out" else inputs[0])
        elif _keeps_features(equation):
            self._before[results[0]] = inputs[0]
        for v in inputs:
            self._uses[v].append((layer or kind, results[0] if results and results[0] in self._before else None))
        return results

    def _origin(self, value):
        """The value before all reshapes, and whether it or a reshape of it has another use."""
        shared = False
        while True:
            shared |= len(self._uses[value]) > 1
            if value not in self._before:
                return value, shared
            value = self._before[value]

    def calls(self, path: str) -> bool:
        """Whether the model calls a layer."""
        return path in self._inputs

    def kernel_conflict(self, path: str) -> str | None:
        """Why a layer's kernel must not change, or None. A call uses the kernel twice: in its name and the product."""
        for kernel in (kernels := self._kernels[path]):
            if self._makers[self._origin(kernel)[0]] != _START:
                return f"the kernel of {path!r} is computed, as by weight normalization, which would undo the folding"
            if len(self._uses[kernel]) > 2 * kernels.count(kernel):
                return f"the kernel of {path!r} is used elsewhere too"
        return None

    def previous(self, path: str) -> str:
        """The maker of a layer's input: a layer's path in quotes, or an operation."""
        return " and ".join(dict.fromkeys(self._makers[self._origin(v)[0]] for v in self._inputs.get(path, [])))

    def next(self, path: str) -> list[str]:
        """The layers whose inputs are all outputs of this layer."""
        made = set(self._outputs.get(path, []))
        return [other for other, values in self._inputs.items() if {self._origin(v)[0] for v in values} <= made]

    def users(self, path: str) -> str:
        """The users of a layer's output: layers' paths in quotes, and operations other than reshapes."""
        found, values = [], list(self._outputs.get(path, []))
        while values:
            for user, result in self._uses[values.pop()]:
                if result is None:
                    found.append(user)
                else:
                    values.append(result)
        return " and ".join(dict.fromkeys(found))

    def between(self, first: str, second: str) -> str | None:
        """Why two layers are not adjacent, or None."""
        outputs = self._outputs.get(first, [])
        origins = [self._origin(v) for v in self._inputs.get(second, [])]
        if not origins or any(v not in outputs for v, _ in origins):
            return (
                f"the input of {second!r} is not the output of {first!r}. Leave out pairs with an activation, a "
                "reshape of the features or another layer between them"
            )
        if sorted(v for v, _ in origins) != sorted(outputs) or any(shared for _, shared in origins):
            return f"the output of {first!r} is used by {self.users(first)}, not by {second!r} alone"
        return None


def _flat(values):
    for value in values:
        yield from _flat(value) if isinstance(value, list | tuple) else (value,)


def _program(value):
    """The jaxpr in a parameter of an operation, or None if the parameter is something else."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def _keeps_features(equation):
    """Whether an operation changes only the axes before the last, or the floating dtype."""
    kind = equation.primitive.name
    if kind in ("name", "copy", "copy_p", "sharding_constraint"):
        return True
    if kind not in ("reshape", "squeeze", "broadcast_in_dim", "convert_element_type"):
        return False
    x, y = equation.invars[0].aval, equation.outvars[0].aval
    if kind == "convert_element_type":
        return jnp.issubdtype(x.dtype, jnp.inexact) and jnp.issubdtype(y.dtype, jnp.inexact)
    last = kind != "broadcast_in_dim" or equation.params["broadcast_dimensions"][-1:] == (y.ndim - 1,)
    return last and x.ndim > 0 and y.ndim > 0 and x.size == y.size and x.shape[-1] == y.shape[-1]
