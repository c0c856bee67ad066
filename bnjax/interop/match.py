"""Matching of the layers of a PyTorch or Keras model with those of a Flax model, by name, order, kind and shapes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np

from bnjax.interop.kernels import CONVOLUTION, MATRIX, NORM, TENSOR, Layer, Library, Move, needed
from bnjax.interop.layout import Called
from bnjax.interop.names import compare

TORCH_NAMES = {"bias": "bias", "running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
SORTS = (CONVOLUTION, MATRIX, NORM, TENSOR)
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


Pairs = list[tuple[Pair, dict[str, Move]]]
"""Layers that belong together, with the moves of their arrays."""


class Moved(NamedTuple):
    """A tensor that was converted, or that has no counterpart in the other model, where name and shape are empty."""

    theirs: str  # its name in the other library's model
    their_shape: tuple[int, ...]  # its shape there
    ours: str  # its path in the Flax variables
    our_shape: tuple[int, ...]  # its shape there
    done: str  # its conversion, from the other library to Flax
    by: str  # what matched its layer: given "names", the "same name", only its "shape", or the "order"


@dataclass(frozen=True)
class Report:
    """Every tensor that was converted, and what has no counterpart. It prints as a table."""

    tensors: tuple[Moved, ...]  # every tensor of both models
    unread: tuple[str, ...] = ()  # options that were not compared, and why

    def __str__(self) -> str:
        rows = [("theirs", "shape", "ours", "shape", "done", "by"), *(tuple(map(str, row)) for row in self.tensors)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"not compared: {what}" for what in self.unread]
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
    """The kind of a layer, from only the shapes of its arrays.

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
    """Pair the layers in `names`, layers of the same name, and the others by their order, if their shapes agree.

    Names overrule order. Order must not decide for the rest of a sort of layer of which `names` has some, or of which
    most layers have the same name; nor for any other layer if the layers matched by name have different orders in the
    two models; nor for two layers that would have each other's names. Such layers are matched only by shape, if that is
    unambiguous, and are an error otherwise.

    Args:
      call: the function called, for errors.
      theirs, ours: the layers of the other library's model, and of the Flax model.
      library: the other library.
      names: by the name of one of theirs, the name of one of ours.
      called: whether ours are in the order of their calls. If so, all layers are matched in one order, or else each
        sort of layer in an order of its own. If not, the layers of each sort must be ordered by the numbers in their
        paths, or differ in shape.
    """
    if not called:
        ours = sorted(ours, key=lambda layer: _numbered(layer.name))
    pairs = _pinned(call, theirs, ours, library, names)
    theirs_left, ours_left = _left(theirs, ours, pairs)
    tensors = [layer.name for layer in (*theirs_left, *ours_left) if layer.sort == TENSOR]
    known = compare([layer.name for layer in theirs_left], [layer.name for layer in ours_left], tensors)
    pairs += _same_names(library, theirs_left, ours_left, known.same)
    for sort in (sort for sort in SORTS if _mostly_named(sort, theirs, pairs)):
        why = f"names match only some of the {sort}"
        pairs += _by_shape(call, library, sort, why, names, *_left(theirs, ours, pairs, sort), called)
    crossed = [sort for sort in SORTS if called and _crossed([p for p in pairs if p.ours.sort == sort], theirs, ours)]
    theirs_left, ours_left = _left(theirs, ours, pairs)
    found = list(zip(theirs_left, ours_left, strict=False))
    if crossed:
        why = f"the {crossed[0]} matched by name are in different orders in the two models"
        for sort in SORTS:
            pairs += _by_shape(call, library, sort, why, names, *_left(theirs, ours, pairs, sort), called)
        return pairs
    if not called or len(theirs_left) != len(ours_left) or not all(fits(library, t, o) for t, o in found):
        found = []
        for sort in SORTS:
            found += _by_order(call, library, sort, *_left(theirs, ours, pairs, sort), called)
    ordered = []
    for their, our in found:
        others = [fits(library, their, o) for o in ours_left] + [fits(library, t, our) for t in theirs_left]
        ordered.append(Pair(their, our, "shape" if sum(others) == 2 else "order"))
    _check_order(call, library, names, pairs, ordered, known, theirs, ours, called)
    return pairs + ordered


def fits(library: Library, theirs: Layer, ours: Layer, named: bool = False) -> bool:
    """Whether the weights of theirs fit ours. The array of an unknown layer with several axes may have them in another
    order there, so it fits only if its layer was `named` by the caller."""
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


def _left(theirs, ours, pairs, sort=None) -> tuple[list[Layer], list[Layer]]:
    """The layers of both models that are in no pair, of one sort or of all."""
    paired = {id(layer) for pair in pairs for layer in pair[:2]}

    def left(side):
        return [layer for layer in side if id(layer) not in paired and sort in (None, layer.sort)]

    return left(theirs), left(ours)


