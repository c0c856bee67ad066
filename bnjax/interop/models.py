"""Conversion of whole models of PyTorch and Keras to the variables of Flax models, and back."""

from collections.abc import Mapping
from typing import Any, overload

import numpy as np

from bnjax.core import trees
from bnjax.interop import keras_models, torch_modules
from bnjax.interop.arrays import tensors
from bnjax.interop.kernels import TORCH
from bnjax.interop.layers import from_torch, to_torch
from bnjax.interop.match import TORCH_NAMES, Moved, Report
from bnjax.interop.options import compare
from bnjax.interop.pairs import check_names, matched, moved, no_model, rows, weights_of
from bnjax.interop.verify import verify


def from_torch_model(
    state_dict: Any,
    variables: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    model: Any = None,
    inputs: Any = (),
    flatten: Mapping[str, tuple[int, ...]] | None = None,
    expected: Any = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], Report]:
    """Convert a PyTorch model to the variables of a Linen or NNX model.

    Every tensor of the state_dict is converted to one array of the variables; a tensor or an array without a
    counterpart is an error. Layers are convolutions (grouped and depthwise ones included), transposed convolutions,
    dense layers, embeddings, and normalizations with and without running statistics. Layers of the same name belong
    together ("layer1.0.bn2" is "layer1/0/bn2" and "layer1_0/bn2", and prefixes such as "module." are not part of a
    name). The others are matched in order: PyTorch's layers in the order of the state_dict, the Flax model's in the
    order of their calls; kinds and shapes must agree, and names must not contradict the order. The report says what
    matched each layer. Check the layers of one shape that "order" matched, correct a wrong match by `names`, and pass
    `expected`.

    Kernels are transposed as each layer requires. PyTorch flattens an image as (channels, height, width), Flax as
    (height, width, channels). If the features of a dense layer or of a normalization are a flattened image, or become
    an image, they are reordered accordingly.

    Options are not converted: epsilon, padding and strides are the Flax model's. If the PyTorch model itself is passed
    with the Flax model, options that affect its outputs in evaluation must agree. PyTorch's `padding=1` is ((1, 1), (1,
    1)) in Flax, which with strides differs from "SAME"; its `ConvTranspose(k, padding=p)` is padding k - 1 - p.

    Args:
      state_dict: state_dict of the PyTorch model, or the model itself, which also gives the kinds of its layers, and
        the layers without tensors. Weights that PyTorch computes at each call, as weight_norm does, must be put back
        first.
      variables: `params` and `batch_stats`, from `init` of a Linen model, or from `bnjax.nnx.functional(model)` of an
        NNX model, into which `nnx.update(model, *variables.values())` puts the result.
      names: by a layer's name in the state_dict ("layer1.0.bn2"), its path in the variables ("Block_0/BatchNorm_1",
        "layers/1"). With a `model`, the other layers of a sort named here (convolutions, dense layers and embeddings,
        normalizations, other tensors) are matched by name or shape, not by order. A parameter of no known layer, such
        as the position embedding of a transformer, must be named with its whole path, and is converted unchanged.
        Without a `model`, only the batch normalization layers named here are converted.
      model: the Linen or NNX model. Without it, layers are ordered by the numbers in their paths. Convolutions, and
        paths that do not determine the order, are then an error, and flattened images are not recognized.
      inputs: an input of the model's call, or a tuple of inputs. The model is traced with them, not run.
      flatten: by the path of a dense layer or a normalization, the shape (height, width, channels) of the image that is
        flattened into it, or () if none is. It is needed if the model flattens its own input, or joins a flattened
        image with other features.
      expected: outputs of the PyTorch model in evaluation for `inputs`, as the Flax model returns them, with channels
        last. The Flax model then runs with the new variables, and must return them, up to rounding; options may then
        differ. If the PyTorch model itself was passed, the error names the first layer that differs.
      **kwargs: keyword arguments of the model's call, such as train=False.

    Returns:
      variables: the new variables, in the dtypes of the old ones. A count is set if the model has one. A layer with
        `track_running_stats=False` leaves the model's running statistics as they are. Because a state_dict does not
        distinguish it from a LayerNorm, pass the PyTorch model, or name the layer.
      report: a `Report` of every tensor, which prints as a table. Its last rows are the arrays that PyTorch does not
        keep, and the layers whose options could not be compared because their classes override the computation. With
        `names` and no model, the other tensors are "not named".

    Raises:
      ValueError: if a layer has no counterpart, has an ambiguous match, is named twice, or differs in shapes,
        parameters or options; if outputs differ from `expected`; and for a state_dict that is not a mapping, an array
        that is not floating, or a negative variance.

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
        no_model(call, None, inputs, flatten, kwargs if expected is None else {**kwargs, "expected": expected})
        return _named_norms(state_dict, variables, names)
    arrays, theirs = torch_modules.model_layers(call, state_dict, variables)
    pairs = matched(call, TORCH, theirs, variables, names, model, inputs, flatten, kwargs)
    torch_modules.check_untracked(call, state_dict, [pair for pair, _ in pairs])
    new = moved(call, variables, pairs)
    unread = verify(call, TORCH, state_dict, pairs, model, new, inputs, kwargs, expected)
    return new, Report(rows(arrays, pairs), unread)


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
      report: as in `from_torch_model`. Without a `state_dict` argument, only the new state_dict is returned.

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
                "model, or names= to convert only batch normalization layers."
            )
        no_model(call, model, inputs, flatten, kwargs)
        ours = _named(call, variables, names)
        return {key: v for theirs, name in names.items() for key, v in to_torch(*ours[name], prefix=theirs).items()}
    arrays, theirs = torch_modules.model_layers(call, state_dict, variables)
    pairs = matched(call, TORCH, theirs, variables, names, model, inputs, flatten, kwargs)
    torch_modules.check_untracked(call, state_dict, [pair for pair, _ in pairs])
    unread = compare(call, TORCH, state_dict, pairs)
    converted = weights_of(pairs)
    return {key: converted[key] for key in arrays}, Report(rows(arrays, pairs), unread)


def from_keras_model(
    weights: Any,
    variables: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    model: Any = None,
    inputs: Any = (),
    flatten: Mapping[str, tuple[int, ...]] | None = None,
    expected: Any = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], Report]:
    """Convert a Keras model to the variables of a Linen or NNX model.

    Layers are matched and their options compared as in `from_torch_model`, in the order of Keras's `model.weights`.
    They are Dense, Embedding, Conv, DepthwiseConv, SeparableConv (two convolutions in Flax), ConvTranspose, and
    normalizations. Of a layer with renorm=True, the moving mean and variance are converted.

    A Keras model may have its channels first. A plain `Flatten` then flattens (channels, height, width), and features
    are reordered as for PyTorch. The axes of normalizations and dense layers are compared with those of the Flax model.
    None of this is known if only arrays are passed; their channels are assumed to be last.

    Args:
      weights: the Keras model, or its arrays by path ("block/dense/kernel"), as a mapping or a sequence of pairs.
      names: by the path of a Keras layer ("block/dense"), the path of the Flax layer, for layers to match by name.
      variables, model, inputs, flatten, expected, **kwargs: as in `from_torch_model`.

    Returns:
      variables: the new variables, in the dtypes of the old ones. Counts are 0, because Keras does not count updates.
      report: a `Report` of every array, which prints as a table; counts are its last rows.

    Raises:
      ValueError: as `from_torch_model`; if a layer has its features on another axis than the Flax layer; and if images
        of two data formats, axes permuted before a Flatten, or a Flatten that moves channels and a Reshape that does
        not, leave an order unclear.

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
    pairs = matched(call, library, theirs, variables, names, model, inputs, flatten, kwargs)
    keras_models.check_axes(call, weights, [pair for pair, _ in pairs])
    new = moved(call, variables, pairs)
    unread = verify(call, library, weights, pairs, model, new, inputs, kwargs, expected)
    return new, Report(rows(arrays, pairs), unread)


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
        renorm=True layer it must be the model. Renormalization then starts from the running statistics.
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
    pairs = matched(call, library, theirs, variables, names, model, inputs, flatten, kwargs)
    keras_models.check_axes(call, weights, [pair for pair, _ in pairs])
    unread = compare(call, library, weights, pairs)
    converted = weights_of(pairs)
    converted |= keras_models.renorm_weights(call, weights, arrays, converted)
    return [converted[key] for key in arrays], Report(rows(arrays, pairs), unread)


