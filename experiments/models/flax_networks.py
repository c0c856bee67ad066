"""Networks with layers of `bnjax.linen` and `bnjax.nnx`, as the pure functions that `train.fit` expects.

The multilayer perceptron has the usual hidden layers of 256 and 128 units, in Linen and in NNX. The residual network is
the one of He et al. (2016, section 4.2) for CIFAR-10 with n = 1: a convolution, three stages of one block each, with
16, 32 and 64 channels, and the mean over all pixels. If a block changes the shape, its shortcut is a projection (their
option B).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import bnjax.linen
import bnjax.nnx
from experiments.harness.data import InputError
from experiments.models.networks import Network

Name = Literal["mlp-linen", "mlp-nnx", "resnet"]

HIDDEN = (256, 128)
"""units per hidden layer of the multilayer perceptron"""
CHANNELS = (16, 32, 64)
"""channels per stage of the residual network"""


def build(name: Name, shape: tuple[int, ...], classes: int, batch_norm: bool, momentum: float = 0.9) -> Network:
    """A network for images of one size.

    Args:
      name: "mlp-linen" or "mlp-nnx", which compute the same from the same variables, or "resnet", in Linen.
      shape: shape of an image, (height, width) or (height, width, channels).
      classes: number of logits.
      batch_norm: whether each hidden linear layer is followed by batch normalization; if not, it has a bias.
      momentum: weight of the OLD value in the running statistics.

    Raises:
      InputError: for another name or another number of axes.
    """
    if name not in get_args(Name):
        raise InputError(f"network={name}: expected one of {', '.join(get_args(Name))}.")
    if len(shape) not in (2, 3):
        raise InputError(f"build(shape={shape}): expected (height, width) or (height, width, channels).")
    if name == "mlp-nnx":
        return _nnx(partial(NNXMLP, prod(shape), classes, batch_norm, momentum))
    module = ResNet if name == "resnet" else LinenMLP
    return _linen(partial(module, shape, classes, batch_norm, momentum), prod(shape))


class _Linen(nn.Module):
    """The base class of the Linen networks; `axis_name` is the mapped axis along which a batch is sharded."""

    shape: tuple[int, ...]
    classes: int
    batch_norm: bool
    momentum: float
    axis_name: str | None = None

    def norm(self, name: str, x: Array, train: bool, mask: Array | None, **options: Any) -> Array:
        """Batch normalization, or x without it; `mask` has shape (batch, 1) for any rank of x."""
        if not self.batch_norm:
            return x
        layer = bnjax.linen.BatchNorm(momentum=self.momentum, axis_name=self.axis_name, name=name, **options)
        mask = None if mask is None else mask.reshape(-1, *[1] * (x.ndim - 1))
        return layer(x, use_running_average=not train, mask=mask)


class LinenMLP(_Linen):
    """The multilayer perceptron in Linen."""

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        for i, features in enumerate(HIDDEN, 1):
            x = nn.Dense(features, use_bias=not self.batch_norm, name=f"linear{i}")(x)
            x = nn.relu(self.norm(f"norm{i}", x, train, mask))
        return nn.Dense(self.classes, name="head")(x)


class NNXMLP(nnx.Module):
    """The multilayer perceptron in NNX."""

    def __init__(
        self,
        inputs: int,
        classes: int,
        batch_norm: bool,
        momentum: float,
        axis_name: str | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        for i, features in enumerate(HIDDEN, 1):
            setattr(self, f"linear{i}", nnx.Linear(inputs, features, use_bias=not batch_norm, rngs=rngs))
            if batch_norm:
                norm = bnjax.nnx.BatchNorm(features, momentum=momentum, axis_name=axis_name, rngs=rngs)
                setattr(self, f"norm{i}", norm)
            inputs = features
        self.head = nnx.Linear(inputs, classes, rngs=rngs)
        self.batch_norm = batch_norm

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        for i in range(1, len(HIDDEN) + 1):
            x = getattr(self, f"linear{i}")(x)
            x = getattr(self, f"norm{i}")(x, mask=mask) if self.batch_norm else x
            x = nnx.relu(x)
        return self.head(x)


class ResNet(_Linen):
    """The residual network, for images with or without a channel axis."""

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        def conv_norm(x, name, features, size=3, stride=1):
            conv = nn.Conv(
                features,
                (size, size),
                stride,
                use_bias=not self.batch_norm,
                kernel_init=nn.initializers.he_normal(),
                conv_general_dilated=_convolution,
                name=f"{name}_conv",
            )
            return self.norm(f"{name}_norm", conv(x), train, mask)

        x = x.reshape(-1, *self.shape, *[1] * (3 - len(self.shape)))
        x = nn.relu(conv_norm(x, "stem", CHANNELS[0]))
        for i, features in enumerate(CHANNELS):
            stride = 1 if i == 0 else 2
            shortcut = x if i == 0 else conv_norm(x, f"stage{i + 1}_projection", features, 1, stride)
            x = nn.relu(conv_norm(x, f"stage{i + 1}_first", features, 3, stride))
            x = nn.relu(shortcut + conv_norm(x, f"stage{i + 1}_second", features))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def _convolution(x: Array, kernel: Array, strides: Sequence[int], padding: str, **_: Any) -> Array:
    """`jax.lax.conv_general_dilated` for two dimensions, channels last, as one matrix product.

    On CPUs, XLA runs convolutions many times slower inside a loop, such as that of `train.fit`, and turns those of
    several seeds into grouped convolutions, which are slow too. Matrix products have neither problem.
    """
    size = kernel.shape[:2]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    out = [(n - k) // stride + 1 for n, k, stride in zip(x.shape[1:3], size, strides, strict=True)]

    def shifted(row, column):
        rows, columns = (
            slice(first, first + (n - 1) * stride + 1, stride)
            for first, n, stride in zip((row, column), out, strides, strict=True)
        )
        return x[:, rows, columns]

    patches = jnp.concatenate([shifted(*place) for place in np.ndindex(*size)], axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _linen(module: Callable[..., nn.Module], inputs: int) -> Network:
    """The Network of a Linen module whose `axis_name` is not set yet, for images of `inputs` numbers."""

    def init(key):
        # lazy_init, because init would compile every operation of the forward pass separately, which takes seconds.
        variables = module().lazy_init(key, jax.ShapeDtypeStruct((1, inputs), jnp.float32), False)
        return variables["params"], variables.get("batch_stats", {})

    def apply(params, state, x, train, *, mask=None, axis_name=None):
        variables = {"params": params, "batch_stats": state}
        # Evaluation changes no collection. With `mutable` the result is a pair in both modes.
        logits, updates = module(axis_name=axis_name).apply(variables, x, train, mask, mutable=["batch_stats"])
        return logits, updates.get("batch_stats", state)

    return Network(init, apply)


def _nnx(module: Callable[..., nnx.Module]) -> Network:
    """The Network of an NNX module whose `axis_name` and `rngs` are not set yet."""

    def init(key):
        _, variables = bnjax.nnx.functional(module(rngs=nnx.Rngs(key)))
        return nnx.to_pure_dict(variables["params"]), nnx.to_pure_dict(variables["batch_stats"])

    def apply(params, state, x, train, *, mask=None, axis_name=None):
        # The layers store the axis name, so a new module is made. eval_shape: the variables are given already.
        call, _ = bnjax.nnx.functional(nnx.eval_shape(lambda: module(axis_name=axis_name, rngs=nnx.Rngs(0))))
        variables: Mapping[str, Any] = {"params": params, "batch_stats": state}
        if not train:
            return call(variables, x), state
        logits, updates = call(variables, x, mask, mutable=["batch_stats"])
        return logits, nnx.to_pure_dict(updates["batch_stats"])

    return Network(init, apply)
