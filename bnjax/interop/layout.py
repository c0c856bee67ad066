"""The axes of an image that a layer's features come from, according to the program of a model.

PyTorch stores the channels of an image before its pixels, Flax and Keras after them. If a reshape puts pixels and
channels on one axis, between a convolution and a dense layer or in reverse, the libraries number its features in
different orders.

Every axis of every array is a list of atoms, pieces that no reshape has split yet. A convolution determines which atoms
are pixels and which are channels; reshapes join and split atoms; an elementwise operation equates the atoms of its
operands. An atom that the program does not determine is UNCLEAR, which is an error if a layer's features depend on it.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from bnjax.traced.program import Operation, Program, Value

CHANNEL, INPUT, UNCLEAR = "channel", "input", "unclear"  # roles; the role of pixels is the number of their axis, from 0
_MOVING = {"rev", "sort", "gather", "scatter", "scatter-add", "dynamic_update_slice", "cumsum", "scan", "while", "cond"}


class Layout(NamedTuple):
    """`theirs.reshape(sizes).transpose(order)` puts the elements of a feature axis into Flax's order."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]


class Atom:
    """A piece of an axis. An atom that was split, or equated with another one, consists of its parts."""

    def __init__(self, size: int, role: Any = None, whole: "Atom | None" = None):
        self.size: int = size
        self.role: Any = role
        self.whole: Atom | None = whole
        self.parts: list[Atom] = []


Axes = list[list[Atom]]


class Called(NamedTuple):
    """A layer that a model calls."""

    # "dense", "embed", "conv2" or "transposed2" for a convolution over two axes, "norm-1" for a normalization of the
    # features on axis -1, or "other"
    kind: str
    traced: bool = False  # False if only its arrays are known
    swapped: bool = False  # transpose_kernel
    groups: int = 1
    into: list[Atom] | None = None  # atoms of the input's feature axis, if known
    out: list[Atom] | None = None  # atoms of the output's feature axis, if known
    module: Any = None  # the layer itself, if traced
    shapes: tuple[tuple[int, ...], ...] = ()  # of its inputs, in the order of the calls
    padded: bool = False  # whether an input of it is the result of a pad


class _Reading(NamedTuple):
    """What is known of a program's values."""

    kinds: Mapping[str, str]  # the kinds of the marked layers, as in `Called`
    axes: dict[Value, Axes]
    features: dict[tuple[str, str], list[Atom]]  # atoms of the feature axis, by ("in" or "out", layer)
    entered: dict[str, Axes]  # the last inputs of the normalizations


def features(program: Program, inputs: int, kinds: Mapping[str, str]) -> dict[tuple[str, str], list[Atom]]:
    """The atoms of the feature axis of each marked layer's input and output, by ("in" or "out", layer).

    Args:
      program: the model's.
      inputs: the number of last arguments that are inputs and not variables.
      kinds: the kinds of the marked layers, as in `Called`.
    """
    reading = _Reading(kinds, {v: _fresh(v.shape) for v in program.arguments}, {}, {})
    for value in program.arguments[len(program.arguments) - inputs :]:
        for axis in reading.axes[value][1:]:
            _give(axis, INPUT)
    _run(program, reading)
    return {key: expand(atoms) for key, atoms in reading.features.items()}


def padded(program: Program) -> set[str]:
    """The marked layers that a padded array enters."""
    entering = [(mark.path, mark.operands[0]) for mark in program.marks() if mark.role == "in"]
    return {path for path, v in entering if "_pad" in v.returned_by or (v.maker is not None and v.maker.kind == "pad")}


