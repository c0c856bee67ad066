"""Networks as pure functions on bnjax, whose variables are (params, state), as in `bnjax.bn_init`."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import bnjax
from experiments.harness import data

Placement = Literal["before", "after"]


class Network(NamedTuple):
    """`init`, from a key to (params, state), and `apply`, as `train.fit` expects them."""

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Array, Any]]


def he(fan_in: int) -> float:
    """The standard deviation of kernels that preserves the scale of activations with ReLU (He et al., 2015, eq. 10)."""
    return (2 / fan_in) ** 0.5


def mlp_init(
    key: Array,
    sizes: Sequence[int],
    weight_std: float | Callable[[int], float],
    batch_norm: bool,
    placement: Placement = "before",
) -> tuple[Any, Any]:
    """Variables of a fully connected network: normal kernels, and a bias or batch normalization before each activation.

    Batch normalization has a bias, so the linear layer before it has none (Ioffe & Szegedy, 2015, section 3.2).

    Args:
      key: a jax.random key.
      sizes: number of units, from the inputs to the outputs.
      weight_std: standard deviation of the kernels, or a function of their number of inputs.
      batch_norm: whether the hidden layers are normalized.
      placement: whether batch normalization comes before or after the activation.

    Returns:
      params: for each layer its kernel, and its bias and BNParams if it has them.
      state: for each normalized layer its BNState.
    """
    params, state = [], []
    shapes = list(pairwise(sizes))
    ends = np.cumsum([fan_in * fan_out for fan_in, fan_out in shapes])
    normal = jax.random.normal(key, (ends[-1],))  # one call, because XLA compiles random numbers again for every shape
    for (fan_in, fan_out), numbers in zip(shapes, jnp.split(normal, ends[:-1]), strict=True):
        std = weight_std(fan_in) if callable(weight_std) else weight_std
        normalized = batch_norm and len(params) < len(shapes) - 1
        layer: dict[str, Any] = {"kernel": std * numbers.reshape(fan_in, fan_out)}
        if normalized:
            layer["bn"], bn_state = bnjax.bn_init(fan_out)
            state.append(bn_state)
        if not (normalized and placement == "before"):
            layer["bias"] = jnp.zeros(fan_out)
        params.append(layer)
    return params, state


def mlp_apply(
    params: Any,
    state: Any,
    x: Array,
    train: bool,
    activation: Callable[[Array], Array] = jax.nn.sigmoid,
    normalize: Callable[..., tuple[Array, Any]] = bnjax.bn_apply,
    placement: Placement = "before",
    **options: Any,
) -> tuple[Array, Any]:
    """Logits of shape (batch, classes) and the new state. `options` are passed to `normalize`."""
    new_state = []

    def normalized(layer, x):
        if "bn" in layer:
            x, bn_state = normalize(layer["bn"], state[len(new_state)], x, train, **options)
            new_state.append(bn_state)
        return x

    for layer in params:
        x = x @ layer["kernel"]
        if "bias" in layer:
            x = x + layer["bias"][None]
        if layer is params[-1]:
            break
        x = normalized(layer, activation(x)) if placement == "after" else activation(normalized(layer, x))
    return x, new_state


def mlp(
    dataset: data.Dataset,
    hidden: Sequence[int],
    batch_norm: bool,
    weight_std: float | Callable[[int], float] = he,
    placement: Placement = "before",
    **options: Any,
) -> Network:
    """A fully connected network for a data set. `options` are passed to `mlp_apply`.

    The momentum is 0.9, a short memory, because many of these networks train for only a few hundred steps.
    """
    sizes = (dataset.train_images[0].size, *hidden, dataset.classes)
    init = partial(mlp_init, sizes=sizes, weight_std=weight_std, batch_norm=batch_norm, placement=placement)
    return Network(init, partial(mlp_apply, placement=placement, **{"momentum": 0.9} | options))
