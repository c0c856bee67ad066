"""Conversion of a single layer of batch normalization from and to PyTorch and Keras."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.core.moments import wider
from bnjax.core.records import BNParams, BNState
from bnjax.interop.arrays import as_array, checked, plain, tensors, updates
from bnjax.interop.keras_models import RENORM, renorm_statistics
from bnjax.interop.torch_modules import check_computed, is_batch_norm, modules

_PARTS = ("weight_", "bias_", "parametrizations.")  # beginnings of the tensors that a weight or bias is computed from


def from_torch(state_dict: Any, prefix: str = "") -> tuple[BNParams, BNState | None]:
    """The parameters and running statistics of a PyTorch BatchNorm1d, 2d, 3d or SyncBatchNorm.

    `scale` is PyTorch's weight, `mean` and `var` are running_mean and running_var. Pass `**TORCH` to `bn_apply`, whose
    momentum is 1 minus PyTorch's.

    Args:
      state_dict: state_dict of the layer, or of a model that holds it: floating tensors or arrays by name, of shape
        (features,). The PyTorch module itself is accepted too, and its class is then checked.
      prefix: the layer's name in the model, such as "layer1.0.bn2".

    Returns:
      params: BNParams in the dtypes of the tensors (float64 needs jax_enable_x64); scale and bias are None for a layer
        with `affine=False`, bias also for one with `bias=False`.
      state: BNState in float32 or wider, or None for a layer with `track_running_stats=False`. The count of each
        feature is `num_batches_tracked`, or 0 without that tensor.

    Raises:
      ValueError: for a state_dict that is not a mapping of tensors, a layer that is missing, incomplete or of another
        kind, tensors without values, a weight that is pruned or otherwise computed from other tensors, shapes that
        differ, or a negative variance.

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
    module = modules(state_dict).get(layer)
    state_dict = tensors("from_torch", state_dict)
    check_computed(call, {k: v for k, v in state_dict.items() if k.startswith(tuple(lead + part for part in _PARTS))})
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    found = {name: state_dict[lead + name] for name in names if lead + name in state_dict}
    if (
        not found and module is not None and is_batch_norm(module) and not module.state_dict()
    ):  # a compiled one has tensors of other names
        return BNParams(None, None), None
    if not found:
        near = sorted({key.rpartition(".")[0] for key in state_dict if key.endswith("running_mean")})
        raise ValueError(
            f"{call}: the state_dict has no {lead}weight and no {lead}running_mean. Layers with running_mean: {near}. "
            "A BatchNorm without any tensor is known only if the module itself is passed."
        )
    if module is not None and not is_batch_norm(module):
        raise ValueError(
            f"{call}: expected a BatchNorm, got {type(module).__name__}. Pass the name of a layer of batch "
            "normalization, or convert a whole model by from_torch_model."
        )
    count = found.pop("num_batches_tracked", None)
    arrays = checked(call, found)
    params = BNParams(*(None if name not in arrays else jnp.asarray(arrays[name]) for name in ("weight", "bias")))
    if count is None and not {"running_mean", "running_var"} & set(arrays):
        return params, None
    return params, _state(call, arrays, 0 if count is None else int(count))


def to_torch(params: BNParams, state: BNState | None, prefix: str = "") -> dict[str, np.ndarray]:
    """The state_dict of a PyTorch layer: apply `torch.from_numpy` to each array, then `load_state_dict`.

    Args:
      params: scale and bias of shape (features,), or None. A bias of None is left out, as in a layer with `bias=False`;
        a PyTorch layer that has a bias needs zeros. A scale of None with a bias becomes ones, because no PyTorch layer
        has only a bias.
      state: running statistics, or None for a layer with `track_running_stats=False`.
      prefix: the layer's name in the model.

    Returns:
      A dictionary of writable arrays in the dtypes of params and state; bfloat16 becomes float32, because
      `torch.from_numpy` does not accept it. `num_batches_tracked` is the largest count, or 0 without counts.

    Raises:
      ValueError: for features on more than one axis.

    Example:
      >>> import bnjax
      >>> from bnjax import interop
      >>> sorted(interop.to_torch(*bnjax.bn_init(3), prefix="bn1"))
      ['bn1.bias', 'bn1.num_batches_tracked', 'bn1.running_mean', 'bn1.running_var', 'bn1.weight']
    """
    if isinstance(params[0], BNParams):
        raise ValueError(
            "to_torch(params=...): got params and state in one tuple. Pass both, as in to_torch(params, state)."
        )
    scale, bias = params
    if scale is None and bias is not None:
        scale = jnp.ones_like(bias)
    layer = {name: v for name, v in (("weight", scale), ("bias", bias)) if v is not None}
    if state is not None:
        layer |= {"running_mean": state.mean, "running_var": state.var}
    layer = checked("to_torch(...)", layer)
    if state is not None:
        layer["num_batches_tracked"] = updates(state.count)
    lead = f"{prefix.rstrip('.')}." if prefix else ""
    return {lead + name: plain(v) for name, v in layer.items()}


