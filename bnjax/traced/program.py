"""The program that a function traces to: its operations, the values between them, and the marks of layers.

A program is read from the function's jaxpr. A function that it calls once, such as one under `jax.jit`, is inlined. The
body of a loop or a branch stays a separate program, which belongs to its operation.

A mark names a value by `jax.ad_checkpoint.checkpoint_name`, which computes the identity.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

# Operations that call another program once, and return its results.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


class Value:
    """A value of a program."""

    def __init__(self, aval: Any, maker: "Operation | None" = None, outer: "Value | None" = None):
        self.shape: tuple[int, ...] = getattr(aval, "shape", ())
        self.dtype: Any = getattr(aval, "dtype", None)
        self.maker: Operation | None = maker  # None for arguments and constants
        self.outer: Value | None = outer  # what an argument of a loop's body is when the loop starts
        self.users: list[Operation] = []
        self.returned_by: set[str] = set()  # the names of the inlined functions that return it


class Operation:
    """An operation of a program. For a mark, `role` and `path` are those of `mark`; otherwise they are empty."""

    def __init__(self, kind: str, params: Mapping[str, Any], operands: list[Value], results: list[Any]):
        """`results` are the abstract values of the results."""
        self.kind: str = kind
        self.params: Mapping[str, Any] = params
        self.operands: list[Value] = operands
        self.results: list[Value] = [Value(aval, self) for aval in results]
        self.bodies: list[Program] = []  # of a loop or a branch
        self.role: str = ""
        self.path: str = ""
        if kind == "name" and params["name"].startswith("bnjax:"):
            _, self.role, self.path = params["name"].split(":", 2)
        for value in operands:
            value.users.append(self)


class Program(NamedTuple):
    """The operations of a program in their order."""

    arguments: list[Value]
    operations: list[Operation]
    results: list[Value]

    def marks(self) -> Iterator[Operation]:
        """All marks, those in loops and branches included."""
        for operation in self.operations:
            if operation.role:
                yield operation
            for body in operation.bodies:
                yield from body.marks()


def mark(role: str, path: str, x: Any) -> Any:
    """The value `x` as the input ("in"), the output ("out") or the "kernel" of the layer with this path."""
    return checkpoint_name(x, f"bnjax:{role}:{path}")


def is_array(leaf: Any) -> bool:
    """Whether `read` makes a leaf an argument of the program. Other leaves, such as a bool, stay as they are."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def read(function: Callable[..., Any], *args: Any) -> Program:
    """The program of `function(*args)`. Arrays in `args` may be `jax.ShapeDtypeStruct`s."""
    leaves, tree = jax.tree.flatten(args)
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def call(*arrays):
        filled = dict(enumerate(leaves)) | dict(zip(traced, arrays, strict=True))
        results = function(*jax.tree.unflatten(tree, filled.values()))
        return [leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, Array)]

    jaxpr = jax.make_jaxpr(call)(*(leaves[i] for i in traced)).jaxpr
    return _read(jaxpr, [Value(v.aval) for v in jaxpr.invars], "the model's result")


def _read(jaxpr, arguments, user=None) -> Program:
    """The program of a jaxpr; `user` is what uses its results, if its caller does not."""
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    operations: list[Operation] = []

    def valued(variables):
        return [Value(v.aval) if hasattr(v, "val") else values.setdefault(v, Value(v.aval)) for v in variables]

    for equation in jaxpr.eqns:
        kind, params, operands = equation.primitive.name, equation.params, valued(equation.invars)
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(dict(params))]
        inner = [jaxpr for jaxpr in inner if hasattr(jaxpr, "eqns")]
        if kind in _CALLS and len(inner) == 1 and len(inner[0].invars) == len(operands):
            inlined = _read(inner[0], operands)
            operations += inlined.operations
            results = inlined.results
            for value in results:
                value.returned_by.add(params.get("name", ""))
        else:
            operation = Operation(kind, params, operands, [v.aval for v in equation.outvars])
            operation.bodies += [_body(jaxpr, operands) for jaxpr in inner]
            operations.append(operation)
            results = operation.results
        values |= zip(equation.outvars, results, strict=True)
    program = Program(arguments, operations, valued(jaxpr.outvars))
    if user is not None:
        Operation(user, {}, program.results, [])
    return program


def _body(jaxpr, operands):
    """The program of a loop or a branch. Its last arguments are the operation's last operands."""
    missing = len(jaxpr.invars) - len(operands)
    outer = [None] * missing + operands[max(-missing, 0) :]
    arguments = [Value(v.aval, outer=value) for v, value in zip(jaxpr.invars, outer, strict=True)]
    return _read(jaxpr, arguments, "the result of a loop")
