"""Which layers of a model stand side by side, and a linear layer with batch normalization folded into it.

A model is traced in evaluation, and what its linear layers and norms take and give is named in the program
(`jax.ad_checkpoint.checkpoint_name`, the identity). Two layers are side by side if everything that the first gives is
taken by the second and by nothing else: then the second sees what the first gives, through reshapes that keep features
on the last axis and through changes of floating dtype, and removing the norm changes nothing elsewhere.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bnjax.deploy.affine import Affine, fold_into_next, fold_into_previous

Pair = tuple[str, str]
LOG = logging.getLogger("bnjax")

_TAG = "bnjax_fold"
_START = "the start"  # what makes the arguments of the model, and constants
# Calls of another program whose results are its own. Loops and branches are programs by themselves.
_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did: the pairs that were folded, and for each norm that was left the reason. Printed it is a list."""

    folded: list[Pair]
    unfolded: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"folded {len(self.folded)} of {len(self.folded) + len(self.unfolded)} norms"]
        lines += [f"  {first} + {second}" for first, second in self.folded]
        return "\n".join(lines + [f"  left {norm or 'the model itself'}: {why}" for norm, why in self.unfolded.items()])


def log(report: FoldReport) -> None:
    """Report what was found: a warning if something was left."""
    LOG.log(logging.WARNING if report.unfolded else logging.INFO, "%s", report)


class Seen(NamedTuple):
    """A layer of a model: its class, itself, the axis of a norm, the ranks of its inputs, and whether it evaluates."""

    kind: type
    module: Any
    axis: Any = -1
    ranks: frozenset[int] = frozenset()
    evaluates: bool = True

    def again(self, earlier: "Seen | None") -> "Seen":
        """After one more call."""
        if earlier is None:
            return self
        return self._replace(ranks=self.ranks | earlier.ranks, evaluates=self.evaluates and earlier.evaluates)


def watched(path: str, kernel: Any, call: Callable[[Any], Any], x: Any) -> Any:
    """`call(x)`, with the names of what the layer takes and gives, and of its kernel, None for a norm."""
    if kernel is not None:
        checkpoint_name(kernel, f"{_TAG}:of:{path}")
    return checkpoint_name(call(checkpoint_name(jnp.asarray(x), f"{_TAG}:in:{path}")), f"{_TAG}:out:{path}")


