"""Batch normalization of an NNX model, folded into its linear layers."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from bnjax.core.records import BNParams, BNState
from bnjax.deploy.affine import fold as affine_fold
from bnjax.deploy.neighbours import (
    FoldReport,
    Neighbours,
    TracedLayer,
    as_pairs,
    fold_linear,
    fold_pairs,
    log,
    named_call,
)
from bnjax.nnx.conversion import check_model
from bnjax.nnx.norm import AdaptiveBatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm

Model = TypeVar("Model")

_LINEAR = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_NORM = (nnx.BatchNorm, AdaptiveBatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm)


class Identity(nnx.Module):
    """The layer that replaces a folded norm: it returns its input, in the dtype of the norm's output."""

    dtype: Any
    promoted: Any

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        return x.astype(jnp.promote_types(x.dtype, self.promoted) if self.dtype is None else self.dtype)


def fold_model(model: Model, *args: Any, pairs: Any = None, **kwargs: Any) -> Model:
    """Fold batch normalization into adjacent linear layers, in place, for evaluation without it.

        scale' = scale / sqrt(var + epsilon)    bias' = bias - mean * scale'    (Ioffe & Szegedy, 2015, algorithm 2)

    The model is traced in evaluation, and every norm that is adjacent to a linear layer is folded: into the linear
    layer before it, or else into the one after it. Adjacent means that nothing but reshapes that keep the features on
    the last axis lies between the two, and that the output of the first has no other use. Norms that were not folded
    are logged as a warning by the logger `bnjax`; `fold_report` lists them without changing the model.

    Args:
      model: an NNX module with running statistics, in any mode.
      *args, **kwargs: arguments of the model's call in evaluation, arrays or `jax.ShapeDtypeStruct`s. The model is
        traced with them, not run.
      pairs: the pairs to fold, by default all that are adjacent. A pair is (linear, norm) or (norm, linear), in the
        order of the calls, as paths such as ("conv1", "bn1") or ("blocks/0/bn", "blocks/0/dense"). `pairs` may also be
        passed before *args. Without *args the model is not traced: the caller vouches that the pairs are adjacent, and
        norms must have axis=-1. Linear layers are `nnx.Linear`, `nnx.Conv` (grouped and depthwise ones included) and
        `nnx.ConvTranspose`. A linear layer after the norm must not pad zeros, since the norm would map them to other
        values: its padding must be VALID, CIRCULAR or REFLECT, or its kernel of size 1.

    Returns:
      `model` itself. A folded norm is an `Identity` without variables, and every linear layer has a bias; arrays keep
      their dtypes.

    Raises:
      ValueError, TypeError: for an object that is not an NNX module, a path that does not exist, a pair of other kinds
        or shapes or that is not adjacent, or a layer in two pairs. The model is then unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, use_bias=False, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
      >>> model = bnjax.nnx.fold_model(model, jnp.ones((1, 3)))
      >>> model.layers[0].bias.shape, len(nnx.state(model, nnx.BatchStat))
      ((4,), 0)
    """
    pairs, args = as_pairs("fold_model", args, pairs)
    # Only a module can be traced. Without a trace, the layers may lie in a container.
    check_model("fold_model", model, containers=not (args or kwargs))
    log(_fold(model, pairs, args, kwargs))
    return model


def fold_report(model: nnx.Module, *args: Any, **kwargs: Any) -> FoldReport:
    """The pairs that `fold_model(model, *args, **kwargs)` would fold, and the reason for each norm that it would not.

    Args:
      model: an NNX module; it stays unchanged.
      *args, **kwargs: arguments of the model's call in evaluation, as in `fold_model`.

    Returns:
      FoldReport: `folded`, a list of pairs of paths, and `unfolded`, the reason by the path of a norm.

    Raises:
      ValueError, TypeError: as `fold_model`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.BatchNorm(4, rngs=rngs))
      >>> print(bnjax.nnx.fold_report(model, jnp.ones((1, 3))))
      folded 0 of 1 norms
        left layers/2: its input is the output of max; its output is used by the model's result
    """
    check_model("fold_report", model, containers=False)
    return _fold(nnx.clone(model), *as_pairs("fold_report", args, None), kwargs)


