"""What a Keras model says about its layers besides their arrays: the order of their axes, and renormalization."""

import re
from typing import Any

import numpy as np

from bnjax.interop.arrays import Arrays, keras_arrays
from bnjax.interop.kernels import KERAS, Layer, Library
from bnjax.interop.match import Pair, keras_layers

RENORM: tuple[str, ...] = ("moving_stddev", "renorm_mean", "renorm_stddev")
"""What a Keras layer with renorm=True has in addition to its moving mean and variance, in the order of its weights."""


_BY_PATH = (
    "Pass its arrays by path, [(w.path, w) for w in model.weights], and flatten={path: ()} for each Flax layer whose "
    "features are in Keras's order."
)


def model_layers(call: str, source: Any) -> tuple[Arrays, Library, list[Layer]]:
    """The arrays of a Keras model by path, the library with the order of its axes, and its layers."""
    arrays = keras_arrays(call, source)
    renorm = _renormalized(arrays)
    layers = keras_layers({path: array for path, array in arrays.items() if path not in renorm})
    return arrays, _library(call, source), layers


def _library(call, source):
    """Keras with the order in which the model flattens images. If only arrays are given, channels are assumed to be
    last.

    In a model with channels first, `Flatten` of the default format flattens (channels, height, width), as PyTorch does,
    and `Flatten(data_format="channels_first")` first moves the channels last.
    """
    formats: dict[str, list[str]] = {"channels_first": [], "channels_last": []}
    plain, moving = [], []  # layers that flatten the axes as they are; layers that first move the channels last
    for layer in _layers(source):
        kind, first = type(layer).__name__, getattr(layer, "data_format", None) == "channels_first"
        if kind not in ("Flatten", "Reshape"):
            formats.get(getattr(layer, "data_format", None) or "", []).append(layer.name)
        elif _regroups(layer):
            (moving if first else plain).append(layer.name)
    first, last = formats.values()
    steps = [*_layers(source), *getattr(source, "operations", ())]
    if permuted := sorted({step.name for step in steps if _regroups_permuted(step)}):
        raise ValueError(
            f"{call}(weights=...): {permuted} flatten axes that were permuted, so the order of the features is "
            f"unclear. {_BY_PATH}"
        )
    remedy = None
    if first and last:
        remedy = (
            "Build the Keras model with the data_format of the image that it flattens or forms in every layer, and set "
            "the same weights."
        )
    elif moving and plain:
        remedy = "Convert the parts of the model before and after the dense layers as models of their own."
    elif moving and not first:
        remedy = _BY_PATH
    if remedy:
        raise ValueError(
            f"{call}(weights=...): {first + moving} have data_format='channels_first', and {last + plain} do not, so "
            f"the order of flattened features is unclear. {remedy}"
        )
    return KERAS._replace(channels_first=bool(first) and not moving)


def check_axes(call: str, source: Any, pairs: list[Pair]) -> None:
    """Check that layers of a Keras model and of the Flax model have their features on the same axis."""
    layers = layers_by_path(source)
    images = {_rank(layer) for layer in layers.values() if getattr(layer, "data_format", None) == "channels_first"}
    for theirs, ours, _ in pairs:
        layer = layers.get(theirs.name)
        rank, axis = _rank(layer), np.ravel(getattr(layer, "axis", -1 if hasattr(layer, "units") else ()))
        if not ours.called.traced or axis.size != 1 or rank is None:
            continue
        place = int(axis[0]) % rank
        if rank in images:
            place = rank - 1 if place == 1 else place - 1
        own = int(ours.called.kind.removeprefix("norm")) if ours.called.kind.startswith("norm") else -1
        if place - rank != own:
            moved = (
                " If the Keras model moves its axes first, pass its arrays by path, [(w.path, w) for w in "
                "model.weights]: their axes are not compared."
            )
            raise ValueError(
                f"{call}(weights=...): the features of {theirs.name!r} are on axis {axis[0]} of {rank}, which is axis "
                f"{place - rank} with channels last, but the features of {ours.name!r} are on axis {own}. Give both "
                f"layers the same axis.{'' if images else moved}"
            )


