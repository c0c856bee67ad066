"""The options of layers of PyTorch, Keras and Flax, read from the layers themselves, without importing a library.

A layer is read only if the code that computes it is the library's own; the effect of other layers' options is not
known.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from bnjax.interop.keras_models import layers_by_path
from bnjax.interop.torch_modules import modules

Padding = str | Sequence[tuple[int, int]]


class Convolution(NamedTuple):
    """The options of a convolution or a transposed convolution. A sequence has an element for each spatial axis."""

    strides: Sequence[int]
    dilation: Sequence[int]
    padding: Padding  # by name as in Flax, or pairs; of a transposed convolution, those of `lax.conv_transpose`
    mode: str = "zeros"
    groups: int = 1
    input_dilation: Sequence[int] = ()  # empty for 1
    unsure: bool = False  # whether the model may pad the input before it gets here


class Normalization(NamedTuple):
    """What a normalization takes its statistics over, and its epsilon."""

    kind: str  # "batch", "layer", "rms" or "group"
    epsilon: float
    groups: int = 0


class Unread(NamedTuple):
    """Why the options of a layer are not known."""

    why: str


Options = Convolution | Normalization | Unread | None  # None for a layer without options


def read_torch(model: Any) -> dict[str, Options]:
    """The options of the layers of a PyTorch module, by their names."""
    named = modules(model)
    pads = _pads_elsewhere(named.values())
    return {name: _torch(module, pads) for name, module in named.items()}


def read_keras(model: Any) -> dict[str, Options]:
    """The options of the layers of a Keras model, by the paths of their weights."""
    found: dict[str, Options] = {}
    pads = _pads_elsewhere(model._flatten_layers())
    for path, layer in layers_by_path(model).items():
        found[path] = options = _keras(layer, pads)
        if "BaseSeparableConv" in _classes(layer, "keras.") and isinstance(options, Convolution):
            ones = (1,) * len(options.strides)
            found |= {f"{path}/depthwise": options, f"{path}/pointwise": Convolution(ones, ones, "VALID")}
    return found


def read_flax(module: Any, shapes: Mapping[str, Sequence[int]]) -> Options:
    """The options of a Linen or NNX module whose arrays have these shapes."""
    kinds = _classes(module, "flax.", "bnjax.")
    if not _computes(module, "__call__", "flax.", "bnjax."):
        return Unread(f"{type(module).__name__} has a __call__ of its own")
    if {"Conv", "ConvTranspose"} & kinds:
        rank, padding = len(shapes["kernel"]) - 2, module.padding
        strides, dilation, into = (
            _tuple(getattr(module, name, None), rank) for name in ("strides", "kernel_dilation", "input_dilation")
        )
        if "ConvTranspose" in kinds and padding in ("CIRCULAR", "CAUSAL"):
            return Unread(f"its padding {padding} is not compared")
        mode = padding.lower() if padding in ("CIRCULAR", "REFLECT") else "zeros"
        if not isinstance(padding, str):
            padding = [(p, p) if isinstance(p, int) else tuple(p) for p in _tuple(padding, rank)]
        return Convolution(strides, dilation, padding, mode, getattr(module, "feature_group_count", 1), into)
    size = next(iter(shapes.values()))[0]
    if "GroupNorm" in kinds:
        groups = size // module.group_size if module.group_size else module.num_groups
        return Normalization("group", module.epsilon, groups)
    if "InstanceNorm" in kinds:
        return Normalization("group", module.epsilon, size)
    for kind, name in (("batch", "BatchNorm"), ("layer", "LayerNorm"), ("rms", "RMSNorm")):
        if name in kinds:
            known = getattr(module, "reduction_axes", -1) in (-1, (-1,))
            return Normalization(kind, module.epsilon) if known else Unread("its reduction_axes are not compared")
    if "epsilon" in dir(module) and "mean" in shapes:
        return Normalization("batch", module.epsilon)
    return None if {"Dense", "Linear", "Embed"} & kinds else Unread(f"{type(module).__name__} is not a layer of Flax")


def _torch(module, pads):
    kinds = _classes(module, "torch.")
    if not _computes(module, "forward", "torch.") or not _computes(module, "_conv_forward", "torch."):
        return Unread(f"{type(module).__name__} has a forward of its own")
    if "_ConvNd" in kinds:
        return _torch_convolution(module, pads)
    if "_InstanceNorm" in kinds and not module.track_running_stats:
        return Normalization("group", module.eps, module.num_features)
    if "_NormBase" in kinds:
        return Normalization("batch", module.eps)
    if "GroupNorm" in kinds:
        return Normalization("group", module.eps, module.num_groups)
    if "LayerNorm" in kinds:
        return Normalization("layer", module.eps)
    if "RMSNorm" in kinds:
        dtype = str(module.weight.dtype).removeprefix("torch.")
        return Normalization("rms", float(jnp.finfo(dtype).eps) if module.eps is None else module.eps)
    if "Embedding" in kinds and module.max_norm is not None:
        return Unread(f"its max_norm {module.max_norm} has no counterpart in Flax")
    return None if {"Linear", "Embedding"} & kinds else Unread(f"{type(module).__name__} is not a layer of PyTorch")


def _torch_convolution(module, pads):
    padding = module.padding
    if module.transposed:
        window = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        low = [w - p for w, p in zip(window, padding, strict=True)]
        padding = [(a, a + more) for a, more in zip(low, module.output_padding, strict=True)]
    elif isinstance(padding, str):
        padding = padding.upper()
    else:
        pads, padding = pads and not any(padding), [(p, p) for p in padding]
    unsure = pads and not module.transposed and padding != "SAME"
    return Convolution(module.stride, module.dilation, padding, module.padding_mode, module.groups, (), unsure)


def _keras(layer, pads):
    kinds = _classes(layer, "keras.")
    if not _computes(layer, "call", "keras."):
        return Unread(f"{type(layer).__name__} has a call of its own")
    if any("Conv" in kind for kind in kinds):
        return _keras_convolution(layer, kinds, pads)
    for kind, name in (("batch", "Batch"), ("layer", "Layer"), ("group", "Group"), ("rms", "RMS")):
        if f"{name}Normalization" in kinds:
            groups = getattr(layer, "groups", 0)
            return Normalization(kind, layer.epsilon, layer.weights[0].shape[0] if groups == -1 else groups)
    return None if {"Dense", "Embedding"} & kinds else Unread(f"{type(layer).__name__} is not a layer of Keras")


def _keras_convolution(layer, kinds, pads):
    padding, groups = layer.padding.upper(), getattr(layer, "groups", 1)
    if any("Depthwise" in kind or "Separable" in kind for kind in kinds):
        groups = layer.weights[0].shape[-2]
    if any("Transpose" in kind for kind in kinds):
        if layer.output_padding is not None:
            sizes = zip(layer.kernel_size, layer.dilation_rate, layer.output_padding, strict=True)
            padding = [_keras_transposed((k - 1) * d + 1, padding, more) for k, d, more in sizes]
    elif padding == "VALID" and pads:
        try:
            before = layer.input._keras_history.operation
        except (AttributeError, ValueError):  # a layer of a model that is not a graph, or one that is called twice
            before = None
        pads = before is None or type(before).__name__ == "InputLayer"  # of a nested model
        if before is not None and type(before).__name__.startswith("ZeroPadding"):
            padding = before.padding if isinstance(before.padding[0], tuple) else [before.padding]
    return Convolution(layer.strides, layer.dilation_rate, padding, groups=groups, unsure=pads and padding == "VALID")


def _keras_transposed(window, padding, more):
    """The padding of `lax.conv_transpose`, for Keras's `output_padding`."""
    if padding == "VALID":
        return window - 1, window - 1 + more
    total = window + window % 2 - 2 + more
    low = min(-(-total // 2), window - 1)
    return low, total - low


def _classes(layer, *libraries):
    return {cls.__name__ for cls in type(layer).__mro__ if cls.__module__.startswith(libraries)}


def _computes(layer, method, *libraries):
    """Whether a layer's method is the library's own, or missing."""
    function = vars(layer).get(method, getattr(type(layer), method, None))
    return function is None or str(getattr(function, "__module__", "")).startswith(libraries)


def _pads_elsewhere(layers: Iterable[Any]) -> bool:
    """Whether a model pads outside convolutions: in a padding layer, or in code of its own that calls a `pad`."""
    for layer in layers:
        if any("Pad" in cls.__name__ for cls in type(layer).__mro__):
            return True
        for function in vars(type(layer)).values():
            own = not str(getattr(function, "__module__", "")).startswith(("torch.", "keras."))
            if own and "pad" in getattr(getattr(function, "__code__", None), "co_names", ()):
                return True
    return False


def _tuple(value, rank):
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)