class Neighbours:
    """Which layers take what others give, from a model's program.

    Values are numbered: one that stands for another, through a reshape, leads to it by `_before`.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any):
        """Trace `function(*args, **kwargs)`; leaves of the arguments that have a shape and a dtype are traced."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

        def call(*arrays):
            filled = dict(zip(where, arrays, strict=True))
            args, kwargs = jax.tree.unflatten(tree, [filled.get(i, leaf) for i, leaf in enumerate(leaves)])
            return [leaf for leaf in jax.tree.leaves(function(*args, **kwargs)) if isinstance(leaf, Array)]

        # By the number of a value: its users, each with the value that stands for this one if the user is a reshape.
        self._uses: list[list[tuple[str, int | None]]] = []
        self._makers: list[str] = []
        self._before: dict[int, int] = {}
        self._takes: dict[str, list[int]] = {}
        self._gives: dict[str, list[int]] = {}
        self._kernels: dict[str, list[int]] = {}
        jaxpr = jax.make_jaxpr(call)(*(leaves[i] for i in where)).jaxpr
        for v in self._read(jaxpr, [self._new(_START) for _ in jaxpr.invars]):
            self._uses[v].append(("what the model returns", None))

    def _new(self, maker):
        self._uses.append([])
        self._makers.append(maker)
        return len(self._makers) - 1

    def _read(self, jaxpr, given):
        """Number the values of a program, and return those of its results; `given` are those of its arguments."""
        numbers = dict(zip(jaxpr.invars, given, strict=True))

        def numbered(variables):
            return [self._new(_START) if hasattr(v, "val") else numbers[v] for v in variables]

        numbers |= {v: self._new(_START) for v in jaxpr.constvars}
        for equation in jaxpr.eqns:
            inputs = numbered(equation.invars)
            programs = [p for p in map(_program, _flat(equation.params.values())) if p is not None]
            inlined = equation.primitive.name in _INLINED and len(programs) == 1
            if inlined and len(programs[0].invars) == len(inputs):
                results = self._read(programs[0], inputs)
            else:
                results = self._operation(equation, inputs)
                for program in programs:  # of a loop or a branch, whose last arguments are those of the operation
                    makers = [self._makers[self._origin(v)[0]] for v in inputs][-len(program.invars) :]
                    makers = [_START] * (len(program.invars) - len(makers)) + makers
                    for v in self._read(program, [self._new(maker) for maker in makers]):
                        self._uses[v].append(("what a loop returns", None))
            numbers |= dict(zip(equation.outvars, results, strict=True))
        return numbered(jaxpr.outvars)

    def _operation(self, equation, inputs):
        kind = equation.primitive.name
        tag, _, named = str(equation.params.get("name", "")).partition(":") if kind == "name" else ("", "", "")
        role, _, path = named.partition(":")
        layer = repr(path) if tag == _TAG else None
        results = [self._new(layer or kind) for _ in equation.outvars]
        if layer is not None:
            found = {"in": self._takes, "out": self._gives, "of": self._kernels}[role]
            found.setdefault(path, []).append(results[0] if role == "out" else inputs[0])
        elif _keeps_features(equation):
            self._before[results[0]] = inputs[0]
        for v in inputs:
            self._uses[v].append((layer or kind, results[0] if results and results[0] in self._before else None))
        return results

    def _origin(self, value):
        """Where a value comes from through reshapes, and whether it is used on the way elsewhere."""
        shared = False
        while True:
            shared |= len(self._uses[value]) > 1
            if value not in self._before:
                return value, shared
            value = self._before[value]

    def calls(self, path: str) -> bool:
        """Whether the model calls a layer."""
        return path in self._takes

    def owns(self, path: str) -> str | None:
        """Why a layer's kernel is not its own alone, or None. A call uses it twice: in its name, and in the product."""
        for kernel in (kernels := self._kernels[path]):
            if self._makers[self._origin(kernel)[0]] != _START:
                return f"the kernel of {path!r} is computed, as by weight normalization, which would undo the folding"
            if len(self._uses[kernel]) > 2 * kernels.count(kernel):
                return f"the kernel of {path!r} is used elsewhere too"
        return None

    def previous(self, path: str) -> str:
        """What makes the input of a layer: a layer's path in quotes, or an operation."""
        return " and ".join(dict.fromkeys(self._makers[self._origin(v)[0]] for v in self._takes.get(path, [])))

    def next(self, path: str) -> list[str]:
        """The layers that take what a layer gives, and nothing else."""
        made = set(self._gives.get(path, []))
        return [other for other, values in self._takes.items() if {self._origin(v)[0] for v in values} <= made]

    def users(self, path: str) -> str:
        """What uses what a layer gives: layers' paths in quotes, and operations other than reshapes."""
        found, values = [], list(self._gives.get(path, []))
        while values:
            for user, result in self._uses[values.pop()]:
                if result is None:
                    found.append(user)
                else:
                    values.append(result)
        return " and ".join(dict.fromkeys(found))

    def between(self, first: str, second: str) -> str | None:
        """Why two layers are not side by side, or None."""
        gives = self._gives.get(first, [])
        origins = [self._origin(v) for v in self._takes.get(second, [])]
        if not origins or any(v not in gives for v, _ in origins):
            return (
                f"what {second!r} is called with is not what {first!r} gives. Leave out pairs with an activation, a "
                "reshaping of the features or another layer between"
            )
        if sorted(v for v, _ in origins) != sorted(gives) or any(shared for _, shared in origins):
            return f"what {first!r} gives is used by {self.users(first)}, not by {second!r} alone"
        return None


def _flat(values):
    for value in values:
        yield from _flat(value) if isinstance(value, list | tuple) else (value,)


