"""Arrays from other libraries, read and checked."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


def tensors(call: str, state_dict: Any) -> Mapping[str, Any]:
    """The tensors of a PyTorch module by name, from the module or its state_dict."""
    if callable(getattr(state_dict, "state_dict", None)):
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"{call}(state_dict=...): expected a mapping of names to tensors, got {type(state_dict).__name__}. "
            "Pass module.state_dict(), or the module."
        )
    for name, value in state_dict.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"{call}(state_dict=...): {name!r} is a mapping of {len(value)} entries, not a tensor. If it holds "
                f"the tensors, pass state_dict[{name!r}]."
            )
    return state_dict


def keras_arrays(call: str, weights: Any) -> dict[str, np.ndarray]:
    """The arrays of a Keras model by path, from the model, a mapping, or pairs."""
    if hasattr(weights, "weights"):
        weights = [(weight.path, weight) for weight in weights.weights]
    pairs = list(weights.items() if isinstance(weights, Mapping) else weights)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError(
            f"{call}(weights=...): expected a Keras model, or arrays by path, got {type(weights).__name__}. "
            "get_weights() has no paths: pass the model, or [(w.path, w) for w in model.weights]."
        )
    twice = sorted({path for path, _ in pairs if [p for p, _ in pairs].count(path) > 1})
    if twice:
        raise ValueError(f"{call}(weights=...): several weights have the paths {twice}. Give the layers names.")
    return {path: as_array(weight) for path, weight in pairs}


def plain(value: Any) -> np.ndarray:
    """A writable NumPy array. bfloat16 is widened to float32, because `torch.from_numpy` does not accept it."""
    return np.array(value, np.float32 if value.dtype == jnp.bfloat16 else value.dtype, order="C")


def updates(count: Any) -> np.ndarray:
    """`num_batches_tracked` from the counts of the features: the largest count, or 0 without counts."""
    return np.array(np.max([] if count is None else count, initial=0), np.int64)


def as_array(value: Any) -> np.ndarray:
    """An array or a PyTorch tensor as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # PyTorch cannot convert it, because NumPy itself has no bfloat16
            return np.asarray(value.float()).astype(jnp.bfloat16)
    return np.asarray(value)


def as_arrays(call: str, values: Mapping[str, Any]) -> Arrays:
    """Arrays and PyTorch tensors, by name, as NumPy arrays."""
    for name, value in values.items():
        if hasattr(value, "materialize") or getattr(value, "is_meta", False):
            raise ValueError(
                f"{call}: {name!r} has no values yet: its module is lazy, or on the meta device. Call the lazy module "
                "once, or load the values, before the conversion."
            )
        if not hasattr(value, "shape") and not isinstance(value, list | float | int):
            raise ValueError(
                f"{call}: {name!r} is a {type(value).__name__}, not a tensor. Leave it out; convert a quantized module "
                "as it was before quantization."
            )
    return {name: as_array(value) for name, value in values.items()}


def checked(call: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values as arrays. They must be floating, of the same shape (features,), without a negative variance."""
    arrays = as_arrays(call, values)
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"{call}: expected arrays of one shape (features,), got {shapes}.")
    for name, array in arrays.items():
        check_floating(call, name, array)
        if name in ("running_var", "moving_variance") and (array < 0).any():
            raise ValueError(f"{call}: {name} has the negative variance {array.min()}. Check that it holds variances.")
    return arrays


def check_floating(call: str, name: str, array: Any) -> None:
    """Reject an array of integers or booleans, such as an index stored among the weights."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{call}: {name} is {array.dtype}. Expected floating numbers.")