def _fold(model: Any, pairs: Any, args: Any, kwargs: Mapping[str, Any]) -> FoldReport:
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    if args or kwargs:
        layers, neighbours = _traced(model, args, kwargs)
    elif pairs is None:
        raise ValueError("fold_model(...): no arguments of the model. Pass an example input, with which it is traced.")
    else:
        layers = {name: _as_traced(node) for name, node in nodes.items()}
        neighbours = None
    holders = Counter(id(v) for _, module in nnx.iter_modules(model) for v in vars(module).values())
    norms: dict[str, Any] = {}  # by path, the dtype to which the norm's variables promote
    linears: dict[str, tuple[Any, Any]] = {}  # by path, the new kernel and bias

    def fold_one(call, linear, norm, previous):
        layer, bn = nodes[linear], nodes[norm]
        if any(v is not None and holders[id(v)] > 1 for v in (layer.kernel, layer.bias)):
            raise ValueError(f"{call}: {linear!r} shares its kernel or bias with another layer. Leave this pair out.")
        kernel, bias = linears.get(linear) or (layer.kernel[...], None if layer.bias is None else layer.bias[...])
        stored = BNParams(*(None if v is None else v[...] for v in (bn.scale, bn.bias)))
        statistics = BNState(bn.mean[...], bn.var[...], jnp.zeros(()))
        affine = affine_fold(stored, statistics, epsilon=bn.epsilon)
        linears[linear] = fold_linear(call, layer, kernel, bias, affine, previous)
        arrays = (*stored, *statistics[:2])
        norms[norm] = functools.reduce(jnp.promote_types, (v.dtype for v in arrays if v is not None))

    report = fold_pairs(pairs, layers, neighbours, (_LINEAR, _NORM), fold_one)
    for name, (kernel, bias) in linears.items():
        layer = nodes[name]
        layer.kernel.set_value(kernel)
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(bias), True
        else:
            layer.bias.set_value(bias)
    for name, promoted in norms.items():
        bn = nodes[name]
        for attribute in [name for name in vars(bn) if name[0] != "_" and name != "dtype"]:
            delattr(bn, attribute)
        bn.__class__, bn.promoted = Identity, promoted
    return report


def _as_traced(node):
    return TracedLayer(type(node), node, getattr(node, "axis", -1), adapts=isinstance(node, AdaptiveBatchNorm))


def _traced(model, args, kwargs):
    """The layers of a model by path, and the trace of its call."""
    graphdef, state = nnx.split(model)
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_modules(model)}
    layers = {path: _as_traced(node) for path, node in nodes.items()}
    called: dict[str, TracedLayer] = {}

    def call(state, args, kwargs):
        traced = nnx.merge(graphdef, state)
        for path, node in nnx.iter_modules(traced):
            path = "/".join(map(str, path))
            if layers[path].kind in _LINEAR + _NORM:
                node.__class__ = _recording(layers[path], path, called)
        traced.eval()
        return traced(*args, **kwargs)

    neighbours = Neighbours(call, (state, args, kwargs), {})
    return layers | called, neighbours


def _recording(layer, path, called):
    """A subclass of the layer's class that names its inputs and outputs.

    NNX transforms call copies of a module, which keep its class, so the subclass sees calls under `nnx.jit` as well.
    """

    def call(self, x, *args, **kwargs):
        norm = layer.kind in _NORM
        average = kwargs.get("use_running_average", args[0] if norm and args else None)
        average = self.use_running_average if norm and average is None else average
        evaluates = not norm or bool(average) or getattr(self, "frozen", False)
        this_call = layer._replace(ranks=frozenset({jnp.ndim(x)}), evaluates=evaluates)
        called[path] = this_call.merged(called.get(path))
        kernel = None if norm else self.kernel[...]
        return named_call(path, kernel, lambda x: layer.kind.__call__(self, x, *args, **kwargs), x)

    return type(layer.kind)(layer.kind.__name__, (layer.kind,), {"__call__": call})