def layout(atoms: list[Atom], channels_first: bool) -> Layout | None:
    """The layout of the features that these atoms form in another library, or None if it is not determined."""
    roles = [atom.role for atom in atoms]
    placed = [role for role in roles if role == CHANNEL or isinstance(role, int)]
    partly = 0 < len(placed) < len(roles)
    split = len({id(_whole(atom)) for atom in atoms}) == 1  # an axis that was split and joined again is one axis
    if channels_first and (UNCLEAR in roles or (roles.count(INPUT) > 1 and not split) or partly):
        return None
    last = -1 if channels_first else float("inf")
    keys = [last if role == CHANNEL else role for role in placed]
    if len(placed) < len(roles) or keys == sorted(keys):
        return same(prod(atom.size for atom in atoms))
    theirs = sorted(range(len(keys)), key=keys.__getitem__)
    return Layout(tuple(atoms[i].size for i in theirs), tuple(theirs.index(i) for i in range(len(theirs))))


def same(size: int) -> Layout:
    """The layout of features that both libraries number in the same order."""
    return Layout((size,), (0,))


def expand(atoms: list[Atom]) -> list[Atom]:
    """The smallest atoms, without atoms of size 1."""
    leaves = [leaf for atom in atoms for leaf in (expand(atom.parts) if atom.parts else [atom])]
    return [leaf for leaf in leaves if leaf.size > 1]


def _whole(atom):
    """The axis that an atom was split from, or the atom itself."""
    while atom.whole is not None:
        atom = atom.whole
    return atom


def _give(atoms, role):
    """Give atoms a role. It replaces INPUT; any other two roles contradict each other, which makes the atom UNCLEAR."""
    for atom in expand(atoms):
        roles = {atom.role, role} - {None}
        roles = roles - {INPUT} or roles
        atom.role = UNCLEAR if len(roles) > 1 else next(iter(roles), None)


def _join(first, second):
    """Equate the atoms of two axes that an elementwise operation combines."""
    first, second = expand(first), expand(second)
    if [atom.size for atom in first] == [atom.size for atom in second]:
        for a, b in zip(first, second, strict=True):
            if a is not b:
                _give([b], a.role)
                a.parts, b.whole = [b], b.whole or a.whole
    elif len(first) == 1 or len(second) == 1:
        one, many = (first, second) if len(first) == 1 else (second, first)
        if one[0].role is not None:
            _give(many, one[0].role)
        one[0].parts = many
    else:
        _give(first + second, UNCLEAR)


def _run(program, reading):
    """Read the operations of a program whose arguments have known axes."""

    def axes(values):
        return [reading.axes.setdefault(v, _fresh(v.shape)) for v in values]

    for operation in program.operations:
        operands, body = axes(operation.operands), _inner(operation)
        if body is not None:
            reading.axes.update(zip(body.arguments, operands, strict=True))
            _run(body, reading)
            results = axes(body.results)
        else:
            results = [_result(operation, operands, v.shape, reading) for v in operation.results]
        reading.axes.update(zip(operation.results, results, strict=True))


def _inner(operation):
    """The body that an operation runs with its own operands."""
    shapes = [v.shape for v in operation.operands + operation.results]
    fitting = (body for body in operation.bodies if [v.shape for v in body.arguments + body.results] == shapes)
    return next(fitting, None)


def _result(operation: Operation, operands, shape, reading) -> Axes:
    """The axes of one result of an operation."""
    name, params = operation.kind, operation.params
    if operation.role in ("in", "out"):
        return _read_mark(operation.role, operation.path, operands[0], reading)
    if name == "reshape":
        return _reshaped(operands[0], shape)
    if name == "transpose":
        return [operands[0][i] for i in params["permutation"]]
    if name == "broadcast_in_dim":
        axes = _fresh(shape)
        for axis, atoms in zip(params["broadcast_dimensions"], operands[0], strict=True):
            axes[axis] = atoms if prod(a.size for a in expand(atoms)) == shape[axis] else axes[axis]
        return axes
    if name == "dot_general":
        (contracted, batch) = params["dimension_numbers"]
        free = [
            [axis for i, axis in enumerate(operand) if i not in (*gone, *shared)]
            for operand, gone, shared in zip(operands, contracted, batch, strict=True)
        ]
        return [*(operands[0][i] for i in batch[0]), *free[0], *free[1]]
    gone = params.get("dimensions" if name == "squeeze" else "axes", ())
    if operands and isinstance(gone, tuple) and len(operands[0]) - len(gone) == len(shape) and gone:
        return [axis for i, axis in enumerate(operands[0]) if i not in gone]
    alike = [axes for axes, v in zip(operands, operation.operands, strict=True) if v.shape == shape]
    if alike and name not in _MOVING:
        for other in alike[1:]:
            for first, second in zip(alike[0], other, strict=True):
                _join(first, second)
        return alike[0]
    like = [operand for operand in operands if len(operand) == len(shape)]
    if not like:
        has_pixels = any(isinstance(a.role, int) for operand in operands for axis in operand for a in expand(axis))
        return _fresh(shape, UNCLEAR if has_pixels else None)
    return [_resized(sides, size, name in _MOVING) for *sides, size in zip(*like, shape, strict=True)]


