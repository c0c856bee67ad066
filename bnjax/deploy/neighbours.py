"""Adjacent layers of a model, and a linear layer with batch normalization folded into it.

A model is traced in evaluation. The trace names the inputs and the outputs of its linear layers and norms, by
`jax.ad_checkpoint.checkpoint_name`, which computes the identity. Two layers are adjacent if the outputs of the first
are the inputs of the second and have no other use. Between them there may be reshapes that keep the features on the
last axis, and changes of floating dtype. Folding adjacent layers changes no other value of the model.
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
_START = "the start"  # the maker of the model's arguments and of constants
# Operations that call another program once, and return its results. Loops and branches are followed separately.
_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


@dataclass(frozen=True)
class FoldReport:
    """The pairs that were folded, and for each other norm the reason why it was not. It prints as a list."""

    folded: list[Pair]
    unfolded: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"folded {len(self.folded)} of {len(self.folded) + len(self.unfolded)} norms"]
        lines += [f"  {first} + {second}" for first, second in self.folded]
        return "\n".join(lines + [f"  left {norm or 'the model itself'}: {why}" for norm, why in self.unfolded.items()])


def log(report: FoldReport) -> None:
    """Log the report, as a warning if a norm was not folded."""
    LOG.log(logging.WARNING if report.unfolded else logging.INFO, "%s", report)


class TracedLayer(NamedTuple):
    """A layer that a model calls."""

    kind: type
    module: Any
    axis: Any = -1  # feature axis of a norm
    ranks: frozenset[int] = frozenset()  # of the inputs
    evaluates: bool = True  # whether every call uses the running statistics
    adapts: bool = False  # whether the batch enters the statistics in evaluation too

    def merged(self, earlier: "TracedLayer | None") -> "TracedLayer":
        """This call together with the earlier calls of the same layer."""
        if earlier is None:
            return self
        return self._replace(ranks=self.ranks | earlier.ranks, evaluates=self.evaluates and earlier.evaluates)


def named_call(path: str, kernel: Any, call: Callable[[Any], Any], x: Any) -> Any:
    """`call(x)`, with names for the layer's input, its output, and its kernel (None for a norm)."""
    if kernel is not None:
        checkpoint_name(kernel, f"{_TAG}:of:{path}")
    return checkpoint_name(call(checkpoint_name(jnp.asarray(x), f"{_TAG}:in:{path}")), f"{_TAG}:out:{path}")


