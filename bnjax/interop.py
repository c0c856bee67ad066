"""Weights and statistics of PyTorch's and Keras's batch normalization, in and out.

Mappings and lists of arrays go in and come out; neither library is imported. `TORCH`, `KERAS` and `FLAX` are the
keyword arguments that make `bn_apply` compute what each library does by default, so that a converted layer goes on
training where it stopped:

    params, state = from_torch(model.state_dict(), "bn1")
    y, state = bn_apply(params, state, x, train=True, **TORCH)

`from_torch` is for one layer, `from_torch_model` for those of a whole Linen or NNX model. PyTorch's `momentum=None` is
`bnjax.cumulative_average`. PyTorch counts the updates of a layer, here each feature has its own count; they differ once
a feature has met a batch with too little in it. Keras does not count. A momentum that depends on the count
(`cumulative_average`, `debiased`) takes statistics of count 0 for those of a new layer: its first update forgets them.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax import trees
from bnjax.functional import BNParams, BNState
from bnjax.moments import wider

TORCH: Mapping[str, Any] = MappingProxyType({"axis": 1, "momentum": 0.9, "epsilon": 1e-5, "unbiased_var": True})
KERAS: Mapping[str, Any] = MappingProxyType({"axis": -1, "momentum": 0.99, "epsilon": 1e-3, "unbiased_var": False})
FLAX: Mapping[str, Any] = MappingProxyType({"axis": -1, "momentum": 0.99, "epsilon": 1e-5, "unbiased_var": False})


def from_torch(state_dict: Mapping[str, Any], prefix: str = "") -> tuple[BNParams, BNState | None]:
    """The parameters and running statistics of a PyTorch BatchNorm1d, 2d, 3d or SyncBatchNorm.

    Args:
      state_dict: of the layer, or of a model that holds it: tensors or arrays, in any floating dtype.
      prefix: the layer's name in the model, such as "layer1.0.bn2".

    Returns:
      BNParams, with None for what the layer does not have (`affine=False`), and BNState, or None for a layer with
      `track_running_stats=False`. Parameters keep their dtype (float64 where jax has it), statistics are float32 or
      wider. The count of each feature is `num_batches_tracked`, 0 where that is missing.

    Raises:
      ValueError: naming the layer, if nothing or only a part of it is there, shapes differ, or a variance is negative.

    Example:
      >>> import numpy as np
      >>> from bnjax import interop
      >>> layer = {"weight": np.ones(3), "bias": np.zeros(3), "running_mean": np.zeros(3), "running_var": np.ones(3)}
      >>> params, state = interop.from_torch({f"bn1.{name}": v for name, v in layer.items()}, "bn1")
      >>> params.scale.shape, state.count.tolist()
      ((3,), [0, 0, 0])
    """
    layer = prefix.rstrip(".")
    lead = f"{layer}." if layer else ""
    call = f"from_torch(prefix={layer!r})"
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    found = {name: state_dict[lead + name] for name in names if lead + name in state_dict}
    if not found:
        near = sorted({key.rpartition(".")[0] for key in state_dict if key.endswith("running_mean")})
        raise ValueError(f"{call}: no {lead}weight and no {lead}running_mean there. Layers with running_mean: {near}.")
    count = found.pop("num_batches_tracked", None)
    arrays = _checked(call, found)
    params = BNParams(*(None if name not in arrays else jnp.asarray(arrays[name]) for name in ("weight", "bias")))
    if count is None and not {"running_mean", "running_var"} & set(arrays):
        return params, None
    return params, _state(call, arrays, 0 if count is None else int(count))


def to_torch(params: BNParams, state: BNState | None, prefix: str = "") -> dict[str, np.ndarray]:
    """What `load_state_dict` of the PyTorch layer takes, once each array went through `torch.from_numpy`.

    Args:
      params: if one of scale and bias is None, it comes out as the 1 or 0 that it stands for, since PyTorch has both
        or neither.
      state: None for a layer with `track_running_stats=False`.
      prefix: the layer's name in the model.

    Returns:
      A dictionary of writable arrays; bfloat16, which `from_numpy` does not know, comes as the same numbers in float32.
      `num_batches_tracked` is the largest count, 0 where nobody counted.

    Raises:
      ValueError: for features on more than one axis.

    Example:
      >>> import bnjax
      >>> from bnjax import interop
      >>> sorted(interop.to_torch(*bnjax.bn_init(3), prefix="bn1"))
      ['bn1.bias', 'bn1.num_batches_tracked', 'bn1.running_mean', 'bn1.running_var', 'bn1.weight']
    """
    scale, bias = params
    if scale is None and bias is not None:
        scale = jnp.ones_like(bias)
    if bias is None and scale is not None:
        bias = jnp.zeros_like(scale)
    layer = {} if scale is None else {"weight": scale, "bias": bias}
    if state is not None:
        layer |= {"running_mean": state.mean, "running_var": state.var}
    layer = _checked("to_torch(...)", layer)
    if state is not None:
        counts = [] if state.count is None else state.count
        layer["num_batches_tracked"] = np.array(np.max(counts, initial=0), np.int64)
    lead = f"{prefix.rstrip('.')}." if prefix else ""
    return {lead + name: np.array(v, np.float32 if v.dtype == jnp.bfloat16 else v.dtype) for name, v in layer.items()}


class Unmatched(NamedTuple):
    """Names of layers: those of the state_dict that went nowhere, and those of the model that got nothing."""

    state_dict: list[str]
    variables: list[str]


def from_torch_model(
    state_dict: Mapping[str, Any], variables: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, Any], Unmatched]:
    """A Linen or NNX model's variables with the batch normalization of a PyTorch model.

    Args:
      state_dict: of the PyTorch model. Only its batch normalization is read.
      variables: `params` and `batch_stats`: what `init` of a Linen model gives, or the variables of
        `bnjax.nnx.functional(model)`, which `nnx.update(model, *variables.values())` puts back into the NNX model.
      names: by the layer's name in the state_dict ("layer1.0.bn2") its path in the variables ("Block_0/BatchNorm_1",
        "layers/1").

    Returns:
      variables: new ones; arrays keep the dtypes that the model's have. A count is set where the model has one. The
        statistics of a layer with `track_running_stats=False` stay the model's.
      unmatched: layers with running statistics on either side that `names` does not have.

    Raises:
      ValueError: naming both layers, if one of them is not there, is named twice, or has another number of features, or
        parameters that the other has not; and for all that `from_torch` refuses.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from bnjax import interop
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> layer = {"weight": np.ones(3), "bias": np.ones(3), "running_mean": np.zeros(3), "running_var": np.ones(3)}
      >>> state_dict = {f"bn1.{name}": array for name, array in layer.items()}
      >>> variables, unmatched = interop.from_torch_model(state_dict, variables, {"bn1": "layers_1"})
      >>> variables["params"]["layers_1"]["bias"].tolist(), unmatched
      ([1.0, 1.0, 1.0], Unmatched(state_dict=[], variables=[]))
    """
    new = {}
    ours = _named("from_torch_model", variables, names)
    for theirs, name in names.items():
        call = f"from_torch_model(names={{{theirs!r}: {name!r}}})"
        if name in new:
            raise ValueError(f"{call}: {name!r} is named twice. Each layer takes the weights of one.")
        (params, state), (own_params, own_state) = from_torch(state_dict, theirs), ours[name]
        given = params._asdict() | ({} if state is None else state._asdict())
        own = own_params._asdict() | ({} if state is None else own_state._asdict())
        shapes, own_shapes = ({key: v.shape for key, v in side.items() if v is not None} for side in (given, own))
        if own_state.count is None:
            shapes.pop("count", None)
        if shapes != own_shapes:
            raise ValueError(
                f"{call}: PyTorch's layer has {shapes}, the model's {own_shapes}. Give the model's layer as many "
                "features, and use_scale and use_bias as the other's affine."
            )
        new[name] = {key: given[key].astype(own[key].dtype) for key in own_shapes}
    converted = {key: trees.replaced(tree, new) for key, tree in variables.items() if key in ("params", "batch_stats")}
    tracked = {key.rpartition(".")[0] for key in state_dict if key.rpartition(".")[2] == "running_mean"}
    unmatched = Unmatched(sorted(tracked - {name.rstrip(".") for name in names}), sorted(set(ours) - set(new)))
    return {**variables, **converted}, unmatched


def to_torch_model(variables: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The batch normalization of a Linen or NNX model, for `load_state_dict(..., strict=False)` of a PyTorch model.

    Args:
      variables, names: as in `from_torch_model`.

    Returns:
      What `to_torch` gives for each of the layers named.

    Raises:
      ValueError: for a layer that is not there.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from bnjax import interop
      >>> variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((1, 2)))
      >>> interop.to_torch_model(variables, {"bn1": ""})["bn1.running_var"].tolist()
      [1.0, 1.0]
    """
    ours = _named("to_torch_model", variables, names)
    return {key: v for theirs, name in names.items() for key, v in to_torch(*ours[name], prefix=theirs).items()}


