"""The layers of a Linen or NNX model in the order of their calls, for `models.py`. This module needs Flax."""

from collections.abc import Collection, Mapping
from functools import wraps
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

from bnjax.interop.layout import Called, features, mark, padded

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
    called: dict[str, tuple[str, Any]] = {}
    entered: dict[str, list[tuple[int, ...]]] = {}
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def record(path, module, function, args, kwargs, marked=True):
        if path not in shapes:
            return function(*args, **kwargs)
        given = [*args, *kwargs.values()]
        kind = _kind(module, shapes[path], given[0] if given else None)
        called.setdefault(path, (kind, module))
        entered.setdefault(path, []).extend(tuple(v.shape) for v in given[:1] if hasattr(v, "shape"))
        if kind == "other" or not marked:
            return function(*args, **kwargs)
        place = kind.replace("transposed", "conv")
        given[0] = checkpoint_name(given[0], mark("in", place, path))
        y = function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
        return checkpoint_name(y, mark("out", place, path))

    def run(variables, arrays):
        given = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            given[i] = array
        args, kwargs = jax.tree.unflatten(structure, given)
        if isinstance(model, nn.Module):
            options: dict[str, Any] = {"mutable": nn.DenyList("params"), **kwargs}
            with nn.intercept_methods(_linen(record)):
                model.apply(variables, *args, **options)
            return
        whole = nnx.merge(graph, variables, copy=True)
        _record(whole, shapes, record)
        whole(*args, **kwargs)

    if not isinstance(model, nn.Module):
        graph, variables = nnx.split(model)
    jaxpr = jax.make_jaxpr(run)(variables, [leaves[i] for i in traced])
    seen, pads = features(jaxpr, len(traced)), padded(jaxpr.jaxpr)
    return {
        path: Called(
            kind,
            True,
            getattr(module, "transpose_kernel", False),
            getattr(module, "feature_group_count", 1),
            seen.get(("in", path)),
            seen.get(("out", path)),
            module,
            tuple(entered[path]),
            path in pads,
        )
        for path, (kind, module) in called.items()
    }


Seen = dict[str, list[tuple[Any, Any]]]


def evaluate(
    model: Any, variables: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any], paths: Collection[str] = ()
) -> tuple[Any, Mapping[str, Any], Seen]:
    """A model's output, its variables after the call, and by path the inputs and outputs of the layers in `paths`.

    An NNX model runs in evaluation, a Linen model as its arguments say. Layers inside of `jit`, `scan` and the like are
    left out.
    """
    seen: Seen = {}

    def record(path, module, function, args, kwargs, marked=True):
        y = function(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if path in paths and marked and given and hasattr(y, "shape") and not isinstance(y, Tracer):
            seen.setdefault(path, []).append((given[0], y))
        return y

    with jax.default_matmul_precision("highest"):
        if isinstance(model, nn.Module):
            options: dict[str, Any] = {**kwargs, "mutable": nn.DenyList("params")}
            with nn.intercept_methods(_linen(record)):
                output, updates = model.apply(variables, *args, **options)
            return output, {**variables, **updates}, seen
        whole = nnx.merge(*nnx.split(model), copy=True)
        nnx.update(whole, *(variables[name] for name in ("params", "batch_stats") if name in variables))
        whole.eval()
        _record(whole, paths, record)
        return whole(*args, **kwargs), variables, seen


def _record(model, paths, record):
    """Make an NNX model's layers in `paths` call `record`."""
    for path, module in [*nnx.iter_graph(model)]:
        name = "/".join(map(str, path))
        if isinstance(module, nnx.Module) and name in paths:
            module.__class__ = _recording(type(module), name, record)


def _kind(module, shapes, x):
    """The kind of a layer: dense, embed, conv2, transposed2 or norm-1 as in `mark`, or "other"."""
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


def _linen(record):
    running: list[Any] = []

    def interceptor(function, args, kwargs, context):
        path = context.module.path
        if context.method_name == "setup" or path in running:  # a subclass that calls `super().__call__` is one layer
            return function(*args, **kwargs)
        marked = context.method_name == "__call__"  # `attend` of an embedding has features as input, not indices
        running.append(path)
        try:
            return record("/".join(path), context.module, function, args, kwargs, marked)
        finally:
            running.remove(path)

    return interceptor


def _recording(cls, path, record):
    """A subclass whose calls are recorded."""

    @wraps(cls.__call__)
    def call(self, *args, **kwargs):
        return record(path, self, lambda *args, **kwargs: cls.__call__(self, *args, **kwargs), args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})
