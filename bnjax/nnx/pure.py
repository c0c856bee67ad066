"""An NNX model as a pure function of its variables, for training, recalibration and diagnosis."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen, nnx
from flax.nnx import bridge

from bnjax.core import frozen
from bnjax.core.records import Collected
from bnjax.flax_shared import conventions, flax_internals
from bnjax.nnx import bridged
from bnjax.nnx.conversion import check_model
from bnjax.nnx.norm import BatchMoments, BatchNorm, collect
from bnjax.nnx.serialization import serializable

# Variables that are not state between calls: outputs of a call, and keys, which the caller passes.
_OUTPUTS = (nnx.Intermediate, nnx.Perturbation, BatchMoments, nnx.RngState)


def functional(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
    """An NNX model as a pure function with the call of a Linen model, for `bnjax.training.TrainState`.

    `apply` runs the model in training if `mutable` names collections, and in evaluation (`model.eval()`) otherwise. In
    training each layer keeps the mode that it has in `model`: a layer that is in evaluation, by its own `eval()` or by
    its constructor, stays in evaluation, and a layer without a mode (None) is in training. If all layers are in
    evaluation, the whole model is assumed to be in evaluation mode, and `apply` puts it in training (`model.train()`).
    A Linen module in the model (`flax.nnx.bridge.ToNNX`) has no mode: the model's call of it says which statistics it
    uses. If that call names no `mutable`, the collections of `apply` are mutable.

    Args:
      model: an NNX module; it stays unchanged. Call `functional` once for a model: each call returns another `apply`,
        for which a training step is compiled anew.

    Returns:
      apply: `apply(variables, *args, mutable=(), rngs=None, **kwargs)` returns the model's output; with `mutable` it
        returns the output and the collections named, or all for True. `rngs` is a dictionary of keys by name, which
        seed the model's own streams, those of stacked layers included; a model whose call has a parameter `rngs` gets
        them as `nnx.Rngs`. An `nnx.Rngs` is passed to the call and seeds no stream.
      variables: `params` and `batch_stats` as nnx.State, and the model's other variables, each type in a collection of
        its name, such as `cache`. Collections that `mutable` does not name stay unchanged. To put variables back into
        the model, call `nnx.update(model, *variables.values())`. `jax.export` serializes programs that take or return
        them; where layers have integers as names, as in an `nnx.Sequential`, their State holds nested States, because
        JAX serializes no dictionary with such keys.

    Raises:
      TypeError: if the model is not an NNX module, or `apply` is called without variables.
      ValueError: while tracing, if the model draws from a stream without a key, because every call would then draw the
        same numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> apply, variables = bnjax.nnx.functional(bnjax.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, updates = apply(variables, x, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"][...].round(3).tolist()
      [0.0..., 0.2...]
    """
    if isinstance(model, linen.Module):
        name = type(model).__name__
        raise TypeError(f"functional(model={name}): expected an NNX module. A Linen module has `apply` already.")
    check_model("functional", model, containers=False)
    filters = {"params": nnx.Param, "batch_stats": nnx.BatchStat, **_other_collections(model)}
    graphdef, *states, rest = nnx.split(model, *filters.values(), ...)
    initial = {name: serializable(state) for name, state in zip(filters, states, strict=True)}
    takes_rngs = inspect.signature(type(model).__call__).parameters.get("rngs")

    def apply(
        variables: Mapping[str, Any],
        *args: Any,
        mutable: Sequence[str] | str | bool = (),
        rngs: Any = None,
        **kwargs: Any,
    ):
        _check_variables(variables, initial)
        if isinstance(mutable, str):
            mutable = (mutable,)
        elif mutable is True:  # every collection, as in Linen; moments are collected only by name
            mutable = tuple(filters)
        states = [variables.get(name, state) for name, state in initial.items()]
        model = nnx.merge(graphdef, *states, rest, copy=True)
        keys = {} if rngs is None or isinstance(rngs, nnx.Rngs) else dict(rngs)
        if takes_rngs is not None:
            if isinstance(rngs, nnx.Rngs):
                kwargs["rngs"] = rngs
            elif keys or takes_rngs.default is inspect.Parameter.empty:  # drawing from an empty Rngs is an error
                kwargs["rngs"] = nnx.Rngs(**keys)
        if not mutable:
            model.eval()
            return model(*args, **kwargs)
        _put_in_training(model)
        _seed(model, keys, mutable)
        collecting = "batch_moments" in mutable
        if collecting:
            _collect(model, variables.get("batch_moments", {}))
        for path, node in nnx.iter_graph(model):
            if isinstance(node, BatchNorm):
                frozen.say("/".join(map(str, path)), node.frozen_params)
        output = model(*args, **kwargs)
        updates: dict[str, Any] = {
            name: _like(variables.get(name), serializable(nnx.state(model, filters[name])))
            for name in filters
            if name == "batch_stats" or name in mutable
        }
        if collecting:
            updates["batch_moments"] = _collected(model)
        return output, updates

    return apply, initial


def _other_collections(model):
    """A filter for each type of variable that is neither a parameter nor a statistic, by its name."""
    others = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, (nnx.Param, nnx.BatchStat, *_OUTPUTS)):
            others[flax_internals.collection_of(type(node))] = _exactly(type(node))
    return others


def _exactly(kind):
    return lambda path, variable: getattr(variable, "type", type(variable)) is kind


def _put_in_training(model):
    """Put the whole model in training if all layers are in evaluation, otherwise only the layers without a mode."""
    attributes = ("deterministic", "use_running_average")
    modes = [
        (module, name, getattr(module, name))
        for _, module in nnx.iter_modules(model)
        for name in attributes
        if hasattr(module, name)
    ]
    whole = all(mode is not False for _, _, mode in modes)
    for module, name, mode in modes:
        if whole or mode is None:
            setattr(module, name, False)


def _seed(model, keys, mutable):
    """Seed the model's streams with these keys; drawing from a stream without a key becomes an error.

    A Linen module draws from all of its streams, so that an error may come only from the streams that it needs.
    """
    nnx.reseed(model, policy="match_shape", **keys)
    for _, node in nnx.iter_graph(model):
        if type(node) is nnx.RngStream and node.tag not in keys:
            node.__class__ = bridged.WithoutKey
        elif isinstance(node, bridge.ToNNX):
            bridged.put_in_training(node, mutable)


def _check_variables(variables, initial):
    known = [*initial, "batch_moments"]
    if isinstance(variables, Mapping) and (not variables or any(name in known for name in variables)):
        return
    given = sorted(map(str, variables)) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
    raise TypeError(
        f"apply(variables=...): expected the model's variables by collection, {sorted(initial)}, got {given}. Pass "
        "them before the model's arguments, apply(variables, x), as `functional` returned them."
    )


def _collect(model, earlier):
    """Let every layer of bnjax collect moments, merged into earlier ones by the layer's path."""
    for path, node in list(nnx.iter_graph(model)):
        name = "/".join(map(str, path))
        if isinstance(node, BatchNorm):
            collect(node, earlier.get(name, conventions.complete(None, node.mean[...], node.var[...])))
        elif isinstance(node, bridge.ToNNX):
            below = f"{name}/" if name else ""
            inside = {k: v for k, v in earlier.items() if k == name or k.startswith(below)}
            bridged.add_moments(node, {k.removeprefix(name).removeprefix("/"): v for k, v in inside.items()})


def _collected(model):
    """The moments that the layers of bnjax collected, by path."""
    found: dict[str, dict[str, Any]] = {}
    for names, node in nnx.iter_graph(model):
        if isinstance(node, BatchMoments):
            *path, name = map(str, names)
            found.setdefault("/".join(path), {})[name] = node.get_value()
    return {path: Collected(**parts) for path, parts in found.items()}


def _like(given, new):
    """The new state in the form of the given one, such as a result of `nnx.state`, if both have the same variables."""
    if not isinstance(given, nnx.State) or jax.tree.structure(given) == jax.tree.structure(new):
        return new
    (old, structure), paired = jax.tree_util.tree_flatten_with_path(given), jax.tree_util.tree_leaves_with_path(new)
    keys = [[jax.tree_util.keystr(path, simple=True) for path, _ in leaves] for leaves in (old, paired)]
    return structure.unflatten([leaf for _, leaf in paired]) if keys[0] == keys[1] else new
