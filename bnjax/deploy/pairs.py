"""Pairs of adjacent layers, and batch normalization folded into the linear layer of each."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.deploy.affine import Affine, fold_into_next, fold_into_previous
from bnjax.deploy.neighbours import Neighbours

Pair = tuple[str, str]
LOG = logging.getLogger("bnjax")


class NotFoldedError(ValueError):
    """Two layers that cannot be folded; the message begins with the call."""


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
    adapts: bool = False  # whether the batch enters the statistics in evaluation too
    calls: frozenset[tuple[int, bool]] = frozenset()  # of a norm: the input's rank, whether running statistics are used


def check_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that there are arguments to trace a model with, and that the first is not a list of pairs."""
    if not args and not kwargs:
        raise ValueError("fold_model(...): no arguments of the model. Pass an example input, with which it is traced.")
    first = jax.tree.leaves(args[:1])
    if first and all(isinstance(leaf, str) for leaf in first) and not isinstance(args[0], str):
        raise ValueError(
            f"fold_model(..., {args[0]!r}): expected the first argument of the model, got only names. Pass pairs by "
            f"keyword: fold_model(..., pairs={args[0]!r})."
        )


def fold_pairs(
    pairs: Any,
    layers: Mapping[str, TracedLayer],
    neighbours: Neighbours | None,
    kinds: tuple[tuple[type, ...], tuple[type, ...]],
    fold_one: Callable[[str, str, str, bool], None],
    others: Mapping[str, str],
) -> FoldReport:
    """Fold the given pairs, or all adjacent ones.

    Args:
      pairs: as in `fold_model`: pairs of names in a list or a dictionary, or None for all that are adjacent.
      layers: the model's layers by path.
      neighbours: the trace of the model; None trusts the pairs.
      kinds: the classes of linear layers, and of norms.
      fold_one: `fold_one(call, linear, norm, previous)` folds one pair, or raises; `call` begins its errors.
      others: why other layers with running statistics are not folded, by path, for the report on all pairs.
    """
    types = {name: layer.kind for name, layer in layers.items()}
    if pairs is None:
        report = _fold_found(layers, neighbours, kinds, fold_one)
        return FoldReport(report.folded, {**report.unfolded, **others})
    pairs = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ValueError(
                f"fold_model(pairs={pairs!r}): expected a list of pairs of names, got {pair!r} in it. "
                'Pass [("Conv_0", "BatchNorm_0")], or leave pairs out to have them found.'
            )
    folded: dict[str, Pair] = {}
    used = set()
    for pair in map(tuple, pairs):
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


EVALUATE = "Pass the argument that puts the model in evaluation, such as train=False."


def evaluates(args: tuple[Any, ...], kwargs: Mapping[str, Any], norm: Any) -> bool:
    """Whether a Linen or NNX norm uses the running statistics in a call with these arguments.

    It does not if neither the arguments nor the norm determine it. Flax refuses such a call.
    """
    average = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    return bool(norm.use_running_average if average is None else average) or getattr(norm, "frozen", False)


def left(kind: type, norms: tuple[type, ...]) -> str:
    """Why a layer of another kind is not folded, although it has running statistics."""
    return f"{kind.__name__} is none of {sorted({t.__name__ for t in norms})}, and may compute something else"


def in_training(call: str, norm: str) -> NotFoldedError:
    """The error for a norm that normalizes by its batch while it is folded."""
    return NotFoldedError(f"{call}: {norm!r} normalizes by its batch in this trace. {EVALUATE}")


def _fold_found(layers, neighbours, kinds, fold_one):
    """Fold every norm into the linear layer before it, or else into the one after it."""
    folded, unfolded = [], {}
    called = [name for name, layer in layers.items() if layer.kind in kinds[1] and neighbours.calls(name)]
    if neighbours.switched and called and not any(evaluates for name in called for _, evaluates in layers[name].calls):
        raise ValueError(
            f"fold_model(...): all norms of the model normalize by their batch in this trace, {called[0]!r} for one. "
            f"{EVALUATE}"
        )
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
            except NotFoldedError as error:
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
        raise NotFoldedError(f"{call}: {why}.")
    if layer.adapts:
        raise NotFoldedError(
            f"{call}: {norm!r} adapts to each batch, so it is not a fixed affine map in evaluation. Serve it "
            "unfolded, or turn it into a plain layer first: convert(model, to=BatchNorm)."
        )
    if not all(evaluates for _, evaluates in layer.calls):
        raise in_training(call, norm)
    axes = set(layer.axis) if isinstance(layer.axis, Iterable) else {layer.axis}
    last = all({a % rank for a in axes} == {rank - 1} for rank, _ in layer.calls) if layer.calls else axes == {-1}
    if not last:
        unknown = "" if layer.calls else ", or an example input, with which the model is traced"
        raise NotFoldedError(
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
            raise NotFoldedError(
                f"{call}: folding into the layer after batch normalization is not exact if padding or dilation adds "
                "zeros to its input, or if its kernel is masked. Leave this pair out."
            )
        function = partial(fold_into_next, groups=getattr(linear, "feature_group_count", 1))
        if swapped:
            kernel = jnp.swapaxes(kernel, -1, -2)
    for _ in range(affine.scale.ndim - 1):
        function = jax.vmap(function)
    try:
        kernel, bias = function(kernel, bias, affine)
    except (TypeError, ValueError) as error:
        raise NotFoldedError(f"{call}: {error}") from error
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