def _renormalized(arrays):
    """The paths of the arrays that only renormalization has."""
    layers = {path.rpartition("/")[0] for path in arrays if _name(path) == RENORM[0]}
    return {path for path in arrays if path.rpartition("/")[0] in layers and _name(path) in RENORM}


def renorm_weights(call: str, source: Any, arrays: Arrays, converted: Arrays) -> Arrays:
    """The arrays that only renormalization has, with which it starts from the running statistics.

    Args:
      call: the function called, for errors.
      source: the Keras model.
      arrays: all its arrays.
      converted: the new arrays, without those of renormalization.
    """
    layers = layers_by_path(source)
    found = {}
    for path in _renormalized(arrays):
        prefix = path.rpartition("/")[0]
        if prefix not in layers:
            raise ValueError(
                f"{call}(weights=...): {path!r} depends on the epsilon of its layer. Pass the Keras model itself."
            )
        own = {_name(key): value for key, value in converted.items() if key.rpartition("/")[0] == prefix}
        values = renorm_statistics(own["moving_mean"], own["moving_variance"], layers[prefix].epsilon)
        found[path] = values[RENORM.index(_name(path))]
    return found


def renorm_statistics(mean: np.ndarray, var: np.ndarray, epsilon: float) -> list[np.ndarray]:
    """The arrays named in RENORM, for these running statistics."""
    std = np.sqrt(var + np.asarray(epsilon, var.dtype))
    return [std, mean, std]


def layers_by_path(source: Any) -> dict[str, Any]:
    """The layers of a Keras model by the path of their weights; the innermost layer takes precedence."""
    return {w.path.rpartition("/")[0]: layer for layer in _layers(source) for w in getattr(layer, "weights", [])}


def _layers(source):
    """The layers of a Keras model, nested ones included, each after the layer that contains it."""
    return source._flatten_layers() if hasattr(source, "_flatten_layers") else []


def _name(path):
    return re.sub(r":\d+$", "", path.rpartition("/")[2])


def _input_shape(layer):
    config = layer.get_build_config() if hasattr(layer, "get_build_config") else None
    return (config or {}).get("input_shape") or getattr(getattr(layer, "input", None), "shape", None)


def _rank(layer):
    shape = _input_shape(layer)
    return None if shape is None else len(shape)


def _regroups(layer):
    """Whether a Flatten or Reshape joins or splits axes of more than one element."""
    shape = _input_shape(layer)
    if shape is None:
        return True
    result = layer.compute_output_shape(shape) if hasattr(layer, "compute_output_shape") else layer.output.shape
    before, after = ([n for n in s[1:] if n != 1] for s in (shape, result))
    return len(before) != len(after)


def _regroups_permuted(layer):
    """Whether a Flatten or Reshape of a graph joins or splits axes of an image that were permuted after the last layer
    with weights, as the axes of a convolution's output."""
    if type(layer).__name__ not in ("Flatten", "Reshape") or not _regroups(layer) or _rank(layer) == 3:
        return False
    try:
        before = [layer.input]
    except (AttributeError, ValueError):  # a layer of a model that is not a graph, or one that is called twice
        return False
    seen = set()
    while before:
        operation = before.pop()._keras_history.operation
        if type(operation).__name__ in ("Permute", "Transpose", "Moveaxis", "Swapaxes"):
            return True
        weighted = any(w.path.endswith(("kernel", "embeddings")) for w in getattr(operation, "weights", []))
        if id(operation) not in seen and not weighted and len(getattr(operation, "_inbound_nodes", ())) == 1:
            before += operation._inbound_nodes[0].input_tensors
        seen.add(id(operation))
    return False