class Neighbours:
    """Which outputs of layers are inputs of other layers, according to a model's jaxpr.

    The values of the program are numbered. `_before` leads from the result of a reshape to its operand.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any):
        """Trace `function(*args, **kwargs)`. Leaves without a shape and a dtype, such as a bool, stay static."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

        def call(*arrays):
            filled = dict(zip(where, arrays, strict=True))
            args, kwargs = jax.tree.unflatten(tree, [filled.get(i, leaf) for i, leaf in enumerate(leaves)])
            return [leaf for leaf in jax.tree.leaves(function(*args, **kwargs)) if isinstance(leaf, Array)]

        # By the number of a value: its users. A user that is a reshape comes with the number of its result.
        self._uses: list[list[tuple[str, int | None]]] = []
        self._makers: list[str] = []
        self._before: dict[int, int] = {}
        # By the path of a layer: the numbers of its inputs, outputs and kernels, one per call.
        self._inputs: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}
        self._kernels: dict[str, list[int]] = {}
        jaxpr = jax.make_jaxpr(call)(*(leaves[i] for i in where)).jaxpr
        for v in self._read(jaxpr, [self._new(_START) for _ in jaxpr.invars]):
            self._uses[v].append(("the model's result", None))

    def _new(self, maker):
        self._uses.append([])
        self._makers.append(maker)
        return len(self._makers) - 1

    def _read(self, jaxpr, given):
        """Number the values of a program whose arguments have the numbers `given`; return those of its results."""
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
                for program in programs:  # a loop or a branch, whose last arguments are the operation's last operands
                    makers = [self._makers[self._origin(v)[0]] for v in inputs][-len(program.invars) :]
                    makers = [_START] * (len(program.invars) - len(makers)) + makers
                    for v in self._read(program, [self._new(maker) for maker in makers]):
                        self._uses[v].append(("the result of a loop", None))
            numbers |= dict(zip(equation.outvars, results, strict=True))
        return numbered(jaxpr.outvars)

    def _operation(self, equation, inputs):
        kind = equation.primitive.name
        tag, _, named = str(equation.params.get("name", "")).partition(":") if kind == "name" else ("", "", "")
        role, _, path = named.partition(":")
        layer = repr(path) if tag == _TAG else None
        results = [self._new(layer or kind) for _ in equation.outvars]
        if layer is not None:
            found = {"in": self._inputs, "out": self._outputs, "of": self._kernels}[role]
            found.setdefault(path, []).append(results[0] if role == "out" else inputs[0])
        elif _keeps_features(equation):
            self._before[results[0]] = inputs[0]
        for v in inputs:
            self._uses[v].append((layer or kind, results[0] if results and results[0] in self._before else None))
        return results

    def _origin(self, value):
        """The value before all reshapes, and whether it or a reshape of it has another use."""
        shared = False
        while True:
            shared |= len(self._uses[value]) > 1
            if value not in self._before:
                return value, shared
            value = self._before[value]

    def calls(self, path: str) -> bool:
        """Whether the model calls a layer."""
        return path in self._inputs

    def kernel_conflict(self, path: str) -> str | None:
        """Why a layer's kernel must not change, or None. A call uses the kernel twice: in its name and the product."""
        for kernel in (kernels := self._kernels[path]):
            if self._makers[self._origin(kernel)[0]] != _START:
                return f"the kernel of {path!r} is computed, as by weight normalization, which would undo the folding"
            if len(self._uses[kernel]) > 2 * kernels.count(kernel):
                return f"the kernel of {path!r} is used elsewhere too"
        return None

    def previous(self, path: str) -> str:
        """The maker of a layer's input: a layer's path in quotes, or an operation."""
        return " and ".join(dict.fromkeys(self._makers[self._origin(v)[0]] for v in self._inputs.get(path, [])))

    def next(self, path: str) -> list[str]:
        """The layers whose inputs are all outputs of this layer."""
        made = set(self._outputs.get(path, []))
        return [other for other, values in self._inputs.items() if {self._origin(v)[0] for v in values} <= made]

    def users(self, path: str) -> str:
        """The users of a layer's output: layers' paths in quotes, and operations other than reshapes."""
        found, values = [], list(self._outputs.get(path, []))
        while values:
            for user, result in self._uses[values.pop()]:
                if result is None:
                    found.append(user)
                else:
                    values.append(result)
        return " and ".join(dict.fromkeys(found))

    def between(self, first: str, second: str) -> str | None:
        """Why two layers are not adjacent, or None."""
        outputs = self._outputs.get(first, [])
        origins = [self._origin(v) for v in self._inputs.get(second, [])]
        if not origins or any(v not in outputs for v, _ in origins):
            return (
                f"the input of {second!r} is not the output of {first!r}. Leave out pairs with an activation, a "
                "reshape of the features or another layer between them"
            )
        if sorted(v for v, _ in origins) != sorted(outputs) or any(shared for _, shared in origins):
            return f"the output of {first!r} is used by {self.users(first)}, not by {second!r} alone"
        return None


def _flat(values):
    for value in values:
        yield from _flat(value) if isinstance(value, list | tuple) else (value,)


