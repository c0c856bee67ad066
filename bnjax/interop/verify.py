"""Outputs of a converted model compared with those of the original model, for `expected=` of `models.py`."""

import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.interop.arrays import as_array, plain
from bnjax.interop.keras_models import layers_by_path
from bnjax.interop.kernels import TORCH, Library
from bnjax.interop.match import Pairs
from bnjax.interop.options import compare, differences

Seen = dict[str, list[tuple[Any, Any]]]  # inputs and outputs of a layer's calls


class Other(NamedTuple):
    """The model of another library, run in evaluation."""

    outputs: list[np.ndarray]
    seen: Seen
    after: Mapping[str, Callable[..., Any]]  # what its layers apply to their output, and Flax's do not


def verify(
    call: str,
    library: Library,
    other: Any,
    pairs: Pairs,
    model: Any,
    variables: Mapping[str, Any],
    inputs: Any,
    kwargs: Mapping[str, Any],
    expected: Any,
) -> tuple[str, ...]:
    """Raise an error, with the first layer that differs, if a Flax model does not return `expected`, or without
    `expected`, if options of layers differ. Return in words which options were not compared.

    Two results agree if they differ by at most sqrt(eps) of the largest value. A result rounded n times at random has
    an error of sqrt(n) eps; the limit is n = 1 / eps, 8 million roundings in float32.

    Args:
      call: the function called, for errors.
      library: the other library.
      other: its model, or only its arrays.
      pairs: the layers that belong together, with the moves of their arrays.
      model, variables, inputs, kwargs: the Flax model, its converted variables and the arguments of its call.
      expected: outputs of the other model, in the structure of the Flax model's, or None.
    """
    if expected is None:
        return compare(call, library, other, pairs)
    if model is None:
        raise ValueError(f"{call}(model=None, expected=...): pass model= and inputs= too, or leave expected out.")
    from bnjax.interop.flax_calls import evaluate  # imported here, because only this needs Flax

    args = inputs if isinstance(inputs, tuple) else (inputs,)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((args, kwargs))):
        raise ValueError(f"{call}(expected=...): inputs has only shapes. Pass the inputs that gave these outputs.")
    modules = {pair.ours.name: pair.ours.called.module for pair, _ in pairs}
    output, after, seen = evaluate(model, variables, args, kwargs, modules)
    statistics = [jax.tree.leaves(tree.get("batch_stats", {})) for tree in (variables, after)]
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(*statistics, strict=True)):
        raise ValueError(
            f"{call}(expected=...): the call updates running statistics. Pass keyword arguments of an evaluation, such "
            "as train=False."
        )
    ours, theirs = ([as_array(leaf) for leaf in jax.tree.leaves(tree)] for tree in (output, expected))
    shapes = [[leaf.shape for leaf in side] for side in (ours, theirs)]
    if len(ours) != len(theirs):
        raise ValueError(f"{call}(expected=...): the model returns shapes {shapes[0]}, expected has {shapes[1]}.")
    limit = _limit([*ours, *theirs, *jax.tree.leaves((variables, args)), *modules.values()])
    gap = max(map(_gap, ours, theirs), default=0.0)
    if gap <= limit:
        return compare(call, library, other, pairs, verified=True)
    orders = [_order(a, b, limit) for a, b in zip(ours, theirs, strict=True)]
    if None not in orders:
        raise ValueError(
            f"{call}(expected=...): expected has the right values, with its axes in another order: shapes {shapes[1]} "
            f"for {shapes[0]}. Transpose its arrays by {orders}."
        )
    by = f"by {gap:.1e} of the largest value, and rounding explains {limit:.1e}" if np.isfinite(gap) else "entirely"
    where = _first(library, other, pairs, seen, args, ours, theirs, limit)
    differ, _ = differences(library, other, pairs)
    options = f" Options of layers differ: {'; '.join(differ[:5])}." if differ else ""
    raise ValueError(
        f"{call}(expected=...): the outputs, of shapes {shapes[0]}, differ from expected, of shapes {shapes[1]}, {by}. "
        f"{where}{options}"
    )


def _limit(sources):
    """The square root of the coarsest epsilon among the dtypes of arrays and modules."""
    dtypes = {jnp.dtype(dtype) for source in sources if (dtype := getattr(source, "dtype", None)) is not None}
    return float(max([jnp.finfo(d).eps for d in dtypes if jnp.issubdtype(d, jnp.floating)], default=0)) ** 0.5


def _gap(ours, theirs):
    """The largest difference relative to the largest value; infinite if shapes, positions of NaN and infinity, or
    integers differ."""
    if ours.shape != theirs.shape:
        return np.inf
    if not all(jnp.issubdtype(array.dtype, jnp.inexact) for array in (ours, theirs)):
        return 0.0 if np.array_equal(ours, theirs) else np.inf
    kind = complex if jnp.issubdtype(theirs.dtype, jnp.complexfloating) else np.float64
    ours, theirs = ours.astype(kind), theirs.astype(kind)
    finite = np.isfinite(theirs)
    if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True) or not np.isfinite(ours[finite]).all():
        return np.inf
    difference = np.max(np.abs(ours[finite] - theirs[finite]), initial=0)
    return float(difference / np.max(np.abs(theirs[finite]), initial=0)) if difference else 0.0


