"""Conversion of whole models of PyTorch and Keras to the variables of Flax models, and back."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, overload

import jax.numpy as jnp
import numpy as np

from bnjax.core import trees
from bnjax.interop import keras_models, torch_modules
from bnjax.interop.arrays import check_floating, checked, plain, tensors, updates
from bnjax.interop.kernels import NORM, TORCH, Move, moves
from bnjax.interop.layers import from_torch, to_torch
from bnjax.interop.match import Moved, Pair, Report, match, own_layers, uncalled


class Unmatched(NamedTuple):
    """Names of the layers with running statistics that `names` does not contain."""

    state_dict: list[str]  # layers of the state_dict, which were not converted
    variables: list[str]  # layers of the variables, which were not replaced


@overload
def from_torch_model(
    state_dict: Any, variables: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, Any], Unmatched]: ...
@overload
def from_torch_model(
    state_dict: Any, variables: Mapping[str, Any], names: None = None, **kwargs: Any
) -> tuple[dict[str, Any], Report]: ...
@overload
def from_torch_model(
    state_dict: Any, variables: Mapping[str, Any], names: Mapping[str, str] | None = None, *, model: Any, **kwargs: Any
) -> tuple[dict[str, Any], Report]: ...
def from_torch_model(
    state_dict: Any,
    variables: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    model: Any = None,
    inputs: Any = (),
    flatten: Mapping[str, tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], Unmatched | Report]:
    """Convert a PyTorch model to the variables of a Linen or NNX model.

    Every tensor of the state_dict is converted to one array of the variables; a tensor or an array without a
    counterpart is an error. Layers are convolutions (grouped and depthwise ones included), transposed convolutions,
    dense layers, embeddings, and normalizations with and without running statistics. The layers of the state_dict, in
    the order of their definition, are matched with the layers of the Flax model, in the order of their calls; kinds and
    shapes must agree. If several layers have the same shape, order alone decides. The report says by what each layer
    was matched, so check it, and correct a wrong match by `names`.

    Kernels are transposed as each layer requires. PyTorch flattens an image as (channels, height, width), Flax as
    (height, width, channels). If the features of a dense layer or of a normalization are a flattened image, or become
    an image, they are reordered accordingly.

    Options are not converted: epsilon, padding and strides are the Flax model's. PyTorch's `padding=1` is ((1, 1),
    (1, 1)) in Flax, which with strides differs from "SAME"; its `ConvTranspose(k, padding=p)` is padding k - 1 - p.

    Args:
      state_dict: state_dict of the PyTorch model, or the model itself, which tells the kinds of its layers too, and the
        layers without tensors. Weights that PyTorch computes at each call, as weight_norm does, must be put back first.
      variables: `params` and `batch_stats`, from `init` of a Linen model, or from `bnjax.nnx.functional(model)` of an
        NNX model, into which `nnx.update(model, *variables.values())` puts the result.
      names: by a layer's name in the state_dict ("layer1.0.bn2"), its path in the variables ("Block_0/BatchNorm_1",
        "layers/1"). With a `model`, these layers are matched by name and all others by order. A parameter of no known
        layer, such as the position embedding of a transformer, must be named with its whole path, and is converted
        without a change. Without a `model`, only the batch normalization layers named here are converted.
      model: the Linen or NNX model. Without it, layers are ordered by the numbers in their paths. Convolutions, and
        paths that do not determine the order, are then an error, and flattened images are not recognized.
      inputs: an input of the model's call, or a tuple of inputs. The model is traced with them, not run.
      flatten: by the path of a dense layer or a normalization, the shape (height, width, channels) of the image that is
        flattened into it, or () if none is. It is needed if the model flattens its own input, or joins a flattened
        image with other features.
      **kwargs: keyword arguments of the model's call, such as train=False.

    Returns:
      variables: the new variables, in the dtypes of the old ones. A count is set if the model has one. A layer with
        `track_running_stats=False` leaves the model's running statistics as they are. Since a state_dict alone cannot
        tell it from a LayerNorm, pass the PyTorch model, or name the layer.
      report: a `Report` of every tensor, which prints as a table, with what PyTorch does not keep in its last rows.
        With `names` alone, `Unmatched`: the layers with running statistics that `names` does not contain.

    Raises:
      ValueError: if a layer has no counterpart, its match is ambiguous, it is named twice, or its shapes or parameters
        differ; and for a state_dict that is not a mapping, an array that is not floating, or a negative variance.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from bnjax import interop
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> layer = {"weight": np.ones(3), "bias": np.ones(3), "running_mean": np.zeros(3), "running_var": np.ones(3)}
      >>> state_dict = {"fc.weight": np.ones((3, 2)), "fc.bias": np.zeros(3)}
      >>> state_dict |= {f"bn1.{name}": array for name, array in layer.items()}
      >>> new, report = interop.from_torch_model(state_dict, variables, model=model, inputs=jnp.ones((1, 2)))
      >>> print(report)
      theirs            shape   ours             shape   done               by
      fc.weight         (3, 2)  layers_0/kernel  (2, 3)  transposed (1, 0)  shape
      fc.bias           (3,)    layers_0/bias    (3,)    as it is           shape
      bn1.weight        (3,)    layers_1/scale   (3,)    as it is           shape
      bn1.bias          (3,)    layers_1/bias    (3,)    as it is           shape
      bn1.running_mean  (3,)    layers_1/mean    (3,)    as it is           shape
      bn1.running_var   (3,)    layers_1/var     (3,)    as it is           shape
    """
    call = "from_torch_model"
    if names is not None and model is None:
        _no_model(call, None, inputs, flatten, kwargs)
        return _named_norms(state_dict, variables, names)
    arrays, theirs = torch_modules.model_layers(call, state_dict, variables)
    pairs = _pairs(call, TORCH, theirs, variables, names, model, inputs, flatten, kwargs)
    torch_modules.check_untracked(call, state_dict, [pair for pair, _ in pairs])
    return _variables(call, variables, pairs), _report(arrays, pairs)


@overload
def to_torch_model(variables: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, np.ndarray]: ...
@overload
def to_torch_model(
    variables: Mapping[str, Any], names: Mapping[str, str] | None = None, *, state_dict: Any, **kwargs: Any
) -> tuple[dict[str, np.ndarray], Report]: ...
def to_torch_model(
    variables: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    state_dict: Any = None,
    model: Any = None,
    inputs: Any = (),
    flatten: Mapping[str, tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> dict[str, np.ndarray] | tuple[dict[str, np.ndarray], Report]:
    """Convert the variables of a Linen or NNX model to a state_dict, for `load_state_dict` of a PyTorch model.

    Args:
      variables, names, model, inputs, flatten, **kwargs: as in `from_torch_model`.
      state_dict: state_dict of the PyTorch model, or the model itself, for its names, shapes and order. Without it,
        only the batch normalization layers in `names` are converted, for `load_state_dict(..., strict=False)`.

    Returns:
      state_dict: writable arrays for `torch.from_numpy`, in the dtypes of the variables; bfloat16 becomes float32.
      report: as in `from_torch_model`. With `names` alone, the function returns the state_dict without a report.

    Raises:
      ValueError: as `from_torch_model`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from bnjax import interop
      >>> variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
      >>> template = {"fc.weight": np.zeros((3, 2)), "fc.bias": np.zeros(3)}
      >>> state_dict, report = interop.to_torch_model(variables, state_dict=template)
      >>> state_dict["fc.weight"].shape
      (3, 2)
    """
    call = "to_torch_model"
    if state_dict is None:
        if names is None:
            raise ValueError(
                f"{call}(names=None, state_dict=None): pass state_dict=, of the PyTorch model, to convert the whole "
                "model, or names= to convert batch normalization layers alone."
            )
        _no_model(call, model, inputs, flatten, kwargs)
        ours = _named(call, variables, names)
        return {key: v for theirs, name in names.items() for key, v in to_torch(*ours[name], prefix=theirs).items()}
    arrays, theirs = torch_modules.model_layers(call, state_dict, variables)
    pairs = _pairs(call, TORCH, theirs, variables, names, model, inputs, flatten, kwargs)
    torch_modules.check_untracked(call, state_dict, [pair for pair, _ in pairs])
    converted = _weights(pairs)
    return {key: converted[key] for key in arrays}, _report(arrays, pairs)


def from_keras_model(
    weights: Any,
    variables: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    model: Any = None,
    inputs: Any = (),
    flatten: Mapping[str, tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], Report]:
    """Convert a Keras model to the variables of a Linen or NNX model.

    Layers are matched as in `from_torch_model`, in the order of Keras's `model.weights`. They are Dense, Embedding,
    Conv, DepthwiseConv, SeparableConv (two convolutions in Flax), ConvTranspose, and normalizations. A renormalized
    layer gives its moving mean and variance.

    A Keras model may have its channels first. A plain `Flatten` then flattens (channels, height, width), and features
    are reordered as for PyTorch. The axes of normalizations and dense layers are compared with those of the Flax model.
    None of this is known if only arrays are passed, which are taken to have their channels last.

    Args:
      weights: the Keras model, or its arrays by path ("block/dense/kernel"), as a mapping or a sequence of pairs.
      names: by the path of a Keras layer ("block/dense"), the path of the Flax layer, for layers to match by name.
      variables, model, inputs, flatten, **kwargs: as in `from_torch_model`.

    Returns:
      variables: the new variables, in the dtypes of the old ones. Counts are 0, because Keras does not count updates.
      report: a `Report` of every array, which prints as a table; counts are its last rows.

    Raises:
      ValueError: as `from_torch_model`; if a layer has its features on another axis than the Flax layer; and if images
        of two data formats, or a Flatten that moves channels and a Reshape that does not, leave an order unclear.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from bnjax import interop
      >>> variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
      >>> weights = [("dense/kernel", np.ones((2, 3))), ("dense/bias", np.zeros(3))]
      >>> variables, report = interop.from_keras_model(weights, variables)
      >>> variables["params"]["kernel"].tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    call = "from_keras_model"
    arrays, library, theirs = keras_models.model_layers(call, weights)
    pairs = _pairs(call, library, theirs, variables, names, model, inputs, flatten, kwargs)
    keras_models.check_axes(call, weights, [pair for pair, _ in pairs])
    return _variables(call, variables, pairs), _report(arrays, pairs)