def _same_names(library, theirs, ours, same):
    """The pairs of layers whose names are the same. Axes of an unknown layer's array could be swapped only if they have
    the same size."""
    own = {layer.name: layer for layer in ours}
    pairs = []
    for their in theirs:
        our = own.get(same.get(their.name))
        if our is not None:
            sizes = [size for size in our.shapes().get("array", ()) if size > 1]
            if fits(library, their, our, named=len(set(sizes)) == len(sizes)):
                pairs.append(Pair(their, our, "same name"))
    return pairs


def _mostly_named(sort, theirs, pairs):
    """Whether `names` has layers of this sort, or most of them, or some of them and most of the model, have the same
    name in both models."""
    reasons = [pair.by for pair in pairs if pair.ours.sort == sort]
    same = reasons.count("same name")
    all_same = sum(pair.by == "same name" for pair in pairs)
    size = sum(layer.sort == sort for layer in theirs)
    return "names" in reasons or 2 * same > size or (same > 0 and 2 * all_same > len(theirs))


def _by_shape(call, library, sort, why, names, theirs, ours, called):
    """Pair the layers of one sort by only their shapes. A layer that fits only one other takes that one."""
    fit = np.array([[fits(library, t, o) for o in ours] for t in theirs], bool).reshape(len(theirs), len(ours))
    pairs = []
    while (sole := fit & ((fit.sum(0) == 1) | (fit.sum(1, keepdims=True) == 1))).any():
        i, j = np.argwhere(sole)[0]
        pairs.append(Pair(theirs[i], ours[j], "shape"))
        fit[i] = fit[:, j] = False
    theirs_left, ours_left = _left(theirs, ours, pairs)
    if theirs_left or ours_left:
        if len(theirs) != len(ours) or fit.any(0).sum() + fit.any(1).sum() < len(theirs_left) + len(ours_left):
            _by_order(call, library, sort, theirs, ours, called)  # raises an error, because a shape fits none
        raise ValueError(_ambiguous(call, library, why, sort, names, theirs_left, ours_left))
    return pairs


def _crossed(pairs, theirs, ours):
    """Whether the layers of these pairs are in different orders in the two models."""
    places = [{id(layer): i for i, layer in enumerate(side)} for side in (theirs, ours)]
    order = [places[1][id(our)] for _, our in sorted((p[:2] for p in pairs), key=lambda pair: places[0][id(pair[0])])]
    return order != sorted(order)


def _check_order(call, library, names, pairs, ordered, known, theirs, ours, called):
    """Check that pairs by order do not cross pairs by name, nor give two layers each other's names."""
    for sort in SORTS:
        found = [pair for pair in ordered if pair.ours.sort == sort]
        unsure = [pair for pair in found if pair.by == "order"]
        if not unsure:
            continue
        why = ""
        sure = [pair for pair in pairs if pair.ours.sort == sort]
        if called and sure and _crossed(sure + found, theirs, ours):
            why = f"the {sort} matched by name are in different orders in the two models"
        own = {pair.ours.name: pair.ours for pair in unsure}
        for their, our, _ in unsure:
            same = own.get(known.doubtful.get(their.name, our.name))
            if same is not our and same is not None and fits(library, their, same):
                why = why or f"their order pairs {their.name!r} with {our.name!r} and not with {same.name!r}"
        for (t, o, _), (t2, o2, _) in combinations(unsure, 2):
            if fits(library, t, o2) and known.crossed((t.name, o.name), (t2.name, o2.name)):
                why = why or f"their order pairs {t.name!r} with {o.name!r} and {t2.name!r} with {o2.name!r}"
        if why:
            raise ValueError(
                _ambiguous(call, library, why, sort, names, [p[0] for p in unsure], [p[1] for p in unsure])
            )


def _ambiguous(call, library, why, sort, names, theirs, ours):
    """The error for layers that order must not match, with the `names` to pass."""
    given = "".join(f"{their!r}: {our!r}, " for their, our in names.items())
    missing = ", ".join(f"{layer.name!r}: ..." for layer in theirs)
    return (
        f"{call}(names=...): ambiguous: {why}, so order does not tell which of the {sort} {[o.name for o in ours]} "
        f"are {[t.name for t in theirs]} of {library.name}. Pass names={{{given}{missing}}}, with one "
        "of the former for each `...`."
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
    """Whether the first difference between two paths is only a number."""
    pairs = zip(_numbered(first), _numbered(second), strict=False)
    return next((a[0] == b[0] for a, b in pairs if a != b), False)
