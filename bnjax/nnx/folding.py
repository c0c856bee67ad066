"""Batch normalization folded away in an NNX model."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from bnjax.core.records import BNParams, BNState
from bnjax.deploy.affine import fold as affine_fold
from bnjax.deploy.neighbours import FoldReport, Neighbours, Seen, as_pairs, fold_linear, fold_pairs, log, watched
from bnjax.nnx.norm import BatchNorm, GhostBatchNorm, RenormBatchNorm

Model = TypeVar("Model")

_LINEAR = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_NORM = (nnx.BatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm)


class Identity(nnx.Module):
    """What `fold_model` puts in the place of a norm: it returns its input, in the dtype that the norm returned."""

    dtype: Any
    promoted: Any

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        return x.astype(jnp.promote_types(x.dtype, self.promoted) if self.dtype is None else self.dtype)


def fold_model(model: Model, *args: Any, pairs: Any = None, **kwargs: Any) -> Model:
    """Fold batch normalization into the layers beside it, in place: for evaluation, the same model without it.

    The model is traced in evaluation, and every linear layer and norm that stand side by side are folded: nothing but
    reshapes that keep the features on the last axis may be between the two, and nothing else may use what the first
    gives. A norm goes into the linear layer before it, or else into the one after it. `fold_report` says beforehand
    which would be folded, and for each norm that would not be, why; where there are such, the logger `bnjax` warns.

    Args:
      model: an NNX module with running statistics, in whatever mode.
      *args, **kwargs: of the model's call in evaluation, arrays or `jax.ShapeDtypeStruct`s. It is traced with them, not
        run.
      pairs: those to fold in place of all that are found: (linear, norm) or (norm, linear), paths such as
        ("conv1", "bn1") or ("blocks/0/bn", "blocks/0/dense"), in the order in which the model calls them. They may come
        before *args too. Without *args the model is not traced, and that the pairs stand side by side is the caller's
        word; norms then have axis=-1. Linear layers are `nnx.Linear`, `nnx.Conv` (grouped and depthwise too) and
        `nnx.ConvTranspose`. After the norm they are exact only where no zeros are padded into their input: with padding
        VALID, CIRCULAR or REFLECT, or a kernel of one place.

    Returns:
      `model` itself. A layer folded is an `Identity`, without variables; a linear layer without a bias has one.

    Raises:
      ValueError, TypeError: for a path that is not there, a pair that is not of these kinds, does not fit or does not
        stand side by side, or a layer that is in two pairs. The model is then as it was.

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
    log(_fold(model, *as_pairs("fold_model", args, pairs), kwargs))
    return model


def fold_report(model: nnx.Module, *args: Any, **kwargs: Any) -> FoldReport:
    """What `fold_model(model, *args, **kwargs)` folds, and why not the rest; the model stays as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.BatchNorm(4, rngs=rngs))
      >>> print(bnjax.nnx.fold_report(model, jnp.ones((1, 3))))
      folded 0 of 1 norms
        left layers/2: its input is made by max; what it gives goes into what the model returns
    """
    return _fold(nnx.clone(model), *as_pairs("fold_report", args, None), kwargs)


def _fold(model: Any, pairs: Any, args: Any, kwargs: Mapping[str, Any]) -> FoldReport:
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    if args or kwargs:
        seen, neighbours = _traced(model, args, kwargs)
    elif pairs is None:
        raise ValueError("fold_model(...): no arguments of the model. Pass an example input, with which it is traced.")
    else:
        seen = {name: Seen(type(node), node, getattr(node, "axis", -1)) for name, node in nodes.items()}
        neighbours = None
    holders = Counter(id(v) for _, module in nnx.iter_modules(model) for v in vars(module).values())
    kept: dict[str, Any] = {}
    linears: dict[str, tuple[Any, Any]] = {}

    def fold_one(call, linear, norm, previous):
        layer, bn = nodes[linear], nodes[norm]
        if any(v is not None and holders[id(v)] > 1 for v in (layer.kernel, layer.bias)):
            raise ValueError(f"{call}: {linear!r} shares its kernel or bias with another layer. Leave this pair out.")
        kernel, bias = linears.get(linear) or (layer.kernel[...], None if layer.bias is None else layer.bias[...])
        stored = BNParams(*(None if v is None else v[...] for v in (bn.scale, bn.bias)))
        statistics = BNState(bn.mean[...], bn.var[...], jnp.zeros(()))
        affine = affine_fold(stored, statistics, epsilon=bn.epsilon)
        linears[linear] = fold_linear(call, layer, kernel, bias, affine, previous)
        kept[norm] = functools.reduce(jnp.promote_types, (v.dtype for v in (*stored, *statistics[:2]) if v is not None))

    report = fold_pairs(pairs, seen, neighbours, (_LINEAR, _NORM), fold_one)
    for name, (kernel, bias) in linears.items():
        layer = nodes[name]
        layer.kernel.set_value(kernel)
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(bias), True
        else:
            layer.bias.set_value(bias)
    for name, promoted in kept.items():
        bn = nodes[name]
        for attribute in [name for name in vars(bn) if name[0] != "_" and name != "dtype"]:
            delattr(bn, attribute)
        bn.__class__, bn.promoted = Identity, promoted
    return report


def _traced(model, args, kwargs):
    """The layers of a model by path, and who takes what from whom."""
    graphdef, state = nnx.split(model)
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_modules(model)}
    seen = {path: Seen(type(node), node, getattr(node, "axis", -1)) for path, node in nodes.items()}
    called: dict[str, Seen] = {}

    def call(state, args, kwargs):
        traced = nnx.merge(graphdef, state)
        for path, node in nnx.iter_modules(traced):
            path = "/".join(map(str, path))
            if seen[path].kind in _LINEAR + _NORM:
                node.__class__ = _watching(seen[path], path, called)
        traced.eval()
        return traced(*args, **kwargs)

    neighbours = Neighbours(call, (state, args, kwargs), {})
    return seen | called, neighbours


def _watching(layer, path, called):
    """The class of a layer, which names what it takes and gives; transforms keep the class of what they copy."""

    def call(self, x, *args, **kwargs):
        norm = layer.kind in _NORM
        said = kwargs.get("use_running_average", args[0] if norm and args else None)
        evaluates = (
            not norm or bool(self.use_running_average if said is None else said) or getattr(self, "frozen", False)
        )
        now = layer._replace(ranks=frozenset({jnp.ndim(x)}), evaluates=evaluates)
        called[path] = now.again(called.get(path))
        kernel = None if norm else self.kernel[...]
        return watched(path, kernel, lambda x: layer.kind.__call__(self, x, *args, **kwargs), x)

    return type(layer.kind)(layer.kind.__name__, (layer.kind,), {"__call__": call})
