"""The arguments of `diagnose` as layers, each with its parameters, running statistics and moments of the batch.

Mistaken trees are rejected here: arguments in another order, several collections at once, another model's trees.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bnjax.core import trees
from bnjax.core.jax_internals import is_traced
from bnjax.core.records import BNParams, BNState
from bnjax.diagnosis.report import listed

_PASS = {
    "params": "variables['params'], or state.params of a TrainState",
    "batch_stats": "variables['batch_stats'], or state.batch_stats of a TrainState",
    "batch_moments": "only the collection, updates['batch_moments']",
}
_MOMENTS = {"weight", "mean", "var"}


class Layer(NamedTuple):
    """A layer of batch normalization. `moments` is empty if there are none, and holds the support's arrays too."""

    name: str
    params: BNParams
    state: BNState
    moments: Mapping[str, Any]

    def scale(self) -> np.ndarray:
        """|scale| per feature, of the shape of the statistics: the root of the mean square over classes; 1 if None."""
        shape = np.shape(self.state.mean)
        size = np.ones(shape) if self.params.scale is None else abs(wide(self.params.scale))
        if size.ndim == len(shape) + 1:
            axis = _extra(size.shape, shape)
            size = np.sqrt(np.mean(size**2, axis))
        elif size.ndim == len(shape) - 1:
            size = np.expand_dims(size, _extra(shape, size.shape))
        return np.broadcast_to(size, shape)


def wide(values: Any) -> np.ndarray:
    """The values as float64 or complex128."""
    values = np.asarray(values)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def read(params: Any, batch_stats: Any, batch_moments: Any) -> list[Layer]:
    """The layers of a model, after checks that the three trees are what their names say."""
    for name, tree in (("params", params), ("batch_stats", batch_stats), ("batch_moments", batch_moments)):
        _check_tree(name, tree)
        if name != "batch_moments" and any(set(arrays) >= _MOMENTS for arrays in trees.leaves(tree).values()):
            raise ValueError(
                f"diagnose({name}=...): it has a weight next to mean and var, so these are moments of a batch. Pass "
                f"{_PASS[name]}."
            )
    found = trees.norms(params, batch_stats)
    if not found and trees.norms({}, params):
        raise ValueError(
            "diagnose(params, batch_stats): params has layers with a mean and a var, and batch_stats has none. Pass "
            "them in this order."
        )
    if not found:
        raise ValueError(
            "diagnose(batch_stats=...): no layer in it has both a mean and a var. Pass variables['batch_stats'], "
            "nnx.state(model, nnx.BatchStat), or a BNState."
        )
    for layer, (own, state) in found.items():
        _check_shapes(layer or "the model itself", own, state)
    _check_names(found, trees.leaves(params))
    moments = {} if batch_moments is None else _moments(batch_moments, found)
    return [Layer(name, *found[name], moments.get(name, {})) for name in found]


def _check_tree(name: str, tree: Any) -> None:
    """Check that an argument is a tree of arrays with values, and one collection."""
    call, kind = f"diagnose({name}=...)", type(tree).__name__
    trees.check_no_report(call, tree)
    if any(base.__name__ == "Module" and base.__module__.startswith("flax.") for base in type(tree).__mro__):
        raise TypeError(
            f"{call}: got the model, {kind}. Pass {_PASS[name]}; for an NNX model the variables are "
            "those of bnjax.nnx.functional(model)."
        )
    collections = (
        [key for key in _PASS if key in tree]
        if isinstance(tree, Mapping)
        else [key for key in _PASS if hasattr(tree, key)]
    )
    if collections:
        raise (ValueError if isinstance(tree, Mapping) else TypeError)(
            f"{call}: got {kind} with {', '.join(collections)}. Pass {_PASS[name]}."
        )
    for leaf in jax.tree.leaves(tree):
        if is_traced(leaf):
            raise TypeError("diagnose(...): got traced arrays. Call it outside jit, grad and vmap.")
        valued = hasattr(leaf, "dtype") and not isinstance(leaf, jax.ShapeDtypeStruct)
        if not (valued or isinstance(leaf, int | float | complex)):
            raise TypeError(f"{call}: it holds {type(leaf).__name__}, not arrays of numbers. Pass {_PASS[name]}.")


