"""The layers of a Linen or NNX model in the order of their calls, for `models.py`. This module needs Flax."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from bnjax.core.jax_internals import is_traced
from bnjax.interop.layout import Called, features, padded
from bnjax.traced.calls import record_nnx, recorded_linen
from bnjax.traced.program import is_array, read

_TRANSPOSED = (nn.ConvTranspose, nnx.ConvTranspose)


def calls(
    model: Any, variables: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]], args: Any, kwargs: Any
) -> dict[str, Called]:
    """The layers that a model calls, by path, in the order of their first calls. The model is traced, not run.

    Args:
      model: a Linen or NNX module.
      variables: variables of a Linen module; they are ignored for NNX.
      shapes: shapes of the layers' arrays, by path and name.
      args, kwargs: arguments of the model's call.
    """
    called: dict[str, Called] = {}

    def record(call):
        path, layer, x = call.path, call.layer, call.x
        if path not in shapes:
            return call()
        kind = _kind(layer, shapes[path], x)
        swapped, groups = getattr(layer, "transpose_kernel", False), getattr(layer, "feature_group_count", 1)
        known = called.setdefault(path, Called(kind, True, swapped, groups, module=layer))
        if hasattr(x, "shape"):
            called[path] = known._replace(shapes=(*known.shapes, tuple(x.shape)))
        # `attend` of an embedding has features as input, not indices
        return call.marked() if known.kind == kind != "other" and call.method == "__call__" else call()

    def run(variables, args, kwargs):
        whole = model if isinstance(model, nn.Module) else nnx.merge(graph, variables, copy=True)
        return _run(whole, variables, args, kwargs, shapes, record)

    if not isinstance(model, nn.Module):
        graph, variables = nnx.split(model)
    program = read(run, variables, args, kwargs)
    kinds = {path: call.kind for path, call in called.items()}
    seen = features(program, sum(map(is_array, jax.tree.leaves((args, kwargs)))), kinds)
    pads = padded(program)
    return {
        path: call._replace(into=seen.get(("in", path)), out=seen.get(("out", path)), padded=path in pads)
        for path, call in called.items()
    }


Seen = dict[str, list[tuple[Any, Any]]]


def evaluate(
    model: Any, variables: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any], paths: Collection[str] = ()
) -> tuple[Any, Mapping[str, Any], Seen]:
    """A model's output, its variables after the call, and by path the inputs and outputs of the layers in `paths`.

    An NNX model runs in evaluation, a Linen model as its arguments say. Layers inside `jit`, `scan` and the like are
    left out.
    """
    seen: Seen = {}

    def record(call):
        y = call()
        known = call.path in paths and call.method == "__call__" and call.x is not None
        if known and hasattr(y, "shape") and not is_traced(y):
            seen.setdefault(call.path, []).append((call.x, y))
        return y

    if not isinstance(model, nn.Module):
        model = nnx.merge(*nnx.split(model), copy=True)
        nnx.update(model, *(variables[name] for name in ("params", "batch_stats") if name in variables))
        model.eval()
    with jax.default_matmul_precision("highest"):
        output, updates = _run(model, variables, args, kwargs, paths, record)
    return output, {**variables, **updates}, seen


def _run(model, variables, args, kwargs, paths, record):
    """A model's output, and the variables that a Linen model changes. An NNX model must not be used afterwards."""
    if isinstance(model, nn.Module):
        options: dict[str, Any] = {**kwargs, "mutable": nn.DenyList("params")}
        with recorded_linen(record):
            return model.apply(variables, *args, **options)
    record_nnx(model, paths, record)
    return model(*args, **kwargs), {}


def _kind(module, shapes, x):
    """The kind of a layer, as in `Called`."""
    kernel = shapes.get("kernel")
    if not hasattr(x, "shape"):
        return "other"
    if kernel is not None and set(shapes) <= {"kernel", "bias"}:
        if isinstance(module, (nn.Conv, nnx.Conv, *_TRANSPOSED)):
            return f"{'transposed' if isinstance(module, _TRANSPOSED) else 'conv'}{len(kernel) - 2}"
        return "dense" if len(kernel) == 2 and x.shape[-1:] == kernel[:1] else "other"
    if set(shapes) == {"embedding"} and len(shapes["embedding"]) == 2:
        return "embed"
    if {"scale", "mean"} & set(shapes) and all(len(shape) == 1 for shape in shapes.values()):
        axes = np.ravel(getattr(module, "axis", getattr(module, "feature_axes", -1)))
        return f"norm{axes[0] % x.ndim - x.ndim if axes.size == 1 else -1}"
    return "other"