def _program(value):
    """The jaxpr in a parameter of an operation, or None if the parameter is something else."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def _keeps_features(equation):
    """Whether an operation changes only the axes before the last, or the floating dtype."""
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
    """The pairs, and the arguments of the model. The pairs may be the first argument, recognized as names alone."""
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
    """Whether a value is a container that holds nothing but names."""
    if isinstance(value, Mapping):
        value = list(value.items())
    return isinstance(value, list | tuple | set) and all(isinstance(v, str) or _names(v) for v in value)


def fold_pairs(
    pairs: list[Pair] | None,
    layers: Mapping[str, TracedLayer],
    neighbours: Neighbours | None,
    kinds: tuple[tuple[type, ...], tuple[type, ...]],
    fold_one: Callable[[str, str, str, bool], None],
) -> FoldReport:
    """Fold the given pairs, or all adjacent ones.

    Args:
      pairs: (linear, norm) or (norm, linear), or None for all that are adjacent.
      layers: the model's layers by path.
      neighbours: the trace of the model; None trusts the pairs.
      kinds: the classes of linear layers, and of norms.
      fold_one: `fold_one(call, linear, norm, previous)` folds one pair, or raises; `call` begins its errors.
    """
    types = {name: layer.kind for name, layer in layers.items()}
    if pairs is None:
        assert neighbours is not None
        return _fold_found(layers, neighbours, kinds, fold_one)
    folded: dict[str, Pair] = {}
    used = set()
    for pair in pairs:
        call = f"fold_model(pairs=[{pair!r}])"
        linear, norm, previous = _roles(call, pair, types, *kinds)
        if norm in folded or (linear, previous) in used:
            twice = norm if norm in folded else linear
            raise ValueError(f"{call}: {twice!r} is in two pairs. It can be folded into one layer.")
        _check(call, pair, linear, norm, layers[norm], neighbours)
        fold_one(call, linear, norm, previous)
        folded[norm] = pair
        used.add((linear, previous))
    return FoldReport(list(folded.values()))


def _fold_found(layers, neighbours, kinds, fold_one):
    """Fold every norm into the linear layer before it, or else into the one after it."""
    folded, unfolded = [], {}
    linears = [name for name, layer in layers.items() if layer.kind in kinds[0]]
    for norm, layer in layers.items():
        if layer.kind not in kinds[1]:
            continue
        if not neighbours.calls(norm):
            unfolded[norm] = "the model does not call it"
            continue
        maker, users = neighbours.previous(norm), neighbours.next(norm)
        before, after = ([n for n in linears if repr(n) == maker], [n for n in linears if n in users])
        reasons = [] if before else [f"its input is the output of {maker}"]
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
            reasons += [] if after else [f"its output is used by {neighbours.users(norm)}"]
            unfolded[norm] = "; ".join(dict.fromkeys(reasons))
    return FoldReport(folded, unfolded)


def _check(call, pair, linear, norm, layer, neighbours):
    """Check that the two layers are adjacent, if the model was traced, and the norm an affine map of the last axis."""
    if neighbours is not None and (why := neighbours.between(*pair) or neighbours.kernel_conflict(linear)):
        raise ValueError(f"{call}: {why}.")
    if layer.adapts:
        raise ValueError(
            f"{call}: {norm!r} adapts to each batch, so that it is not one affine map in evaluation. Serve it "
            "unfolded, or turn it into a plain layer first: convert(model, to=BatchNorm)."
        )
    if not layer.evaluates:
        raise ValueError(
            f"{call}: {norm!r} normalizes by its batch in this trace. Pass the argument that puts the model in "
            "evaluation, such as train=False."
        )
    axes = set(layer.axis) if isinstance(layer.axis, Iterable) else {layer.axis}
    last = all({a % rank for a in axes} == {rank - 1} for rank in layer.ranks) if layer.ranks else axes == {-1}
    if not last:
        unknown = "" if layer.ranks else ", or an example input, with which the model is traced"
        raise ValueError(
            f"{call}: {norm!r} has axis={layer.axis}. Folding needs the features on the last axis, -1{unknown}."
        )


def _roles(
    call: str, names: Pair, types: Mapping[str, type], linear: tuple[type, ...], norm: tuple[type, ...]
) -> tuple[str, str, bool]:
    """The linear layer and the norm of a pair, and whether the linear layer precedes the norm.

    Subclasses are rejected, because they may compute something else.
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
    """Kernel and bias of a Flax linear layer, with the normalization after it (`previous`) or before it folded in.

    In a stack of layers, whose variables all have leading axes, each layer is folded separately.
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
    """Whether a convolution pads or dilates its input with zeros."""
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