def from_keras(
    weights: Sequence[Any], scale: bool = True, center: bool = True, count: int = 0
) -> tuple[BNParams, BNState]:
    """The parameters and running statistics of a Keras BatchNormalization.

    Args:
      weights: `layer.get_weights()`: gamma, beta, moving mean and moving variance, those that the layer has.
      scale, center: as the layer was given.
      count: of updates, which Keras does not count; for a momentum that depends on it.

    Returns:
      BNParams and BNState.

    Raises:
      ValueError: for another number of arrays than `scale` and `center` say, shapes that differ, a negative variance.

    Example:
      >>> import numpy as np
      >>> from bnjax import interop
      >>> params, state = interop.from_keras([np.zeros(3), np.zeros(3), np.ones(3)], scale=False)
      >>> params.scale is None, state.var.tolist()
      (True, [1.0, 1.0, 1.0])
    """
    names = [*(["gamma"] * scale), *(["beta"] * center), "moving_mean", "moving_variance"]
    if len(weights) != len(names):
        raise ValueError(
            f"from_keras(scale={scale}, center={center}): expected {names}, got {len(weights)} arrays. "
            "Pass scale and center as the layer was given them."
        )
    arrays = _checked("from_keras(...)", dict(zip(names, weights, strict=True)))
    params = BNParams(*(None if name not in arrays else jnp.asarray(arrays[name]) for name in ("gamma", "beta")))
    statistics = {"running_mean": arrays["moving_mean"], "running_var": arrays["moving_variance"]}
    return params, _state("from_keras(...)", statistics, count)