def _program(value):
    """The jaxpr that a parameter of an operation is, if it is one."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def _keeps_features(equation):
    """Whether an operation gives what it gets, the features on the last axis, but for its other axes and its dtype."""
    kind = equation.primitive.name
    if kind in ("name", "copy", "copy_p", "sharding_constraint"):
        return True
    if kind not in ("reshape", "squeeze", "broadcast_in_dim", "convert_element_type"):
        return False
    x, y = equation.invars[0].aval, equation.outvars[0].aval
    if kind == "convert_element_type":
        return jnp.issubdtype(x.dtype, jnp.inexact) and jnp.issubdtype(y.dtype, jnp.inexact)
    last = kind != "broadcast_in_dim" or equation.params["broadcast_dimensions"][-1:] == (y.ndim - 1,)
    return last and x.ndim > 0 and y.ndim > 0 and x.size == y.size and x.shape[-1] == y.shape[-1]


def as_pairs(call: str, args: tuple[Any, ...], pairs: Any) -> tuple[list[Pair] | None, tuple[Any, ...]]:
    """The pairs, and the arguments of the model. The pairs may lead the arguments, as names and nothing else."""
    if pairs is None and args and (args[0] is None or _names(args[0])):
        pairs, args = args[0], args[1:]
    if pairs is None:
        return None, args
    pairs = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ValueError(
                f"{call}(pairs={pairs!r}): expected a list of pairs of names, got {pair!r} in it. "
                'Pass [("Conv_0", "BatchNorm_0")], or leave pairs out to have them found.'
            )
    return [(first, second) for first, second in pairs], args


def _names(value):
    """Whether a value is a container of names alone, or an empty one."""
    if isinstance(value, Mapping):
        value = list(value.items())
    return isinstance(value, list | tuple | set) and all(isinstance(v, str) or _names(v) for v in value)


def fold_pairs(
    pairs: list[Pair] | None,
    seen: Mapping[str, Seen],
    neighbours: Neighbours | None,
    kinds: tuple[tuple[type, ...], tuple[type, ...]],
    fold_one: Callable[[str, str, str, bool], None],
) -> FoldReport:
    """Fold the pairs, or those that are found; `fold_one(call, linear, norm, previous)` folds one, or raises."""
    types = {name: layer.kind for name, layer in seen.items()}
    if pairs is None:
        assert neighbours is not None
        return _fold_found(seen, neighbours, kinds, fold_one)
    folded: dict[str, Pair] = {}
    used = set()
    for pair in pairs:
        call = f"fold_model(pairs=[{pair!r}])"
        linear, norm, previous = _roles(call, pair, types, *kinds)
        if norm in folded or (linear, previous) in used:
            twice = norm if norm in folded else linear
            raise ValueError(f"{call}: {twice!r} is in two pairs. It can be folded into one layer.")
        _check(call, pair, linear, norm, seen[norm], neighbours)
        fold_one(call, linear, norm, previous)
        folded[norm] = pair
        used.add((linear, previous))
    return FoldReport(list(folded.values()))


def _fold_found(seen, neighbours, kinds, fold_one):
    """Every norm goes into the linear layer before it, or else into the one after it."""
    folded, unfolded = [], {}
    linears = [name for name, layer in seen.items() if layer.kind in kinds[0]]
    for norm, layer in seen.items():
        if layer.kind not in kinds[1]:
            continue
        if not neighbours.calls(norm):
            unfolded[norm] = "the model does not call it"
            continue
        made, taken = neighbours.previous(norm), neighbours.next(norm)
        before, after = ([n for n in linears if repr(n) == made], [n for n in linears if n in taken])
        reasons = [] if before else [f"its input is made by {made}"]
        for linear in before + after:
            previous = linear in before
            pair = (linear, norm) if previous else (norm, linear)
            try:
                _check("fold_model", pair, linear, norm, layer, neighbours)
                fold_one("fold_model", linear, norm, previous)
            except (TypeError, ValueError) as error:
                reasons.append(str(error).partition(": ")[2].rstrip("."))
                continue
            folded.append(pair)
            break
        else:
            reasons += [] if after else [f"what it gives goes into {neighbours.users(norm)}"]
            unfolded[norm] = "; ".join(dict.fromkeys(reasons))
    return FoldReport(folded, unfolded)


def _check(call, pair, linear, norm, layer, neighbours):
    """The two stand side by side, as far as that was traced, and the norm is one affine map of the last axis."""
    if neighbours is not None and (why := neighbours.between(*pair) or neighbours.owns(linear)):
        raise ValueError(f"{call}: {why}.")
    if not layer.evaluates:
        raise ValueError(
            f"{call}: {norm!r} normalizes by its batch in this trace. Pass what puts the model in evaluation, such as "
            "train=False."
        )
    axes = set(layer.axis) if isinstance(layer.axis, Iterable) else {layer.axis}
    last = all({a % rank for a in axes} == {rank - 1} for rank in layer.ranks) if layer.ranks else axes == {-1}
    if not last:
        unknown = "" if layer.ranks else ", or an example input, by which the model is traced"
        raise ValueError(
            f"{call}: {norm!r} has axis={layer.axis}. Folding needs the features on the last axis, -1{unknown}."
        )


def _roles(
    call: str, names: Pair, types: Mapping[str, type], linear: tuple[type, ...], norm: tuple[type, ...]
) -> tuple[str, str, bool]:
    """The linear layer of a pair, the batch normalization, and whether the linear one is the previous.

    By type, not by class: a subclass may compute what no folding knows.
    """
    first, second = names
    for name in names:
        if name not in types:
            known = sorted(n for n, t in types.items() if t in linear + norm)
            raise ValueError(f"{call}: the model calls no {name!r}. Layers that can be named: {known}.")
    if types[first] in linear and types[second] in norm:
        return first, second, True
    if types[first] in norm and types[second] in linear:
        return second, first, False
    raise ValueError(
        f"{call}: {types[first].__name__} and {types[second].__name__}. Expected one of "
        f"{[t.__name__ for t in linear]} and one of {sorted({t.__name__ for t in norm})}, and no subclass of them."
    )


def fold_linear(
    call: str, linear: Any, kernel: Array, bias: Array | None, affine: Affine, previous: bool
) -> tuple[Array, Array]:
    """Kernel and bias of one of Flax's linear layers with the batch normalization after it, or before it, folded in.

    Stacks of layers, with leading axes in all their variables, are folded one by one.
    """
    transposed = hasattr(linear, "transpose_kernel")
    swapped = transposed and linear.transpose_kernel
    if previous:
        function = partial(fold_into_previous, axis=-2 if swapped else -1)
    else:
        if _sees_zeros(linear, transposed) or getattr(linear, "mask", None) is not None:
            raise ValueError(
                f"{call}: folding into the layer after batch normalization is not exact where zeros are padded or "
                "dilated into its input, or its kernel is masked. Leave this pair out."
            )
        function = partial(fold_into_next, groups=getattr(linear, "feature_group_count", 1))
        if swapped:
            kernel = jnp.swapaxes(kernel, -1, -2)
    for _ in range(affine.scale.ndim - 1):
        function = jax.vmap(function)
    try:
        kernel, bias = function(kernel, bias, affine)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}: {error}") from error
    return (jnp.swapaxes(kernel, -1, -2) if swapped and not previous else kernel), bias


def _sees_zeros(linear, transposed):
    """Whether zeros that are not its input's enter a convolution."""
    if not hasattr(linear, "padding"):
        return False
    size = [linear.kernel_size] if isinstance(linear.kernel_size, int) else linear.kernel_size
    spread = jax.tree.leaves(linear.strides if transposed else linear.input_dilation)
    if any(step != 1 for step in spread):
        return True
    if not isinstance(linear.padding, str):
        return any(jax.tree.leaves(linear.padding))
    inside = linear.padding in ("VALID", "CIRCULAR", "REFLECT") and not transposed
    return not inside and any(places != 1 for places in size)
