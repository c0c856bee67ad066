"""An NNX model as a pure function of its variables, for training, recalibration and diagnosis."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
from flax.nnx import variablelib

from bnjax.core import frozen
from bnjax.flax_shared import conventions
from bnjax.nnx.norm import BatchMoments, BatchNorm

# Variables that are no state between calls: outputs of a call, and keys, which the caller passes.
_OUTPUTS = (nnx.Intermediate, nnx.Perturbation, BatchMoments, nnx.RngState)


def functional(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
    """An NNX model as a pure function with the call of a Linen model, for `bnjax.training.TrainState`.

    `apply` runs the model in training if `mutable` names collections, and in evaluation (`model.eval()`) otherwise. In
    training each layer keeps the mode that it has in `model`: a layer that is in evaluation, by its own `eval()` or by
    its constructor, stays in evaluation, and a layer without a mode (None) is in training. If all layers are in
    evaluation, the whole model is taken to have been put there, and `apply` puts it in training (`model.train()`).

    Args:
      model: an NNX module; it stays unchanged.

    Returns:
      apply: `apply(variables, *args, mutable=(), rngs=None, **kwargs)` returns the model's output; with `mutable` it
        returns the output and the collections named. `rngs` is a dictionary of keys by name, which seed the model's own
        streams, those of stacked layers included; a model whose call has a parameter `rngs` gets them as `nnx.Rngs`. An
        `nnx.Rngs` is passed to the call and seeds no stream.
      variables: `params` and `batch_stats` as nnx.State, and the model's other variables, each type in a collection of
        its name, such as `cache`. Collections that `mutable` does not name stay unchanged. To put variables back into
        the model, call `nnx.update(model, *variables.values())`.

    Raises:
      TypeError: if the model is not an NNX module.
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
    if isinstance(model, type) or not isinstance(model, nnx.Module):
        name = getattr(model, "__name__", type(model).__name__)
        raise TypeError(f"functional(model={name}): expected an NNX module. A Linen module has `apply` already.")
    filters = {"params": nnx.Param, "batch_stats": nnx.BatchStat, **_other_collections(model)}
    graphdef, *states, rest = nnx.split(model, *filters.values(), ...)
    initial = dict(zip(filters, states, strict=True))
    takes_rngs = inspect.signature(type(model).__call__).parameters.get("rngs")

    def apply(variables: Mapping[str, Any], *args: Any, mutable: Sequence[str] = (), rngs: Any = None, **kwargs: Any):
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
        _seed(model, keys)
        layers = _own_layers(model)
        for path, layer in layers.items():
            frozen.say(path, layer.frozen_params)
        collecting = layers if "batch_moments" in mutable else {}
        for path, layer in collecting.items():
            nothing = conventions.nothing(layer.mean[...], layer.var[...])
            layer.batch_moments = BatchMoments(variables.get("batch_moments", {}).get(path, nothing))
        output = model(*args, **kwargs)
        updates: dict[str, Any] = {
            name: nnx.state(model, filters[name]) for name in filters if name == "batch_stats" or name in mutable
        }
        if collecting:
            updates["batch_moments"] = {path: layer.batch_moments.get_value() for path, layer in collecting.items()}
        return output, updates

    return apply, initial


def _other_collections(model):
    """A filter for each type of variable that is neither a parameter nor a statistic, by its name."""
    others = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and not isinstance(node, (nnx.Param, nnx.BatchStat, *_OUTPUTS)):
            others[variablelib.variable_name_from_type(type(node), allow_register=True)] = _exactly(type(node))
    return others


def _exactly(kind):
    return lambda path, variable: getattr(variable, "type", type(variable)) is kind


def _put_in_training(model):
    """Put the whole model in training if all layers are in evaluation, else only the layers without a mode."""
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


def _seed(model, keys):
    """Seed the model's streams with these keys; drawing from a stream without a key becomes an error."""
    nnx.reseed(model, policy="match_shape", **keys)
    for _, node in nnx.iter_graph(model):
        if type(node) is nnx.RngStream and node.tag not in keys:
            node.__class__ = _WithoutKey


class _WithoutKey(nnx.RngStream):
    """A stream without a key."""

    def __call__(self):
        raise ValueError(
            f"apply(rngs=...): the model draws random numbers from {self.tag!r}, which without a key are the same in "
            f"each call. Pass rngs={{{self.tag!r}: key}} here or to TrainState.create."
        )


def _own_layers(model) -> dict[str, Any]:
    """The layers of bnjax in a model, by path."""
    return {"/".join(map(str, path)): layer for path, layer in nnx.iter_graph(model) if isinstance(layer, BatchNorm)}