def to_keras_model(
    variables: Mapping[str, Any],
    weights: Any,
    names: Mapping[str, str] | None = None,
    *,
    model: Any = None,
    inputs: Any = (),
    flatten: Mapping[str, tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> tuple[list[np.ndarray], Report]:
    """Convert the variables of a Linen or NNX model to weights, for `set_weights` of a Keras model.

    Args:
      weights: the Keras model or its arrays, as in `from_keras_model`, for their paths, shapes and order. With a
        renormalized layer it must be the model. Its renormalization then starts from the running statistics.
      variables, names, model, inputs, flatten, **kwargs: as in `from_keras_model`.

    Returns:
      weights: arrays in the order of the Keras model's weights, in the dtypes of the variables; bfloat16 becomes
        float32.
      report: as in `from_keras_model`.

    Raises:
      ValueError: as `from_keras_model`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from bnjax import interop
      >>> variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
      >>> template = [("dense/kernel", np.zeros((2, 3))), ("dense/bias", np.zeros(3))]
      >>> weights, report = interop.to_keras_model(variables, template)
      >>> [array.shape for array in weights]
      [(2, 3), (3,)]
    """
    call = "to_keras_model"
    arrays, library, theirs = keras_models.model_layers(call, weights)
    pairs = _pairs(call, library, theirs, variables, names, model, inputs, flatten, kwargs)
    keras_models.check_axes(call, weights, [pair for pair, _ in pairs])
    converted = _weights(pairs)
    converted |= keras_models.renorm_weights(call, weights, arrays, converted)
    return [converted[key] for key in arrays], _report(arrays, pairs)


Pairs = list[tuple[Pair, dict[str, Move]]]


def _pairs(call, library, theirs, variables, names, model, inputs, flatten, kwargs) -> Pairs:
    """The matched layers, with the moves of their arrays."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            f"{call}(variables=...): expected a mapping with params, got {type(variables).__name__}. Pass the result "
            "of a Linen model's init, or bnjax.nnx.functional(model)[1] of an NNX model."
        )
    leaves: dict[str, dict[str, Any]] = {}
    for collection in ("params", "batch_stats"):
        for path, own in trees.leaves(variables.get(collection, {})).items():
            leaves.setdefault(path, {}).update(own)
    shapes = {path: {name: tuple(leaf.shape) for name, leaf in own.items()} for path, own in leaves.items()}
    if model is None:
        _no_model(call, None, inputs, None, kwargs)
        called = {path: uncalled(own) for path, own in shapes.items()}
        if unknown := [path for path, own in called.items() if own.kind == "convolution"]:
            raise ValueError(
                f"{call}(model=None): ambiguous: kernels of more than two axes, {unknown}, may belong to convolutions "
                "or to transposed convolutions, and a flatten may follow them. Pass model= and inputs= to it."
            )
    else:
        from bnjax.interop.flax_calls import calls  # imported here, since it needs Flax and the rest does not

        called = calls(model, variables, shapes, inputs if isinstance(inputs, tuple) else (inputs,), kwargs)
        if missing := sorted(set(leaves) - set(called)):
            raise ValueError(
                f"{call}(inputs=...): with these inputs the model never calls {missing}. Pass inputs with which it "
                "calls all of its layers."
            )
    if unknown := sorted(set(flatten or {}) - set(leaves)):
        raise ValueError(f"{call}(flatten=...): the model has no {unknown}, but {sorted(leaves)}.")
    pairs = match(call, theirs, own_layers(leaves, called), library, names or {}, model is not None)
    return [(pair, moves(call, pair.theirs, pair.ours, library, flatten or {})) for pair in pairs]


def _variables(call, variables, pairs: Pairs) -> dict[str, Any]:
    """The variables with the other library's arrays."""
    new: dict[str, dict[str, Any]] = {}
    for (theirs, ours, _), array_moves in pairs:
        if ours.sort == NORM:
            named = {re.split("[./:]", theirs.keys[name])[-1]: theirs.arrays[name] for name in array_moves}
            checked(f"{call}: {theirs.name!r}", named)
        values = {}
        for name, move in array_moves.items():
            check_floating(call, theirs.keys[name], theirs.arrays[name])
            values[name] = jnp.array(move.forward(theirs.arrays[name]), ours.arrays[name].dtype)
        if "count" in ours.arrays and "mean" in values:
            own = ours.arrays["count"]
            values["count"] = jnp.full(own.shape, int(theirs.arrays.get("count", 0)), own.dtype)
        for name, value in values.items():
            path, _, leaf = ours.keys[name].rpartition("/")
            new.setdefault(path, {})[leaf] = value
    converted = {key: trees.replaced(tree, new) for key, tree in variables.items() if key in ("params", "batch_stats")}
    return {**variables, **converted}


def _weights(pairs: Pairs) -> dict[str, np.ndarray]:
    """The arrays for the other library, by their names in its model."""
    weights = {}
    for (theirs, ours, _), array_moves in pairs:
        for name, move in array_moves.items():
            weights[theirs.keys[name]] = plain(move.backward(np.asarray(ours.arrays[name])))
        if "count" in theirs.arrays:
            weights[theirs.keys["count"]] = updates(ours.arrays.get("count"))
    return weights


def _report(arrays, pairs: Pairs) -> Report:
    """The report, in the order of the other library's arrays. Arrays of ours without a counterpart there are last."""
    rows, left = {}, []
    for (theirs, ours, by), array_moves in pairs:
        for name, move in array_moves.items():
            rows[theirs.keys[name]] = Moved(theirs.keys[name], move.theirs, ours.keys[name], move.ours, str(move), by)
        if key := theirs.keys.get("count"):
            own = ours.arrays.get("count")
            done = ("", (), "not counted here") if own is None else (ours.keys["count"], own.shape, "for each feature")
            rows[key] = Moved(key, (), *done, by)
        for name in [name for name in ours.keys if name not in (*array_moves, *theirs.keys)]:
            done = "0: not counted there" if name == "count" and "mean" in array_moves else "stays: not kept there"
            left.append(Moved("", (), ours.keys[name], ours.arrays[name].shape, done, by))
    there = {key: Moved(key, array.shape, "", (), "only for renormalization", "") for key, array in arrays.items()}
    return Report((*(there | rows).values(), *left))


def _no_model(call, model, inputs, flatten, kwargs):
    """Reject arguments that have no effect without a model."""
    passed = {"model": model is not None, "inputs": not isinstance(inputs, tuple) or inputs, "flatten": flatten}
    if unused := [name for name, value in {**passed, **dict.fromkeys(kwargs, True)}.items() if value]:
        raise ValueError(
            f"{call}(model=None): {unused} are for the call of a model. Pass model= too, or leave them out."
        )


def _named_norms(state_dict, variables, names):
    """Convert only the layers in `names`, and list the others."""
    new = {}
    ours = _named("from_torch_model", variables, names)
    for theirs, name in names.items():
        call = f"from_torch_model(names={{{theirs!r}: {name!r}}})"
        if name in new:
            raise ValueError(f"{call}: {name!r} is named twice. Name one PyTorch layer for each.")
        (params, state), (own_params, own_state) = from_torch(state_dict, theirs), ours[name]
        given = params._asdict() | ({} if state is None else state._asdict())
        own = own_params._asdict() | ({} if state is None else own_state._asdict())
        shapes, own_shapes = ({key: v.shape for key, v in side.items() if v is not None} for side in (given, own))
        if own_state.count is None:
            shapes.pop("count", None)
        if shapes != own_shapes:
            raise ValueError(
                f"{call}: PyTorch's layer has {shapes}, the model's {own_shapes}. Give the model's layer as many "
                "features, and set its use_scale and use_bias as PyTorch's affine."
            )
        new[name] = {key: given[key].astype(own[key].dtype) for key in own_shapes}
    converted = {key: trees.replaced(tree, new) for key, tree in variables.items() if key in ("params", "batch_stats")}
    parts = [key.rpartition(".") for key in tensors("from_torch_model", state_dict)]
    tracked = {layer for layer, _, name in parts if name == "running_mean"}
    unmatched = Unmatched(sorted(tracked - {name.rstrip(".") for name in names}), sorted(set(ours) - set(new)))
    return {**variables, **converted}, unmatched


def _named(call, variables, names):
    """The model's batch normalization layers, which must include all of `names`."""
    ours = trees.norms(variables.get("params", {}), variables["batch_stats"])
    for theirs, name in names.items():
        if name not in ours:
            raise ValueError(
                f"{call}(names={{{theirs!r}: {name!r}}}): the model has no such layer. It has {sorted(ours)}."
            )
    return ours
