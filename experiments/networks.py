"""Networks as pure functions on bnjax: their variables are (params, state), like those of `bnjax.bn_init`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import bnjax


def mlp_init(key: Array, sizes: Sequence[int], weight_std: float, batch_norm: bool) -> tuple[Any, Any]:
    """Variables of a fully connected network: normal kernels, and a bias or batch normalization before each activation.

    Batch normalization has a bias of its own, so that the linear layer before it has none (section 3.2 of the paper).

    Args:
      key: a jax.random key.
      sizes: number of units, from the inputs to the outputs.
      weight_std: standard deviation of the kernels.
      batch_norm: whether the hidden layers are normalized.

    Returns:
      params: for each layer its kernel and either its bias or its BNParams; state: for each hidden layer its BNState.
    """
    params, state = [], []
    for i, fan_in, fan_out in zip(range(len(sizes)), sizes[:-1], sizes[1:], strict=False):
        layer: dict[str, Any] = {
            "kernel": weight_std * jax.random.normal(jax.random.fold_in(key, i), (fan_in, fan_out))
        }
        if batch_norm and i < len(sizes) - 2:
            layer["bn"], bn_state = bnjax.bn_init(fan_out)
            state.append(bn_state)
        else:
            layer["bias"] = jnp.zeros(fan_out)
        params.append(layer)
    return params, state


def mlp_apply(
    params: Any, state: Any, x: Array, train: bool, activation: Callable[[Array], Array] = jax.nn.sigmoid, **bn: Any
) -> tuple[Array, Any]:
    """Logits of shape (batch, classes) and the new state; `bn` are options of `bnjax.bn_apply`."""
    new_state = []
    for layer in params:
        x = x @ layer["kernel"]
        if "bn" in layer:
            x, bn_state = bnjax.bn_apply(layer["bn"], state[len(new_state)], x, train, **bn)
            new_state.append(bn_state)
        else:
            x = x + layer["bias"][None]
        x = x if layer is params[-1] else activation(x)
    return x, new_state
