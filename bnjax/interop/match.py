"""Matching of the layers of a PyTorch or Keras model with those of a Flax model, by order, kind and shapes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bnjax.interop.kernels import CONVOLUTION, MATRIX, NORM, TENSOR, Layer, Library, needed
from bnjax.interop.layout import Called

TORCH_NAMES = {"bias": "bias", "running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
KERAS_NAMES = {
    "kernel": "kernel",
    "embeddings": "kernel",
    "depthwise_kernel": "kernel",
    "bias": "bias",
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}


class Pair(NamedTuple):
    """A layer of the other library, the Flax layer that it matches, and the reason, as in `Moved.by`."""

    theirs: Layer
    ours: Layer
    by: str


class Moved(NamedTuple):
    """A tensor that was converted, or that has no counterpart in the other model, where name and shape are empty."""

    theirs: str  # its name in the other library's model
    their_shape: tuple[int, ...]
    ours: str  # its path in the Flax variables
    our_shape: tuple[int, ...]
    done: str  # its conversion, from the other library to Flax
    by: str  # what matched its layer: "names" that were given, its "shape" alone, or the "order"


@dataclass(frozen=True)
class Report:
    """Every tensor that was converted, and what has no counterpart. It prints as a table."""

    tensors: tuple[Moved, ...]

    def __str__(self) -> str:
        rows = [("theirs", "shape", "ours", "shape", "done", "by"), *(tuple(map(str, row)) for row in self.tensors)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def torch_layers(arrays: Mapping[str, np.ndarray]) -> list[Layer]:
    """The layers of a state_dict, in the order of its entries."""
    layers = []
    for prefix, group in _groups(arrays, ".").items():
        named = {TORCH_NAMES.get(name, name): key for name, key in group.items()}
        if "weight" in named:
            key = named.pop("weight")
            named["scale" if arrays[key].ndim == 1 else "kernel"] = key
        layers += _layers(prefix, named, arrays)
    return layers


def keras_layers(arrays: Mapping[str, np.ndarray]) -> list[Layer]:
    """The layers of Keras weights, in their order. A separable convolution counts as two convolutions."""
    layers = []
    for prefix, group in _groups(arrays, "/").items():
        group = {re.sub(r":\d+$", "", name): key for name, key in group.items()}
        if {"depthwise_kernel", "pointwise_kernel"} <= set(group):
            layers += _layers(f"{prefix}/depthwise", {"kernel": group.pop("depthwise_kernel")}, arrays)
            group["kernel"] = group.pop("pointwise_kernel")
            prefix = f"{prefix}/pointwise"
        layers += _layers(prefix, {KERAS_NAMES.get(name, name): key for name, key in group.items()}, arrays)
    return layers


def own_layers(leaves: Mapping[str, Mapping[str, Any]], called: Mapping[str, Called]) -> list[Layer]:
    """The layers of a Flax model, in the order of `called`."""
    layers = []
    for path, call in called.items():
        keys = {name: f"{path}/{name}" if path else name for name in leaves[path]}
        arrays = {key: leaves[path][name] for name, key in keys.items()}
        if call.kind == "other":
            layers += _tensors(keys.values(), arrays)
        else:
            named = {name.replace("embedding", "kernel"): key for name, key in keys.items()}
            layers += [layer._replace(called=call) for layer in _layers(path, named, arrays)]
    return layers


def uncalled(shapes: Mapping[str, tuple[int, ...]]) -> Called:
    """The kind of a layer, from the shapes of its arrays alone.

    A kernel of more than two axes may belong to a convolution or to a transposed one; its kind is "convolution".
    """
    names = set(shapes)
    if "kernel" in names and names <= {"kernel", "bias"}:
        return Called("dense" if len(shapes["kernel"]) == 2 else "convolution")
    if names == {"embedding"}:
        return Called("embed")
    vectors = all(len(shape) == 1 for shape in shapes.values())
    known = vectors and names <= {"scale", "bias", "mean", "var", "count"} and names != {"bias"}
    return Called("norm-1" if known else "other")


def match(
    call: str, theirs: Sequence[Layer], ours: Sequence[Layer], library: Library, names: Mapping[str, str], called: bool
) -> list[Pair]:
    """Pair the layers named in `names`, and the others by their order, provided that their shapes agree.

    Args:
      call: the function called, for errors.
      theirs, ours: the layers of the other library's model, and of the Flax model.
      library: the other library.
      names: by the name of one of theirs, the name of one of ours.
      called: whether ours are in the order of their calls. If so, all layers are matched in one order, or else each
        sort of layer in an order of its own. If not, the layers of each sort must be ordered by the numbers in their
        paths, or differ in shape.
    """
    pairs = _pinned(call, theirs, ours, library, names)
    named = {id(layer) for pair in pairs for layer in pair[:2]}
    theirs_left, ours_left = ([layer for layer in side if id(layer) not in named] for side in (theirs, ours))
    if not called:
        ours_left = sorted(ours_left, key=lambda layer: _numbered(layer.name))
    found = list(zip(theirs_left, ours_left, strict=False))
    whole = len(theirs_left) == len(ours_left) and all(fits(library, t, o) for t, o in found)
    if not called or not whole:
        found = []
        for sort in (CONVOLUTION, MATRIX, NORM, TENSOR):
            their, our = ([layer for layer in side if layer.sort == sort] for side in (theirs_left, ours_left))
            found += _by_order(call, library, sort, their, our, called)
        if found:
            _check_order(call, pairs, found, theirs, ours)
    for their, our in found:
        others = [fits(library, their, o) for o in ours_left] + [fits(library, t, our) for t in theirs_left]
        pairs.append(Pair(their, our, "shape" if sum(others) == 2 else "order"))
    return pairs


def fits(library: Library, theirs: Layer, ours: Layer, named: bool = False) -> bool:
    """Whether the weights of theirs fit ours. The array of an unknown layer with several axes may have its axes in
    another order there, so it fits only if its layer was `named` by the caller."""
    if theirs.sort != ours.sort or theirs.shapes() not in needed(ours, library):
        return False
    return ours.sort != TENSOR or named or sum(size > 1 for size in ours.shapes()["array"]) < 2


def _pinned(call, theirs, ours, library, names):
    sides = [{layer.name: layer for layer in side} for side in (theirs, ours)]
    pairs = []
    for pair in names.items():
        layers = []
        for name, side, whose in zip(pair, sides, (f"{library.name}'s model", "the model"), strict=True):
            if name not in side:
                raise ValueError(
                    f"{call}(names={{{pair[0]!r}: {pair[1]!r}}}): {whose} has no {name!r}, but {list(side)}."
                )
            layers.append(side[name])
        their, our = layers
        if not fits(library, their, our, named=True):
            raise ValueError(f"{call}(names={{{pair[0]!r}: {pair[1]!r}}}): {_mismatch(library, their, our)}.")
        pairs.append(Pair(their, our, "names"))
    twice = sorted({p.ours.name for p in pairs if [q.ours for q in pairs].count(p.ours) > 1})
    if twice:
        raise ValueError(f"{call}(names=...): {twice} are named twice. Name one layer of {library.name} for each.")
    return pairs


def _by_order(call, library, sort, theirs, ours, called):
    """Pair the layers of one sort by their order."""
    if not called and not all(_comparable(a.name, b.name) for a, b in pairwise(ours)):
        fitting = {t.name: [o for o in ours if fits(library, t, o)] for t in theirs}
        if len({o.name for found in fitting.values() for o in found}) == len(ours) == sum(map(len, fitting.values())):
            return [(t, fitting[t.name][0]) for t in theirs]
        raise ValueError(
            f"{call}(model=None): ambiguous: the paths {[layer.name for layer in ours]} do not determine the order in "
            f"which the model calls its {sort}. Pass model= and inputs= to it."
        )
    found = list(zip(theirs, ours, strict=False))
    wrong = next((i for i, pair in enumerate(found) if not fits(library, *pair)), len(found))
    if len(theirs) == len(ours) == wrong:
        return found
    unmatched = [
        [a.name for a in side if not any(fits(library, *((a, b) if side is theirs else (b, a))) for b in other)]
        for side, other in ((theirs, ours), (ours, theirs))
    ]
    if wrong < len(found):
        mismatch = _mismatch(library, *found[wrong])
    else:
        left = [layer.name for layer in theirs[wrong:] or ours[wrong:]]
        mismatch = f"left over in the {library.name if len(theirs) > wrong else 'Flax'} model: {left}"
    raise ValueError(
        f"{call}({library.argument}=...): the {library.name} model has {len(theirs)} {sort}, the Flax model "
        f"{len(ours)}. The first mismatch in order is number {wrong + 1}: {mismatch}. Layers that match no other: "
        f"{unmatched[0]} of {library.name}, {unmatched[1]} of Flax. Leave out of "
        f"{library.argument} the layers that the Flax model lacks, or pass names for the layers that belong together."
    )


def _check_order(call, pinned, found, theirs, ours):
    """Check that pairs given by `names` do not cross the order, because order then could not match the others."""
    places = [{id(layer): i for i, layer in enumerate(side)} for side in (theirs, ours)]
    for sort in {pair.ours.sort for pair in pinned}:
        pairs = [pair[:2] for pair in pinned if pair.ours.sort == sort] + [p for p in found if p[0].sort == sort]
        order = [places[1][id(our)] for _, our in sorted(pairs, key=lambda pair: places[0][id(pair[0])])]
        if order != sorted(order):
            raise ValueError(
                f"{call}(names=...): ambiguous: the {sort} named are in different orders in the two models, so their "
                f"order does not match the others. Name these too: {[t.name for t, _ in found]}."
            )


def _mismatch(library, theirs, ours):
    return (
        f"{library.name}'s {theirs.name!r} has {theirs.shapes()}, and {ours.name!r}, of shapes {ours.shapes()}, needs "
        f"{needed(ours, library)[0]} there"
    )


def _groups(arrays, separator):
    groups: dict[str, dict[str, str]] = {}
    for key in arrays:
        prefix, _, name = key.rpartition(separator)
        groups.setdefault(prefix, {})[name] = key
    return groups


def _layers(name, keys, arrays):
    """One layer if its arrays are those of a known kind, else a layer of sort TENSOR for each array."""
    names, own = set(keys) - {"count"}, {part: arrays[key] for part, key in keys.items()}
    if "kernel" in names and names <= {"kernel", "bias"}:
        return [Layer(name, MATRIX if own["kernel"].ndim == 2 else CONVOLUTION, keys, own)]
    if names <= {"scale", "bias", "mean", "var"} and names - {"bias"}:
        return [Layer(name, NORM, keys, own)]
    return _tensors(keys.values(), arrays)


def _tensors(keys, arrays):
    return [Layer(key, TENSOR, {"array": key}, {"array": arrays[key]}) for key in keys]


def _numbered(path):
    """The parts of a path, each with the number at its end, for sorting."""
    found = [re.fullmatch(r"(.*?)(\d*)", part) for part in path.split("/")]
    return [(part[1], int(part[2] or -1)) for part in found if part]


def _comparable(first, second):
    """Whether the first difference between two paths is a number alone."""
    pairs = zip(_numbered(first), _numbered(second), strict=False)
    return next((a[0] == b[0] for a, b in pairs if a != b), False)