def _check_shapes(layer: str, own: BNParams, state: BNState) -> None:
    """Check that statistics and parameters of a layer fit each other."""
    shape = np.shape(state.mean)
    if np.shape(state.var) != shape:
        raise ValueError(
            f"diagnose(batch_stats=...): in {layer} mean has shape {shape}, var {np.shape(state.var)}. Pass the "
            "statistics of one model, unchanged."
        )
    for name, value in own._asdict().items():
        if value is not None and not _fits(np.shape(value), shape):
            raise ValueError(
                f"diagnose(params=...): {name} of {layer} has shape {np.shape(value)}, its running mean {shape}. Pass "
                "params and batch_stats of the same model."
            )


def _fits(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether parameters fit statistics: equal shapes, one more axis of classes, or one axis of indices fewer."""
    if len(own) == len(shape):
        return all(a in (1, b) for a, b in zip(own, shape, strict=True))
    longer, shorter = (own, shape) if len(own) > len(shape) else (shape, own)
    return len(longer) == len(shorter) + 1 and _extra(longer, shorter) is not None


def _extra(longer: tuple[int, ...], shorter: tuple[int, ...]) -> Any:
    """The axis without which the longer shape is the shorter one; None if there is none."""
    return next((a for a in range(len(longer)) if longer[:a] + longer[a + 1 :] == shorter), None)


def _check_names(found: Mapping[str, tuple[BNParams, BNState]], learned: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the parameters are of the same model: if no layer has any, no other of its name may have them."""
    scaled = [layer for layer, arrays in learned.items() if "scale" in arrays and layer not in found]
    if not scaled or any(layer in learned for layer in found):
        return
    named = {layer.rpartition("/")[2] for layer in found} & {layer.rpartition("/")[2] for layer in scaled}
    elsewhere = not {layer.partition("/")[0] for layer in found} & {layer.partition("/")[0] for layer in learned}
    alone = all(set(arrays) <= {"scale", "bias"} for arrays in learned.values())
    if alone or (named and elsewhere):
        raise ValueError(
            f"diagnose(params=...): got scales of {_listed(scaled)}, but statistics of {_listed(found)}. Pass params "
            "and batch_stats of the same model."
        )


def _moments(batch_moments: Any, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The moments and their support by layer."""
    given = {name.strip("/"): arrays for name, arrays in trees.leaves(batch_moments).items()}
    if not given:
        raise ValueError(
            "diagnose(batch_moments=...): it holds no moments. Flax's own layers do not collect them: convert the "
            "model by bnjax.linen.convert or bnjax.nnx.convert, and run it in training with batch_moments mutable."
        )
    moments: dict[str, dict[str, Any]] = {}
    for name, arrays in given.items():
        if set(arrays) >= _MOMENTS:
            layer = name if name in found else name.removesuffix("moments").rstrip("/")
            support = given.get(f"{layer}/support".strip("/"), {})
            moments[layer] = {**arrays, **support}
    if not moments:
        paths = [f"{layer}/{name}".strip("/") or "an array" for layer, arrays in given.items() for name in arrays]
        raise ValueError(
            f"diagnose(batch_moments=...): no layer in it has weight, mean and var; it holds {_listed(paths)}. Pass "
            f"{_PASS['batch_moments']}, or bnjax.batch_moments(x) of a layer's input."
        )
    unknown, without = [name for name in moments if name not in found], [n for n in found if n not in moments]
    if unknown and without:
        raise ValueError(
            f"diagnose(batch_moments=...): got moments of {_listed(unknown)}, but statistics of {_listed(without)}. "
            "Pass only the collection, updates['batch_moments'], of the same model."
        )
    return moments


def _listed(names: Iterable[str]) -> str:
    """The first names of layers, in brackets."""
    return listed(repr(name or "the model itself") for name in sorted(names)).join("[]")
