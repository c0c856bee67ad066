"""Which axes of an image a layer's features come from, read off the jaxpr of a model.

PyTorch keeps the channels of an image before its pixels, Flax and Keras after them. Wherever pixels and channels share
one axis, between a convolution and a dense layer and the other way round, the two number its features differently.

Every axis of every array is a list of atoms: pieces that no reshape has taken apart so far. Convolutions tell which
atoms are pixels and which channels; reshapes join and split atoms; elementwise operations identify those of their
operands. The model marks the calls of its layers by `checkpoint_name`, as `mark` names them. What cannot be followed is
UNCLEAR, and is an error where a layer's features depend on it.
"""

from math import prod
from typing import Any, NamedTuple

CHANNEL, INPUT, UNCLEAR = "channel", "input", "unclear"  # a role; that of pixels is the number of their axis, from 0
_MOVING = {"rev", "sort", "gather", "scatter", "scatter-add", "dynamic_update_slice", "cumsum", "scan", "while", "cond"}


class Layout(NamedTuple):
    """`theirs.reshape(sizes).transpose(order)` has the elements of a feature axis in the order of ours."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]


class Atom:
    """A piece of an axis. One that was split, or found to be the same as another, consists of its parts."""

    def __init__(self, size: int, role: Any = None, whole: "Atom | None" = None):
        self.size, self.role, self.whole, self.parts = size, role, whole, []


Axes = list[list[Atom]]


class Called(NamedTuple):
    """A layer that a model calls: its kind, as in `mark`, but "transposed2" for a transposed convolution, or "other".
    `into` and `out` are the atoms of its feature axes, where they are known."""

    kind: str
    traced: bool = False  # or only its arrays are known
    swapped: bool = False  # transpose_kernel
    groups: int = 1
    into: list[Atom] | None = None
    out: list[Atom] | None = None


class _Seen(NamedTuple):
    features: dict[tuple[str, str], list[Atom]]
    through: dict[str, Axes]  # what entered the normalizations that have not returned yet


def mark(side: str, kind: str, layer: str) -> str:
    """The name of what enters ("in") or leaves ("out") a layer, whose kind is "dense", "embed", "conv2" for a
    convolution over two axes, or "norm-1" for a normalization of the features on axis -1."""
    return f"bnjax {side} {kind} {layer}"


def features(closed: Any, inputs: int) -> dict[tuple[str, str], list[Atom]]:
    """The atoms of the feature axis of what enters and leaves each marked layer, by ("in" or "out", layer).

    Args:
      closed: of the model.
      inputs: how many of its last arguments are inputs, and not variables.
    """
    seen = _Seen({}, {})
    arguments = [_fresh(v.aval.shape) for v in closed.jaxpr.invars]
    for argument in arguments[len(arguments) - inputs :]:
        for axis in argument[1:]:
            _give(axis, INPUT)
    _run(closed.jaxpr, arguments, seen)
    return {key: expand(atoms) for key, atoms in seen.features.items()}


def layout(atoms: list[Atom], channels_first: bool) -> Layout | None:
    """Where another library keeps the features that these atoms make up, or None where that cannot be known."""
    roles = [atom.role for atom in atoms]
    placed = [role for role in roles if role == CHANNEL or isinstance(role, int)]
    partly = 0 < len(placed) < len(roles)
    if channels_first and (UNCLEAR in roles or roles.count(INPUT) > 1 or partly):
        return None
    last = -1 if channels_first else float("inf")
    keys = [last if role == CHANNEL else role for role in placed]
    if len(placed) < len(roles) or keys == sorted(keys):
        return same(prod(atom.size for atom in atoms))
    theirs = sorted(range(len(keys)), key=keys.__getitem__)
    return Layout(tuple(atoms[i].size for i in theirs), tuple(theirs.index(i) for i in range(len(theirs))))


def same(size: int) -> Layout:
    """That of features which both number alike."""
    return Layout((size,), (0,))


def expand(atoms: list[Atom]) -> list[Atom]:
    """The smallest atoms, without those of one element."""
    leaves = [leaf for atom in atoms for leaf in (expand(atom.parts) if atom.parts else [atom])]
    return [leaf for leaf in leaves if leaf.size > 1]


def _give(atoms, role):
    """A role for atoms; INPUT gives way to any other, and two others contradict each other."""
    for atom in expand(atoms):
        roles = {atom.role, role} - {None}
        roles = roles - {INPUT} or roles
        atom.role = UNCLEAR if len(roles) > 1 else next(iter(roles), None)


def _join(first, second):
    """Two axes that an elementwise operation lays on each other have the same atoms."""
    first, second = expand(first), expand(second)
    if [atom.size for atom in first] == [atom.size for atom in second]:
        for a, b in zip(first, second, strict=True):
            if a is not b:
                _give([b], a.role)
                a.parts = [b]
    elif len(first) == 1 or len(second) == 1:
        one, many = (first, second) if len(first) == 1 else (second, first)
        if one[0].role is not None:
            _give(many, one[0].role)
        one[0].parts = many
    else:
        _give(first + second, UNCLEAR)


def _run(jaxpr, arguments, seen):
    """The axes of what a jaxpr gives, for those of its arguments."""
    axes: dict[Any, Axes] = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(v):
        fresh = _fresh(getattr(v.aval, "shape", ()))
        return fresh if hasattr(v, "val") else axes.setdefault(v, fresh)

    for eqn in jaxpr.eqns:
        operands, inner = [read(v) for v in eqn.invars], _inner(eqn)
        if inner is not None:
            results = _run(inner, operands, seen)
        else:
            results = [_result(eqn, operands, getattr(v.aval, "shape", ()), seen) for v in eqn.outvars]
        axes |= zip(eqn.outvars, results, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _inner(eqn):
    """The jaxpr that an equation calls with its own operands."""
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns") and _shapes(jaxpr.invars + jaxpr.outvars) == _shapes(eqn.invars + eqn.outvars):
            return jaxpr
    return None


def _shapes(variables):
    return [getattr(v.aval, "shape", ()) for v in variables]


def _result(eqn, operands, shape, seen) -> Axes:
    """The axes of one result."""
    name, params = eqn.primitive.name, eqn.params
    if name == "name" and params["name"].startswith("bnjax "):
        _, side, kind, layer = params["name"].split(" ", 3)
        return _marked(side, kind, layer, operands[0], seen)
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
    alike = [operand for operand, v in zip(operands, eqn.invars, strict=True) if v.aval.shape == shape]
    if alike and name not in _MOVING:
        for other in alike[1:]:
            for first, second in zip(alike[0], other, strict=True):
                _join(first, second)
        return alike[0]
    like = [operand for operand in operands if len(operand) == len(shape)]
    if not like:
        pictured = any(isinstance(a.role, int) for operand in operands for axis in operand for a in expand(axis))
        return _fresh(shape, UNCLEAR if pictured else None)
    return [_resized(sides, size, name in _MOVING) for *sides, size in zip(*like, shape, strict=True)]


def _fresh(shape, role=None) -> Axes:
    return [[Atom(size, role)] for size in shape]


def _resized(sides, size, moved):
    """An axis of a result whose elements were moved, dropped, or joined, by that axis of the operands."""
    if not moved and prod(atom.size for atom in expand(sides[0])) == size:
        return sides[0]
    result = [Atom(size)]
    for leaves in map(expand, sides):
        _give(result, UNCLEAR if len(leaves) > 1 else leaves[0].role if leaves else None)
    return result


def _reshaped(axes, shape) -> Axes:
    """Atoms dealt out to axes of other sizes, split where an axis ends inside of one."""
    atoms = expand([atom for axis in axes for atom in axis])
    dealt: Axes = []
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
        dealt.append(axis)
    return [_merged(axis) for axis in dealt]


def _merged(axis):
    """Pixels on one axis are tokens, and whether channels come before them is no longer PyTorch's convention. Pixels
    with a part of the channels, as in a pixel shuffle, are nothing that a layout describes."""
    pixels = [atom for atom in axis if isinstance(atom.role, int)]
    if len(axis) > 1 and len(pixels) == len(axis):
        return [Atom(prod(atom.size for atom in axis))]
    if pixels:
        for atom in axis:
            whole = atom
            while whole.whole is not None:
                whole = whole.whole
            if atom.role == CHANNEL and not set(expand([whole])) <= set(axis):
                _give([atom], UNCLEAR)
    return axis


def _marked(side, kind, layer, axes, seen) -> Axes:
    """What enters or leaves a layer. The features that it makes are the same atoms in each call."""
    axes = [*axes]
    if kind.startswith("norm"):
        if side == "out":
            return seen.through.pop(layer)
        seen.through[layer] = axes
        _join(axes[int(kind.removeprefix("norm"))], seen.features.setdefault((side, layer), axes[int(kind[4:])]))
        return axes
    if kind == "embed" and side == "in":
        return axes
    spatial = int(kind.removeprefix("conv")) if kind.startswith("conv") else 0
    pixels = list(enumerate(range(len(axes) - 1 - spatial, len(axes) - 1)))
    if side == "out":
        size = prod(atom.size for atom in expand(axes[-1]))
        axes[-1] = seen.features.setdefault((side, layer), [Atom(size, CHANNEL if spatial else None)])
        for role, axis in pixels:
            axes[axis] = [Atom(prod(atom.size for atom in expand(axes[axis])), role)]
        return axes
    for role, axis in pixels:
        _give(axes[axis], role)
    if spatial:
        _give(axes[-1], CHANNEL)
    _join(axes[-1], seen.features.setdefault((side, layer), axes[-1]))
    return axes