# PyTorch's names of the variables of a layer.
_TENSORS = {"scale": "weight"} | {ours: theirs for theirs, ours in TORCH_NAMES.items()}


def _named_norms(state_dict, variables, names):
    """Convert only the layers in `names`; the report lists the others."""
    new, moved_from = {}, {}
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
        moved_from[name] = theirs
    converted = {key: trees.replaced(tree, new) for key, tree in variables.items() if key in ("params", "batch_stats")}
    arrays, found, left = tensors("from_torch_model", state_dict), {}, []
    for name, (params, state) in ours.items():
        for key, array in (params._asdict() | state._asdict()).items():
            path = f"{name}/{key}".lstrip("/")
            if name in new and (key in new[name] or key == "count"):
                tensor = f"{moved_from[name].rstrip('.')}.{_TENSORS[key]}".lstrip(".")
                done = ("", (), "not counted here") if array is None else (path, array.shape, "as it is")
                found[tensor] = Moved(tensor, np.shape(arrays.get(tensor, 0)), *done, "names")
            elif array is not None:
                left.append(
                    Moved("", (), path, array.shape, f"stays: not {'kept there' if name in new else 'named'}", "")
                )
    there = {key: Moved(key, array.shape, "", (), "not named", "") for key, array in arrays.items()}
    return {**variables, **converted}, Report(
        (*(there | {k: v for k, v in found.items() if k in there}).values(), *left)
    )


def _named(call, variables, names):
    """The model's batch normalization layers, which must include all of `names`."""
    check_names(call, names)
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        raise ValueError(
            f"{call}(variables=...): expected a mapping with batch_stats, got {type(variables).__name__}"
            f"{f' of {list(variables)}' if isinstance(variables, Mapping) else ''}. Pass the result of a Linen model's "
            "init, or bnjax.nnx.functional(model)[1] of an NNX model."
        )
    ours = trees.norms(variables.get("params", {}), variables["batch_stats"])
    for theirs, name in names.items():
        if name not in ours:
            raise ValueError(
                f"{call}(names={{{theirs!r}: {name!r}}}): the model has no such layer. It has {sorted(ours)}."
            )
    return ours