def from_keras(weights: Any, scale: bool = True, center: bool = True, count: int = 0) -> tuple[BNParams, BNState]:
    """The parameters and running statistics of a Keras BatchNormalization.

    Pass `**KERAS` to `bn_apply`, which has Keras's momentum and epsilon, and the layer's own options where they differ.
    For a layer with renorm=True, the state holds what Keras uses in evaluation, the moving mean and variance; training
    with `renorm_bn_apply` corrects towards them, and not towards Keras's renorm_mean and renorm_stddev.

    Args:
      weights: the layer itself, built, or `layer.get_weights()`: gamma, beta, moving mean and moving variance of shape
        (features,). Gamma is missing if `scale` is False, beta if `center` is False. If the layer has renorm=True,
        moving_stddev, renorm_mean and renorm_stddev follow, which are not converted.
      scale, center: the arguments of the Keras layer. They need not be passed with the layer itself.
      count: number of updates, >= 0, for a momentum that depends on it; Keras does not count them.

    Returns:
      params: BNParams in the dtypes of the weights, with None for a missing gamma or beta.
      state: BNState in float32 or wider.

    Raises:
      ValueError: if `scale` and `center` require another number of arrays, if the layer is not built or is of another
        kind, if shapes differ, or if a variance is negative.

    Example:
      >>> import numpy as np
      >>> from bnjax import interop
      >>> params, state = interop.from_keras([np.zeros(3), np.zeros(3), np.ones(3)], scale=False)
      >>> params.scale is None, state.var.tolist()
      (True, [1.0, 1.0, 1.0])
    """
    if isinstance(weights, Mapping):
        raise ValueError(
            "from_keras(weights=...): expected the layer or layer.get_weights(), got a mapping. A mapping of paths to "
            "arrays is converted by from_keras_model."
        )
    if not hasattr(weights, "__len__"):
        own = _keras_facts("from_keras(weights=...)", weights)
        if (not scale and own.scale) or (not center and own.center):
            raise ValueError(
                f"from_keras(scale={scale}, center={center}): the layer has scale={own.scale}, center={own.center}. "
                "Leave both out if you pass the layer."
            )
        weights, scale, center = [as_array(w) for w in own.weights], own.scale, own.center
    names = [*(["gamma"] * scale), *(["beta"] * center), "moving_mean", "moving_variance"]
    if len(weights) - len(names) not in (0, len(RENORM)):
        raise ValueError(
            f"from_keras(scale={scale}, center={center}): expected {names}, and with renorm=True {list(RENORM)} too, "
            f"got {len(weights)} arrays. Pass the layer itself, or its scale and center."
        )
    arrays = checked("from_keras(...)", dict(zip(names, weights, strict=False)))
    params = BNParams(*(None if name not in arrays else jnp.asarray(arrays[name]) for name in ("gamma", "beta")))
    statistics = {"running_mean": arrays["moving_mean"], "running_var": arrays["moving_variance"]}
    return params, _state("from_keras(...)", statistics, count)


def to_keras(params: BNParams, state: BNState, layer: Any = None) -> list[np.ndarray]:
    """The weights of a Keras BatchNormalization, for `layer.set_weights`.

    Args:
      params: scale and bias of shape (features,). The Keras layer needs scale=False if scale is None, and center=False
        if bias is None.
      state: running statistics.
      layer: the Keras layer, built. Its scale and center are then checked. A layer with renorm=True must be passed,
        because it has more weights; its renormalization starts from the running statistics.

    Returns:
      Arrays in the dtypes of params and state: gamma, beta, moving mean and moving variance; with renorm=True
      moving_stddev, renorm_mean and renorm_stddev too.

    Raises:
      ValueError: if state is None, because a Keras layer always has running statistics, or if the layer is not built,
        is of another kind, or differs in its scale, center or number of features.

    Example:
      >>> import bnjax
      >>> from bnjax import interop
      >>> [weight.tolist() for weight in interop.to_keras(*bnjax.bn_init(2, scale=None))]
      [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    if state is None:
        raise ValueError("to_keras(state=None): a Keras layer has running statistics. Pass the state of bn_init.")
    weights = [np.array(v) for v in (*params, state.mean, state.var) if v is not None]
    if layer is None:
        return weights
    own = _keras_facts("to_keras(layer=...)", layer)
    if (own.scale, own.center) != (params.scale is not None, params.bias is not None):
        raise ValueError(
            f"to_keras(layer=...): the layer has scale={own.scale}, center={own.center}, but scale and bias are "
            f"{['present', 'None'][params.scale is None]} and {['present', 'None'][params.bias is None]}. Build the "
            "layer accordingly."
        )
    if own.moving_mean.shape != state.mean.shape:
        raise ValueError(
            f"to_keras(layer=...): the layer has features {own.moving_mean.shape}, the state {state.mean.shape}."
        )
    return weights + (renorm_statistics(weights[-2], weights[-1], own.epsilon) if hasattr(own, RENORM[0]) else [])


def _keras_facts(call, layer):
    """The layer, which must be a built BatchNormalization."""
    if not hasattr(layer, "moving_variance") or not hasattr(layer, "get_weights"):
        raise ValueError(
            f"{call}: expected a BatchNormalization or its get_weights(), got {type(layer).__name__}. A whole model is "
            "converted by from_keras_model and to_keras_model."
        )
    if layer.moving_variance is None:
        raise ValueError(f"{call}: the layer {layer.name!r} has no weights yet. Call it once, or layer.build(shape).")
    return layer


def _state(call, arrays, count):
    missing = {"running_mean", "running_var"} - set(arrays)
    if missing:
        raise ValueError(f"{call}: {sorted(missing)} is missing. A layer has both running statistics or neither.")
    mean, var = (jnp.asarray(arrays[name]) for name in ("running_mean", "running_var"))
    mean, var = (v.astype(wider(v.dtype)) for v in (mean, var))
    return BNState(mean, var, jnp.full(mean.shape, count, jnp.int32))
