"""Matched layers of two models: their arrays converted from one to the other, and the rows of the report."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.core import trees
from bnjax.interop.arrays import check_floating, checked, plain, updates
from bnjax.interop.kernels import NORM, moves
from bnjax.interop.match import Moved, Pairs, match, own_layers, uncalled


def matched(call, library, theirs, variables, names, model, inputs, flatten, kwargs) -> Pairs:
    """The matched layers, with the moves of their arrays."""
    trees.check_no_report(f"{call}(variables=...)", variables)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            f"{call}(variables=...): expected a mapping with params, got {type(variables).__name__}. Pass the result "
            "of a Linen model's init, or bnjax.nnx.functional(model)[1] of an NNX model."
        )
    check_names(call, names or {})
    leaves: dict[str, dict[str, Any]] = {}
    for collection in ("params", "batch_stats"):
        for path, own in trees.leaves(variables.get(collection, {})).items():
            leaves.setdefault(path, {}).update(own)
    shapes = {path: {name: tuple(leaf.shape) for name, leaf in own.items()} for path, own in leaves.items()}
    if model is None:
        no_model(call, None, inputs, None, kwargs)
        called = {path: uncalled(own) for path, own in shapes.items()}
        if unknown := [path for path, own in called.items() if own.kind == "convolution"]:
            raise ValueError(
                f"{call}(model=None): ambiguous: kernels of more than two axes, {unknown}, may belong to convolutions "
                "or to transposed convolutions, and a flatten may follow them. Pass model= and inputs= to it."
            )
    else:
        from bnjax.interop.flax_calls import calls  # imported here, because only this needs Flax

        args = inputs if isinstance(inputs, tuple) else (inputs,)
        try:
            called = calls(model, variables, shapes, args, kwargs)
        except Exception as error:  # whatever the model raises
            given = [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(args)]
            error.add_note(
                f"{call}(inputs=...): the Flax model does not run with inputs of shapes {given}. Pass what its call "
                "takes; images have their channels last."
            )
            raise
        if missing := sorted(set(leaves) - set(called)):
            raise ValueError(
                f"{call}(inputs=...): with these inputs the model never calls {missing}. Pass inputs with which it "
                "calls all of its layers."
            )
    if unknown := sorted(set(flatten or {}) - set(leaves)):
        raise ValueError(f"{call}(flatten=...): the model has no {unknown}, but {sorted(leaves)}.")
    pairs = match(call, theirs, own_layers(leaves, called), library, names or {}, model is not None)
    return [(pair, moves(call, pair.theirs, pair.ours, library, flatten or {})) for pair in pairs]


def check_names(call: str, names: Any) -> None:
    """Reject names that are not a mapping of names."""
    if not isinstance(names, Mapping):
        raise ValueError(
            f"{call}(names=...): expected a mapping of the other model's names to paths of the Flax model, got "
            f"{type(names).__name__}."
        )


def moved(call: str, variables: Mapping[str, Any], pairs: Pairs) -> dict[str, Any]:
    """The variables with the other library's arrays."""
    new: dict[str, dict[str, Any]] = {}
    for (theirs, ours, _), array_moves in pairs:
        if ours.sort == NORM:
            named = {re.split("[./:]", theirs.keys[name])[-1]: theirs.arrays[name] for name in array_moves}
            checked(f"{call}: {theirs.name!r}", named)
        values = {}
        for name, move in array_moves.items():
            check_floating(call, theirs.keys[name], theirs.arrays[name])
            values[name] = jnp.array(move.forward(theirs.arrays[name]), ours.arrays[name].dtype)
        if "count" in ours.arrays and "mean" in values:
            own = ours.arrays["count"]
            values["count"] = jnp.full(own.shape, int(theirs.arrays.get("count", 0)), own.dtype)
        for name, value in values.items():
            path, _, leaf = ours.keys[name].rpartition("/")
            new.setdefault(path, {})[leaf] = value
    converted = {key: trees.replaced(tree, new) for key, tree in variables.items() if key in ("params", "batch_stats")}
    return {**variables, **converted}


def weights_of(pairs: Pairs) -> dict[str, np.ndarray]:
    """The arrays for the other library, by their names in its model."""
    weights = {}
    for (theirs, ours, _), array_moves in pairs:
        for name, move in array_moves.items():
            weights[theirs.keys[name]] = plain(move.backward(np.asarray(ours.arrays[name])))
        if "count" in theirs.arrays:
            weights[theirs.keys["count"]] = updates(ours.arrays.get("count"))
    return weights


def rows(arrays: Mapping[str, Any], pairs: Pairs) -> tuple[Moved, ...]:
    """The rows of the report, in the order of the other library's arrays; our arrays without a counterpart are last."""
    found, left = {}, []
    for (theirs, ours, by), array_moves in pairs:
        for name, move in array_moves.items():
            found[theirs.keys[name]] = Moved(theirs.keys[name], move.theirs, ours.keys[name], move.ours, str(move), by)
        if key := theirs.keys.get("count"):
            own = ours.arrays.get("count")
            done = ("", (), "not counted here") if own is None else (ours.keys["count"], own.shape, "for each feature")
            found[key] = Moved(key, (), *done, by)
        for name in [name for name in ours.keys if name not in (*array_moves, *theirs.keys)]:
            done = "0: not counted there" if name == "count" and "mean" in array_moves else "stays: not kept there"
            left.append(Moved("", (), ours.keys[name], ours.arrays[name].shape, done, by))
    there = {key: Moved(key, array.shape, "", (), "only for renormalization", "") for key, array in arrays.items()}
    return (*(there | found).values(), *left)


def no_model(call, model, inputs, flatten, kwargs):
    """Reject arguments that have no effect without a model."""
    passed = {"model": model is not None, "inputs": not isinstance(inputs, tuple) or inputs, "flatten": flatten}
    if unused := [name for name, value in {**passed, **dict.fromkeys(kwargs, True)}.items() if value]:
        raise ValueError(
            f"{call}(model=None): {unused} are for the call of a model. Pass model= too, or leave them out."
        )