def _fresh(shape, role=None) -> Axes:
    return [[Atom(size, role)] for size in shape]


def _resized(sides, size, moved):
    """An axis of a result whose elements were moved, dropped or joined, given the same axis of the operands."""
    if not moved and prod(atom.size for atom in expand(sides[0])) == size:
        return sides[0]
    result = [Atom(size)]
    for leaves in map(expand, sides):
        _give(result, UNCLEAR if len(leaves) > 1 else leaves[0].role if leaves else None)
    return result


def _reshaped(axes, shape) -> Axes:
    """The atoms distributed over the axes of a new shape. An atom is split if an axis ends inside it."""
    atoms = expand([atom for axis in axes for atom in axis])
    result: Axes = []
    for size in shape:
        axis = []
        while size > 1 and atoms:
            atom = atoms.pop(0)
            if size % atom.size and atom.size % size == 0:
                atom.parts = [Atom(n, atom.role, atom) for n in (size, atom.size // size)]
                atom, rest = atom.parts
                atoms.insert(0, rest)
            if size % atom.size:
                return _fresh(shape, UNCLEAR)
            axis.append(atom)
            size //= atom.size
        result.append(axis)
    return [_merged(axis) for axis in result]


def _merged(axis):
    """An axis after a reshape. An axis of only pixels becomes one atom without a role: pixels are then tokens, and
    PyTorch's convention of channels before pixels no longer applies. On an axis of pixels and a part of the channels,
    as in a pixel shuffle, the channels become UNCLEAR, because a layout cannot describe it."""
    pixels = [atom for atom in axis if isinstance(atom.role, int)]
    if len(axis) > 1 and len(pixels) == len(axis):
        return [Atom(prod(atom.size for atom in axis))]
    if pixels:
        for atom in axis:
            if atom.role == CHANNEL and not set(expand([_whole(atom)])) <= set(axis):
                _give([atom], UNCLEAR)
    return axis


def _read_mark(side, layer, axes, reading) -> Axes:
    """The axes of a layer's marked input or output. The output features are the same atoms in each call of a layer."""
    axes, kind = [*axes], reading.kinds[layer].replace("transposed", "conv")
    if kind.startswith("norm"):
        if side == "out":
            return reading.entered[layer]
        reading.entered[layer] = axes
        axis = int(kind.removeprefix("norm"))
        _join(axes[axis], reading.features.setdefault((side, layer), axes[axis]))
        return axes
    if kind == "embed" and side == "in":
        return axes
    spatial = int(kind.removeprefix("conv")) if kind.startswith("conv") else 0
    pixels = list(enumerate(range(len(axes) - 1 - spatial, len(axes) - 1)))
    if side == "out":
        size = prod(atom.size for atom in expand(axes[-1]))
        axes[-1] = reading.features.setdefault((side, layer), [Atom(size, CHANNEL if spatial else None)])
        for role, axis in pixels:
            axes[axis] = [Atom(prod(atom.size for atom in expand(axes[axis])), role)]
        return axes
    for role, axis in pixels:
        _give(axes[axis], role)
    if spatial:
        _give(axes[-1], CHANNEL)
    _join(axes[-1], reading.features.setdefault((side, layer), axes[-1]))
    return axes
