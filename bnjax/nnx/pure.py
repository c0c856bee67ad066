"""An NNX model as a pure function of its variables, for training, recalibration and diagnosis."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
from flax.nnx import variablelib

from bnjax.flax_shared import conventions
from bnjax.nnx.norm import BatchMoments, BatchNorm

# Variables that a call leaves anew each time, and keys, which come with the call.
_OUTPUTS = (nnx.Intermediate, nnx.Perturbation, BatchMoments, nnx.RngState)


def functional(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
    """An NNX model as a pure function with the call of a Linen model, for `bnjax.training.TrainState`.

    In training the model runs in the mode in which it is: a layer that was put in evaluation, by its own `eval()` or by
    its constructor, stays there. A model all of whose layers are in evaluation was put there as a whole, and is put
    in training as a whole (`model.train()`). Layers without a mode (None) are in training. Evaluation is that of the
    whole model (`model.eval()`).

    Args:
      model: stays as it is.

    Returns:
      apply: `apply(variables, *args, mutable=(), rngs=None, **kwargs)`: what the model returns, and, if `mutable` names
        collections, those as well. It is training if it does, else evaluation. `rngs`, keys by name, seed the model's
        own streams, those of stacked layers too; a model whose call takes `rngs` gets them as `nnx.Rngs`. An `nnx.Rngs`
        goes to the call alone.
      variables: `params` and `batch_stats` as nnx.State, and the model's other variables, each type in a collection of
        its name, such as `cache`. What is not named in `mutable` stays as `variables` has it. To have the variables in
        the model again: `nnx.update(model, *variables.values())`.

    Raises:
      ValueError: while tracing, if the model draws from a stream that has no key: it would be the same in each call.

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
            elif keys or takes_rngs.default is inspect.Parameter.empty:  # without keys what draws from it is an error
                kwargs["rngs"] = nnx.Rngs(**keys)
        if not mutable:
            model.eval()
            return model(*args, **kwargs)
        _put_in_training(model)
        _seed(model, keys)
        collecting = _layers(model) if "batch_moments" in mutable else {}
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
    """The whole model, if all of it is in evaluation; else the layers that do not say where they are."""
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
    """Give the model's streams these keys; those that have none cannot be drawn from."""
    nnx.reseed(model, policy="match_shape", **keys)
    for _, node in nnx.iter_graph(model):
        if type(node) is nnx.RngStream and node.tag not in keys:
            node.__class__ = _WithoutKey


class _WithoutKey(nnx.RngStream):
    """A stream that nobody seeded."""

    def __call__(self):
        raise ValueError(
            f"apply(rngs=...): the model draws random numbers from {self.tag!r}, which without a key are the same in "
            f"each call. Pass rngs={{{self.tag!r}: key}}, or the same to TrainState.create."
        )


def _layers(model) -> dict[str, Any]:
    """The layers of bnjax in a model, by path."""
    return {"/".join(map(str, path)): layer for path, layer in nnx.iter_graph(model) if isinstance(layer, BatchNorm)}
