"""Networks as pure functions on bnjax, whose variables are (params, state), as in `bnjax.bn_init`.

A network is a list of layers. A fully connected layer is x @ kernel; a convolution of 3 x 3 pixels with zeros outside
is the same on patches, (batch, height, width, 9 channels) @ (9 channels, features). Written this way, a convolution
with a separate kernel for each run is a batched matrix product under `vmap`; otherwise XLA would make it a grouped
convolution, which is slow on CPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import bnjax
from experiments.harness import data
from experiments.harness.lab import Network

Placement = Literal["before", "after", "both"]
Weights = Callable[[Array], Array]
"""A function from a matrix of standard normal numbers, of shape (inputs, features), to a kernel of this shape."""


class Layer(NamedTuple):
    """A layer: its number of features, and the stride of a convolution of 3 x 3 pixels, or 0 if it is fully
    connected."""

    features: int
    stride: int = 0


def he(normal: Array) -> Array:
    """Kernels that preserve the scale of activations with ReLU: variance 2 / inputs (He et al., 2015, eq. 10)."""
    return normal * (2 / normal.shape[0]) ** 0.5


def lecun(normal: Array) -> Array:
    """Kernels that preserve the scale of linear layers: variance 1 / inputs (LeCun et al., 1998)."""
    return normal * (1 / normal.shape[0]) ** 0.5


def orthogonal(normal: Array) -> Array:
    """Kernels with orthonormal columns, or rows if these are fewer, times sqrt(2) for ReLU (Saxe et al., 2014)."""
    tall = normal if normal.shape[0] >= normal.shape[1] else normal.T
    q, r = jnp.linalg.qr(tall)
    q = q * jnp.sign(jnp.diagonal(r))[None]  # otherwise the distribution would not be uniform over rotations
    return 2**0.5 * (q if normal.shape[0] >= normal.shape[1] else q.T)


def constant(std: float) -> Weights:
    """Kernels with one standard deviation for any number of inputs."""
    return lambda normal: std * normal


def init(
    key: Array,
    inputs: int,
    layers: Sequence[Layer],
    weights: Weights,
    batch_norm: bool,
    placement: Placement = "before",
    scale: Any = 1.0,
) -> tuple[Any, Any]:
    """Variables of a network: kernels, and a bias or batch normalization in each layer but the last, which has a bias.

    Batch normalization has its own bias, so a normalized layer has no other, wherever the normalization is (Ioffe &
    Szegedy, 2015, section 3.2).

    Args:
      key: a jax.random key.
      inputs: number of inputs of a fully connected layer, or of channels of a convolution.
      layers: the layers, up to the logits.
      weights: function from normal numbers to kernels.
      batch_norm: whether all layers but the last are normalized.
      placement: whether the normalization comes before or after the activation, or both.
      scale: factor of all kernels.

    Returns:
      params: for each layer its kernel, and its bias, or BNParams as `bn`; `bn_after` is that after the activation.
      state: the BNState of each normalization, in the order of their use.
    """
    fans, channels = [], inputs
    for layer in layers:
        fans.append((channels * (9 if layer.stride else 1), layer.features))
        channels = layer.features
    ends = np.cumsum([fan_in * fan_out for fan_in, fan_out in fans])
    normal = jax.random.normal(key, (ends[-1],))  # one call, because XLA compiles random numbers again for every shape
    params, state = [], []
    for fan, numbers in zip(fans, jnp.split(normal, ends[:-1]), strict=True):
        variables: dict[str, Any] = {"kernel": scale * weights(numbers.reshape(fan))}
        if batch_norm and len(params) < len(layers) - 1:
            for name in ("bn", "bn_after"):
                if placement in ("both", "before" if name == "bn" else "after"):
                    variables[name], bn_state = bnjax.bn_init(fan[1])
                    state.append(bn_state)
        else:
            variables["bias"] = jnp.zeros(fan[1])
        params.append(variables)
    return params, state


def patches(x: Array, stride: int) -> Array:
    """The neighbourhoods of 3 x 3 pixels, with zeros outside: (batch, height, width, channels) to (..., 9 channels)."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    shifted = [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(3)
        for column in range(3)
    ]
    return jnp.concatenate(shifted, -1)