def _order(ours, theirs, limit):
    """The order of theirs' axes that makes them equal to ours, or None. The batch axis stays first."""
    orders = ((0, *rest) for rest in itertools.permutations(range(1, min(theirs.ndim, 6)))) if theirs.ndim else [()]
    fitting = (order for order in orders if ours.ndim == theirs.ndim and theirs.transpose(order).shape == ours.shape)
    return next((order for order in fitting if _gap(ours, theirs.transpose(order)) <= limit), None)


def _alike(ours, theirs, limit):
    """Whether two arrays have the same values, in any order, since libraries order the axes differently."""
    return ours.size == theirs.size and _gap(*(np.sort(array, axis=None) for array in (ours, theirs))) <= limit


def _all_alike(ours, theirs, limit):
    return len(ours) == len(theirs) and all(_alike(a, b, limit) for a, b in zip(ours, theirs, strict=True))


def _first(library, other, pairs, seen, args, ours, theirs, limit):
    """Which layer is the first that differs, in words."""
    if not hasattr(other, "named_modules") and not hasattr(other, "_flatten_layers"):
        return f"Pass the {library.name} model itself as {library.argument}= to learn which layer differs first."
    runs, why = [], ""
    for candidate in _layouts(args):
        try:
            runs.append((_torch if library is TORCH else _keras)(other, candidate))
        except Exception as error:  # whatever this raises, the user's error is another one
            why = f"{type(error).__name__}: {error}"
    if not runs:
        return f"The {library.name} model does not run with these inputs, so its layers were not compared ({why})."
    same = [run for run in runs if _all_alike(run.outputs, theirs, limit)]
    if not same:
        of_ours = any(_all_alike(run.outputs, ours, limit) for run in runs)
        what = "returns what the Flax model returns" if of_ours else "does not return expected either"
        return f"In evaluation, the {library.name} model {what}. Check from which model, mode and inputs expected is."
    names = {pair.ours.name: pair.theirs.name for pair, _ in pairs}
    before = "the inputs"
    for path, calls in seen.items():
        name = names[path]
        after = same[0].after.get(name, lambda y: y)
        for (x, y), (their_x, their_y) in zip(calls, same[0].seen.get(name, []), strict=False):
            if not _alike(as_array(after(y)), their_y, limit):
                layers = f"{library.name}'s {name!r} and {path!r}"
                if _alike(as_array(x), their_x, limit):
                    return f"The first layers that differ are {layers}; their inputs agree."
                return f"The first layers that differ are {layers}, and their inputs: look between {before} and them."
            before = repr(path)
    return f"All layers that could be compared agree: look behind {before}."


def _layouts(args):
    """The inputs with channels first, if they may be images, and as they are."""
    first = jax.tree.map(lambda x: np.moveaxis(as_array(x), -1, 1) if np.ndim(x) > 2 else x, args)
    return [first, args] if any(np.ndim(x) > 2 for x in jax.tree.leaves(args)) else [args]


def _torch(module, args) -> Other:
    torch, like = sys.modules["torch"], next(iter(module.parameters()))

    def tensor(x):
        made = torch.from_numpy(plain(as_array(x))).to(like.device)
        return made.to(like.dtype) if made.is_floating_point() else made

    seen: Seen = {}

    def hook(name):
        def record(module, given, y):
            if given and hasattr(given[0], "detach") and hasattr(y, "detach"):
                copies = [np.array(as_array(v)) for v in (given[0], y)]  # a later layer may work in place
                seen.setdefault(name, []).append((copies[0], copies[1]))

        return record

    training = [(part, part.training) for part in module.modules()]
    hooks = [part.register_forward_hook(hook(name)) for name, part in module.named_modules()]
    try:
        module.eval()
        with torch.no_grad():
            outputs = [as_array(y) for y in jax.tree.leaves(module(*jax.tree.map(tensor, args)))]
    finally:
        for handle in hooks:
            handle.remove()
        for part, mode in training:
            part.training = mode
    return Other(outputs, seen, {})


def _keras(model, args) -> Other:
    seen: Seen = {}
    layers = layers_by_path(model)

    def recorded(path, function):
        def call(*args, **kwargs):
            y = function(*args, **kwargs)
            if args and hasattr(y, "shape"):
                seen.setdefault(path, []).append((as_array(args[0]), as_array(y)))
            return y

        return call

    before = {path: vars(layer).get("call") for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            vars(layer)["call"] = recorded(path, layer.call)
        outputs = [as_array(y) for y in jax.tree.leaves(model(*args, training=False))]
    finally:
        for path, layer in layers.items():
            vars(layer).pop("call", None)
            if before[path] is not None:
                vars(layer)["call"] = before[path]
    activations = {path: getattr(layer, "activation", None) for path, layer in layers.items()}
    return Other(outputs, seen, {path: function for path, function in activations.items() if function is not None})
