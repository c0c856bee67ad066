"""The layouts of a layer's arrays in PyTorch and Keras, and their conversion to and from Flax's layouts."""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from bnjax.interop.layout import Called, Layout, layout, same

CONVOLUTION, MATRIX, NORM, TENSOR = "convolutions", "dense layers and embeddings", "normalizations", "other tensors"


class Library(NamedTuple):
    """A library that weights come from."""

    name: str
    argument: str  # of the functions in `models.py` that holds its arrays
    channels_first: bool


TORCH, KERAS = Library("PyTorch", "state_dict", True), Library("Keras", "weights", False)


class Layer(NamedTuple):
    """A layer of either model. Its arrays are named kernel, bias, scale, mean, var and count, as in Flax."""

    name: str
    sort: str  # one of the four above
    keys: dict[str, str]  # by the array's name here, its name in the model
    arrays: dict[str, Any]
    called: Called = Called("")  # how the Flax model calls it

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays, without the count."""
        return {name: tuple(array.shape) for name, array in self.arrays.items() if name != "count"}


class Move(NamedTuple):
    """The conversion of an array from another library to Flax: it is reshaped to `split`, transposed by `order`,
    flipped along the axes `flipped`, and reshaped to `ours`."""

    theirs: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    flipped: tuple[int, ...]
    ours: tuple[int, ...]

    def forward(self, array: np.ndarray) -> np.ndarray:
        """The array in Flax's layout."""
        return np.flip(array.reshape(self.split).transpose(self.order), self.flipped).reshape(self.ours)

    def backward(self, array: np.ndarray) -> np.ndarray:
        """The array in the other library's layout: the inverse of `forward`."""
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
    """The shapes that the other library's layer must have for one of ours. A depthwise layer of Keras has a second
    choice, and so does a batch normalization of PyTorch, which may track no statistics."""
    shapes = ours.shapes()
    if "kernel" not in shapes:
        untracked = {name: shape for name, shape in shapes.items() if name not in ("mean", "var")}
        return [shapes, untracked] if library is TORCH else [shapes]
    kernel, groups = shapes["kernel"], ours.called.groups
    found = [shapes | {"kernel": tuple(kernel[i] for i in np.argsort(_order(ours, library)))}]
    if library.name == KERAS.name and groups > 1 and kernel[-2] == 1:  # a DepthwiseConv
        found.append(shapes | {"kernel": (*kernel[:-2], groups, kernel[-1] // groups)})
    return found


def moves(call: str, theirs: Layer, ours: Layer, library: Library, flatten: dict[str, Any]) -> dict[str, Move]:
    """The conversion of each array of a layer, without the count.

    Args:
      call: the function called, for errors.
      theirs, ours: the layer in the other library and in Flax.
      library: the other library.
      flatten: by a layer's path, the image (height, width, channels) that is flattened into its input, or () if none
        is.
    """
    shapes = ours.shapes()
    features = prod(shapes["kernel"][:-1] if "kernel" in shapes else next(iter(shapes.values())))
    if ours.sort == TENSOR:
        return {name: _move(shape, range(len(shape)), [same(n) for n in shape]) for name, shape in shapes.items()}
    embed = ours.called.kind == "embed"
    into = same(features) if embed else _layout(call, ours, "in", library, flatten, features)
    if ours.sort == NORM:
        if (
            library is TORCH
            and "mean" in theirs.arrays
            and any(isinstance(a.role, int) for a in ours.called.into or ())
        ):
            _check_channels(call, theirs, ours)
        return {name: _move(shape, (0,), [into]) for name, shape in shapes.items() if name in theirs.arrays}
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


def _check_channels(call, theirs, ours):
    """Check that the features of a batch normalization are not on an axis of only pixels."""
    if all(isinstance(atom.role, int) for atom in ours.called.into):
        raise ValueError(
            f"{call}(model=...): PyTorch's {theirs.name!r} normalizes channels, but the features of {ours.name!r} are "
            f"on axis {ours.called.kind.removeprefix('norm')}, which holds pixels. Give the Flax layer axis=-1."
        )


def _order(ours, library):
    """The axes of the other library's kernel, in the order of the Flax kernel's axes."""
    axes = tuple(range(len(ours.arrays["kernel"].shape)))
    if library.name == KERAS.name:
        return (*axes[:-2], axes[-1], axes[-2]) if _unswapped(ours) else axes
    if ours.called.kind == "embed":
        return axes
    return (*axes[2:], 0, 1) if _unswapped(ours) else (*axes[2:], 1, 0)


def _unswapped(ours):
    """Whether a transposed convolution stores its kernel like a convolution (transpose_kernel=False).

    PyTorch and Keras store the kernel of the convolution that it transposes: flipped, with inputs and outputs swapped.
    """
    return ours.called.kind.startswith("transposed") and not ours.called.swapped


def _move(shape, order, layouts, flipped=()):
    """The move of an array of this shape whose axis i has the layout layouts[i], and is axis order[i] in theirs."""
    order = tuple(order)
    places = np.argsort(order)
    sizes = [layouts[i].sizes for i in places]
    starts = np.cumsum([0, *map(len, sizes)])
    split = tuple(size for axis in sizes for size in axis)
    split_order = tuple(int(starts[axis]) + i for axis, own in zip(order, layouts, strict=True) for i in own.order)
    return Move(tuple(shape[i] for i in places), split, split_order, flipped, tuple(shape))


def _layout(call, ours, side, library, flatten, features) -> Layout:
    """The layout of the features that enter a layer (`side` "in") or leave it ("out")."""
    path, called = ours.name, ours.called
    image = tuple(flatten.get(path, ())) or (features,)
    if path in flatten and (side == "in" or len(image) == 1):
        if prod(image) != features:
            raise ValueError(
                f"{call}(flatten={{{path!r}: {image}}}): the layer has {features} features, the image {prod(image)} "
                "elements. Pass (height, width, channels) of the image that is flattened, or () if none is."
            )
        first = library.channels_first
        return Layout((image[-1], *image[:-1]), (*range(1, len(image)), 0)) if first else same(features)
    atoms = called.into if side == "in" else called.out
    if not called.traced or (atoms is None and ours.sort == CONVOLUTION):
        return same(features)
    found = None if atoms is None else layout(atoms, library.channels_first)
    if found is None or (ours.sort == CONVOLUTION and found.order != tuple(range(len(found.order)))):
        raise ValueError(
            f"{call}(inputs=...): ambiguous: the {'input' if side == 'in' else 'output'} features of {path!r} are "
            f"pixels of an image, or were joined with others, so the model does not determine their order in "
            f"{library.name}. Pass flatten={{{path!r}: (height, width, channels)}} of the image that is flattened into "
            f"the layer, or flatten={{{path!r}: ()}} if both libraries have the same order."
        )
    return found