def apply(
    params: Any,
    state: Any,
    x: Array,
    train: bool,
    *,
    layers: Sequence[Layer],
    shape: tuple[int, ...],
    activation: Callable[[Array], Array] = jax.nn.relu,
    normalize: Callable[..., tuple[Array, Any]] = bnjax.bn_apply,
    mask: Array | None = None,
    **options: Any,
) -> tuple[Array, Any]:
    """Logits of shape (batch, classes) and the new state.

    Args:
      params, state: the variables.
      x: images as rows of pixels.
      train: whether batch statistics are used.
      layers: the layers.
      shape: shape of an image, (height, width) or (height, width, channels). If the first layer is a convolution, the
        rows become images again, and the mean over pixels comes before the first fully connected layer.
      activation: the nonlinearity of all layers but the last.
      normalize: batch normalization or a variant of it, with its signature.
      mask: of shape (batch, 1); False for padding.
      options: passed to `normalize`.
    """
    new_state = []
    if layers[0].stride:
        x = x.reshape(len(x), *shape, *[1] * (3 - len(shape)))

    def normalized(bn, x):
        weights = None if mask is None else mask.reshape(len(mask), *[1] * (x.ndim - 1))
        x, bn_state = normalize(bn, state[len(new_state)], x, train, mask=weights, **options)
        new_state.append(bn_state)
        return x

    for layer, variables in zip(layers, params, strict=True):
        if layer.stride:
            x = patches(x, layer.stride)
        elif x.ndim > 2:
            x = x.mean((1, 2))
        x = x @ variables["kernel"]
        if "bias" in variables:
            x = x + variables["bias"].reshape(*[1] * (x.ndim - 1), -1)
        if variables is params[-1]:
            break
        if "bn" in variables:
            x = normalized(variables["bn"], x)
        x = activation(x)
        if "bn_after" in variables:
            x = normalized(variables["bn_after"], x)
    return x, new_state


def network(
    dataset: data.Dataset,
    hidden: Sequence[Layer],
    batch_norm: bool,
    weights: Weights = he,
    placement: Placement = "before",
    **options: Any,
) -> Network:
    """A network for a data set. `options` are passed to `apply`.

    The momentum is 0.9, a short memory, because many of these networks train for only a few hundred steps.
    """
    shape = dataset.train_images.shape[1:]
    layers = (*hidden, Layer(dataset.classes))
    inputs = int(np.prod(shape[2:] if layers[0].stride else shape))
    options = {"momentum": 0.9} | options if batch_norm else options
    if not batch_norm:
        options = {name: value for name, value in options.items() if name == "activation"}
    return Network(
        partial(init, inputs=inputs, layers=layers, weights=weights, batch_norm=batch_norm, placement=placement),
        partial(_apply, layers=layers, shape=shape, **options),
    )


def _apply(params, state, x, train, *, axis_name=None, **options):
    """`apply`, with the named axis only for batch normalization."""
    return apply(params, state, x, train, **options, **({} if axis_name is None else {"axis_name": axis_name}))


def mlp(
    dataset: data.Dataset, hidden: Sequence[int], batch_norm: bool, weights: Weights = he, **options: Any
) -> Network:
    """A fully connected network; see `network`."""
    return network(dataset, [Layer(features) for features in hidden], batch_norm, weights, **options)


CONVOLUTIONS = (8, 8, 16, 16, 32, 32, 32, 32)
"""Channels of a plain network of eight convolutions: deep enough for its depth to matter, small enough for a CPU."""


def convolutional(
    dataset: data.Dataset,
    batch_norm: bool,
    weights: Weights = he,
    channels: Sequence[int] = CONVOLUTIONS,
    **options: Any,
) -> Network:
    """A plain network, without shortcuts, of convolutions. The third and the fifth halve height and width."""
    hidden = [Layer(features, 2 if i in (2, 4) else 1) for i, features in enumerate(channels)]
    return network(dataset, hidden, batch_norm, weights, **options)
