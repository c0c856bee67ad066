"""How PyTorch and Keras keep the arrays of a layer, and how they become those of the Flax layer and back."""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from bnjax.interop.layout import Called, Layout, layout, same

CONVOLUTION, MATRIX, NORM, TENSOR = "convolutions", "dense layers and embeddings", "normalizations", "other tensors"


class Library(NamedTuple):
    name: str
    argument: str  # that holds its arrays
    channels_first: bool


TORCH, KERAS = Library("PyTorch", "state_dict", True), Library("Keras", "weights", False)


class Layer(NamedTuple):
    """The names of a layer's arrays in its model, and the arrays, by kernel, bias, scale, mean, var and count.

    Its sort is one of the four above. `called` is of the Flax model's layers.
    """

    name: str
    sort: str
    keys: dict[str, str]
    arrays: dict[str, Any]
    called: Called = Called("")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(array.shape) for name, array in self.arrays.items() if name != "count"}


class Move(NamedTuple):
    """An array's way from another library to here: reshaped to `split`, transposed by `order`, flipped along the axes
    `flipped`, reshaped to `ours`."""

    theirs: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    flipped: tuple[int, ...]
    ours: tuple[int, ...]

    def forward(self, array: np.ndarray) -> np.ndarray:
        return np.flip(array.reshape(self.split).transpose(self.order), self.flipped).reshape(self.ours)

    def backward(self, array: np.ndarray) -> np.ndarray:
        array = np.flip(array.reshape([self.split[i] for i in self.order]), self.flipped)
        return array.transpose(np.argsort(self.order)).reshape(self.theirs)

    def __str__(self) -> str:
        steps = []
        if self.split != self.theirs:
            steps.append(f"reshaped to {self.split}")
        if self.order != tuple(range(len(self.order))):
            steps.append(f"transposed {self.order}")
        if self.flipped:
            steps.append(f"flipped along {self.flipped}")
        if self.ours != tuple(self.split[i] for i in self.order):
            steps.append("reshaped")
        return ", ".join(steps) or "as it is"


def needed(ours: Layer, library: Library) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the other library's layer that has the weights for one of ours; for Keras one of two."""
    shapes = ours.shapes()
    if "kernel" not in shapes:
        return [shapes]
    kernel, groups = shapes["kernel"], ours.called.groups
    found = [shapes | {"kernel": tuple(kernel[i] for i in np.argsort(_order(ours, library)))}]
    if library is KERAS and groups > 1 and kernel[-2] == 1:  # a DepthwiseConv
        found.append(shapes | {"kernel": (*kernel[:-2], groups, kernel[-1] // groups)})
    return found


def moves(call: str, theirs: Layer, ours: Layer, library: Library, flatten: dict[str, Any]) -> dict[str, Move]:
    """The way of each array of a layer, but its count.

    Args:
      flatten: by the paths of layers the image (H, W, C) whose places are their input's features, () for none.
    """
    shapes = ours.shapes()
    features = prod(shapes["kernel"][:-1] if "kernel" in shapes else next(iter(shapes.values())))
    if ours.sort == TENSOR:
        return {name: _move(shape, range(len(shape)), [same(n) for n in shape]) for name, shape in shapes.items()}
    embed = ours.called.kind == "embed"
    into = same(features) if embed else _layout(call, ours, "in", library, flatten, features)
    if ours.sort == NORM:
        return {name: _move(shape, (0,), [into]) for name, shape in shapes.items()}
    out = _layout(call, ours, "out", library, flatten, shapes["kernel"][-1])
    kernel, order = shapes["kernel"], _order(ours, library)
    found = {"bias": _move(shapes["bias"], (0,), [out])} if "bias" in shapes else {}
    if ours.sort == MATRIX:
        return found | {"kernel": _move(kernel, order, [into, out])}
    flipped = tuple(range(len(kernel) - 2)) if _unswapped(ours) else ()
    move = _move(kernel, order, [same(n) for n in kernel], flipped)
    if (depthwise := theirs.shapes()["kernel"]) != move.theirs:
        move = move._replace(theirs=depthwise, split=depthwise)
    return found | {"kernel": move}


def _order(ours, library):
    """The axes of the other library's kernel in the order of ours."""
    axes = tuple(range(len(ours.arrays["kernel"].shape)))
    if library is KERAS:
        return (*axes[:-2], axes[-1], axes[-2]) if _unswapped(ours) else axes
    if ours.called.kind == "embed":
        return axes
    return (*axes[2:], 0, 1) if _unswapped(ours) else (*axes[2:], 1, 0)


def _unswapped(ours):
    """A transposed convolution whose kernel is as that of a convolution; both libraries keep that of its transpose."""
    return ours.called.kind.startswith("transposed") and not ours.called.swapped


def _move(shape, order, layouts, flipped=()):
    """For an array of this shape, and its axes with their layouts: axis i of it is order[i] in the other library."""
    order = tuple(order)
    places = np.argsort(order)
    sizes = [layouts[i].sizes for i in places]
    starts = np.cumsum([0, *map(len, sizes)])
    split = tuple(size for axis in sizes for size in axis)
    split_order = tuple(int(starts[axis]) + i for axis, own in zip(order, layouts, strict=True) for i in own.order)
    return Move(tuple(shape[i] for i in places), split, split_order, flipped, tuple(shape))


def _layout(call, ours, side, library, flatten, features) -> Layout:
    """Of the features that enter a layer, or leave it."""
    path, called = ours.name, ours.called
    image = tuple(flatten.get(path, ())) or (features,)
    if path in flatten and (side == "in" or len(image) == 1):
        if prod(image) != features:
            raise ValueError(
                f"{call}(flatten={{{path!r}: {image}}}): the layer has {features} features, the image {prod(image)} "
                "elements. Pass (height, width, channels) of what is flattened, or () if it is not an image."
            )
        first = library.channels_first
        return Layout((image[-1], *image[:-1]), (*range(1, len(image)), 0)) if first else same(features)
    atoms = called.into if side == "in" else called.out
    if not called.traced or (atoms is None and ours.sort == CONVOLUTION):
        return same(features)
    found = None if atoms is None else layout(atoms, library.channels_first)
    if found is None or (ours.sort == CONVOLUTION and found.order != tuple(range(len(found.order)))):
        raise ValueError(
            f"{call}(inputs=...): ambiguous: the features {'into' if side == 'in' else 'out of'} {path!r} are places "
            f"of an image, or were joined with others, and their order in {library.name} cannot be told from the "
            f"model. Pass flatten={{{path!r}: (height, width, channels)}} of the image that is flattened into it, or "
            f"flatten={{{path!r}: ()}} if the order is the same there."
        )
    return found
