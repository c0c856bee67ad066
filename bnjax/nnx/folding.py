"""Batch normalization of an NNX model, folded into its linear layers."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge
from jax import Array

from bnjax.core import trees
from bnjax.core.records import BNParams, BNState
from bnjax.deploy.affine import fold as affine_fold
from bnjax.deploy.neighbours import Neighbours
from bnjax.deploy.pairs import (
    FoldReport,
    NotFoldedError,
    TracedLayer,
    check_arguments,
    evaluates,
    fold_linear,
    fold_pairs,
    left,
    log,
)
from bnjax.nnx.conversion import check_model
from bnjax.nnx.norm import BatchNorm
from bnjax.nnx.variants import AdaptiveBatchNorm, GhostBatchNorm, RenormBatchNorm
from bnjax.traced.calls import record_nnx

Model = TypeVar("Model")

_LINEAR = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_NORM = (nnx.BatchNorm, AdaptiveBatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm)


class Identity(nnx.Module):
    """The layer that replaces a folded norm: it returns its input, in the dtype of the norm's output.

    In training, where the norm would use the batch's statistics, it raises a ValueError, unless the norm was frozen.
    """

    dtype: Any
    promoted: Any
    use_running_average: bool | None
    frozen: bool = False
    path: str

    def __call__(self, x: Array, use_running_average: bool | None = None, *args: Any, **kwargs: Any) -> Array:
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is not None and not evaluate and not self.frozen:
            raise ValueError(
                f"Identity(use_running_average=False): {self.path!r} is folded, but is called in training, with the "
                "batch's statistics. Call model.eval(). Train the model that was not folded."
            )
        return x.astype(jnp.promote_types(x.dtype, self.promoted) if self.dtype is None else self.dtype)


def fold_model(model: Model, *args: Any, pairs: Any = None, **kwargs: Any) -> Model:
    """Fold batch normalization into adjacent linear layers, in place, for evaluation without it.

        scale' = scale / sqrt(var + epsilon)    bias' = bias - mean * scale'    (Ioffe & Szegedy, 2015, algorithm 2)

    The model is traced in evaluation, and every norm that is adjacent to a linear layer is folded: into the linear
    layer before it, or else into the one after it. Adjacent means that nothing but reshapes that keep the features on
    the last axis lies between the two, and that the output of the first has no other use. Norms that were not folded,
    and other layers with running statistics, are logged as a warning by the logger `bnjax`; `fold_report` lists them
    without changing the model.

    Args:
      model: an NNX module with running statistics, in evaluation, by `model.eval()` or the arguments of its call.
      *args, **kwargs: arguments of the model's call in evaluation, arrays or `jax.ShapeDtypeStruct`s. The model is
        traced with them, not run.
      pairs: the pairs to fold, by default all that are adjacent. A pair is (linear, norm) or (norm, linear), in the
        order of the calls, as paths such as ("conv1", "bn1") or ("blocks/0/bn", "blocks/0/dense"). Without *args the
        model is not traced: the caller vouches that the pairs are adjacent, and norms must have axis=-1. Linear layers
        are `nnx.Linear`, `nnx.Conv` (grouped and depthwise ones included) and `nnx.ConvTranspose`. A linear layer after
        the norm must not pad zeros, because the norm would map them to other values: its padding must be VALID,
        CIRCULAR or REFLECT, or its kernel of size 1.

    Returns:
      `model` itself. A folded norm is an `Identity` without variables, which raises an error in training. Every folded
      linear layer has a bias. Arrays keep their dtypes.

    Raises:
      ValueError, TypeError: for an object that is not an NNX module, a path that does not exist, a pair of other kinds
        or shapes or that is not adjacent, a layer in two pairs, or a model in training. The model is then unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, use_bias=False, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
      >>> model.eval()
      >>> model = bnjax.nnx.fold_model(model, jnp.ones((1, 3)))
      >>> model.layers[0].bias.shape, len(nnx.state(model, nnx.BatchStat))
      ((4,), 0)
    """
    # Only a module can be traced. Without a trace, the layers may lie in a container.
    check_model("fold_model", model, containers=not (args or kwargs))
    log(_fold(model, pairs, args, kwargs))
    return model


def fold_report(model: nnx.Module, *args: Any, pairs: Any = None, **kwargs: Any) -> FoldReport:
    """The pairs that `fold_model` would fold with these arguments, and the reason for each norm that it would not.

    Args:
      model: an NNX module; it stays unchanged.
      *args, pairs, **kwargs: as in `fold_model`.

    Returns:
      FoldReport: `folded`, a list of pairs of paths, and `unfolded`, the reason by the path of a norm, and of any other
      layer with running statistics.

    Raises:
      ValueError, TypeError: as `fold_model`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.BatchNorm(4, rngs=rngs))
      >>> model.eval()
      >>> print(bnjax.nnx.fold_report(model, jnp.ones((1, 3))))
      folded 0 of 1 norms
        left layers/2: its input is the output of max; its output is used by the model's result
    """
    check_model("fold_report", model, containers=False)
    return _fold(nnx.clone(model), pairs, args, kwargs)


def _fold(model: Any, pairs: Any, args: Any, kwargs: Mapping[str, Any]) -> FoldReport:
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    if args or kwargs or pairs is None:
        check_arguments(args, kwargs)
        layers, neighbours = _traced(model, args, kwargs)
    else:
        layers, neighbours = {name: _as_traced(node) for name, node in nodes.items()}, None
    holders = Counter(id(v) for _, module in nnx.iter_modules(model) for v in vars(module).values())
    norms: dict[str, Any] = {}  # by path, the dtype to which the norm's variables promote
    linears: dict[str, tuple[Any, Any]] = {}  # by path, the new kernel and bias

    def fold_one(call, linear, norm, previous):
        layer, bn = nodes[linear], nodes[norm]
        if any(v is not None and holders[id(v)] > 1 for v in (layer.kernel, layer.bias)):
            raise NotFoldedError(
                f"{call}: {linear!r} shares its kernel or bias with another layer. Leave this pair out."
            )
        kernel, bias = linears.get(linear) or (layer.kernel[...], None if layer.bias is None else layer.bias[...])
        stored = BNParams(*(None if v is None else v[...] for v in (bn.scale, bn.bias)))
        statistics = BNState(bn.mean[...], bn.var[...], jnp.zeros(()))
        affine = affine_fold(stored, statistics, epsilon=bn.epsilon)
        linears[linear] = fold_linear(call, layer, kernel, bias, affine, previous)
        arrays = (*stored, *statistics[:2])
        norms[norm] = functools.reduce(jnp.promote_types, (v.dtype for v in arrays if v is not None))

    report = fold_pairs(pairs, layers, neighbours, (_LINEAR, _NORM), fold_one, _others(nodes))
    for name, (kernel, bias) in linears.items():
        layer = nodes[name]
        layer.kernel.set_value(kernel)
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(bias), True
        else:
            layer.bias.set_value(bias)
    for name, promoted in norms.items():
        bn = nodes[name]
        for attribute in [name for name in vars(bn) if name[0] != "_" and name not in Identity.__annotations__]:
            delattr(bn, attribute)
        bn.__class__, bn.promoted, bn.path = Identity, promoted, name
    return report


def _as_traced(node):
    return TracedLayer(type(node), node, getattr(node, "axis", -1), adapts=isinstance(node, AdaptiveBatchNorm))


def _others(nodes):
    """By path, why each layer with running statistics that is not one of the norms is not folded."""
    collections: dict[str, dict[str, Any]] = {}
    for path, node in nodes.items():
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param):
            collections.setdefault(type(node).__name__, {})[path] = node.get_value()
    found = {}
    for path in trees.others(collections, [path for path, node in nodes.items() if type(node) in _NORM]):
        parts = path.split("/")
        above = ["/".join(parts[:i]) for i in range(len(parts) + 1)]
        bridged = next((p for p in above if isinstance(nodes.get(p), bridge.ToNNX)), None)
        found[path] = left(type(nodes[path]), _NORM)
        if bridged is not None:
            found[path] = (
                f"it is in the Linen module {bridged!r} (flax.nnx.bridge), which is not traced. Use a layer of "
                "bnjax.nnx in its place"
            )
    return found


def _traced(model, args, kwargs):
    """The layers of a model by path, and the trace of its call."""
    graphdef, state = nnx.split(model)
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_modules(model)}
    layers = {path: _as_traced(node) for path, node in nodes.items()}
    found = [path for path, layer in layers.items() if layer.kind in _LINEAR + _NORM]
    training: dict[str, None] = {}  # the paths of norms in training mode

    def record(call):
        known = layers[call.path]
        if known.kind in _LINEAR:
            return call.marked(call.layer.kernel[...])
        running = evaluates(call.args, call.kwargs, call.layer)
        # The caller leaves the choice to the mode of the model, which in the trace is evaluation.
        if running and not evaluates(call.args, call.kwargs, known.module):
            training[call.path] = None
        layers[call.path] = known._replace(calls=known.calls | {(jnp.ndim(call.x), running)})
        return call.marked()

    def run(state, args, kwargs):
        traced = nnx.merge(graphdef, state)
        traced.eval()
        record_nnx(traced, found, record)
        return traced(*args, **kwargs)

    neighbours = Neighbours(run, state, args, kwargs)
    if training:
        raise ValueError(
            f"fold_model(model=...): {trees.named(training)}: in training mode. Folding is for evaluation: call "
            "model.eval() first."
        )
    return layers, neighbours