def to_keras(params: BNParams, state: BNState) -> list[np.ndarray]:
    """What `layer.set_weights` of the Keras layer takes, built with `scale` and `center` for what is not None.

    Raises:
      ValueError: without a state, which a Keras layer always has.

    Example:
      >>> import bnjax
      >>> from bnjax import interop
      >>> [weight.tolist() for weight in interop.to_keras(*bnjax.bn_init(2, scale=None))]
      [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    if state is None:
        raise ValueError("to_keras(state=None): a Keras layer has running statistics. Pass those of bn_init.")
    return [np.array(v) for v in (*params, state.mean, state.var) if v is not None]


def _named(call, variables, names):
    """The model's layers, among which are all that `names` has."""
    ours = trees.norms(variables.get("params", {}), variables["batch_stats"])
    for theirs, name in names.items():
        if name not in ours:
            raise ValueError(
                f"{call}(names={{{theirs!r}: {name!r}}}): the model has no such layer. It has {sorted(ours)}."
            )
    return ours


def _array(value):
    """A NumPy array of an array or a tensor."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy does not have
            return np.asarray(value.float()).astype(jnp.bfloat16)
    return np.asarray(value)


def _checked(call, values):
    """The values as arrays: floating, of one shape of one axis, and no negative variance."""
    arrays = {name: _array(value) for name, value in values.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"{call}: expected arrays of one shape (features,), got {shapes}.")
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{call}: {name} is {array.dtype}. Expected floating numbers.")
        if name in ("running_var", "moving_variance") and (array < 0).any():
            raise ValueError(
                f"{call}: {name} has the negative variance {array.min()}. Something else was stored there."
            )
    return arrays


def _state(call, arrays, count):
    missing = {"running_mean", "running_var"} - set(arrays)
    if missing:
        raise ValueError(f"{call}: {sorted(missing)} missing. A layer has both running statistics or neither.")
    mean, var = (jnp.asarray(arrays[name]) for name in ("running_mean", "running_var"))
    mean, var = (v.astype(wider(v.dtype)) for v in (mean, var))
    return BNState(mean, var, jnp.full(mean.shape, count, jnp.int32))
