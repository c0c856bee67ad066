"""States of NNX models that `jax.export` serializes."""

import ast
from collections.abc import Mapping
from typing import Any

import jax.export
from flax import nnx


def serializable(state: Mapping[Any, Any]) -> nnx.State[Any, Any]:
    """The same state as an argument or a result of programs that `jax.export` serializes.

    `jax.export` needs a name for each type in the state. The names are registered here and not when bnjax is imported,
    because the types are Flax's or the user's, who may have registered them. JAX serializes no dictionary with an
    integer as a key, such as the layers of an `nnx.Sequential`; a State replaces it.
    """
    _register(nnx.State)
    return nnx.State({key: _part(value) for key, value in state.items()})


def _part(value):
    if not isinstance(value, Mapping):
        if isinstance(value, nnx.Variable):
            _register(type(value))
        return value
    nested = serializable(value)
    return nested.raw_mapping if all(isinstance(key, str) for key in nested) else nested


def _register(kind):
    """Register a type whose static data are literals. If a class is defined again, its name gets a number."""
    number, name = 1, f"{kind.__module__}.{kind.__qualname__}"
    while True:
        try:
            jax.export.register_pytree_node_serialization(
                kind,
                serialized_name=name if number == 1 else f"{name}#{number}",
                serialize_auxdata=lambda static: _written(kind, static),
                deserialize_auxdata=lambda written: ast.literal_eval(written.decode()),
            )
        except ValueError as error:
            if "registration for type" in str(error):  # registered already, by us or by others
                return
            number += 1
        else:
            return


def _written(kind, static):
    written = repr(static)
    try:
        same = ast.literal_eval(written) == static
    except (SyntaxError, ValueError):
        same = False
    if not same:
        raise TypeError(
            f"jax.export of {kind.__name__}: its metadata {written} hold more than strings, numbers and tuples. "
            "Remove them, or export a function of the leaves: jax.tree.flatten(variables)."
        )
    return written.encode()
