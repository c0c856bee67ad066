"""ResNet-50 (He et al., 2016, table 1) with any normalization layer, and a training step of it.

As in Flax's ImageNet example, a block's stride is in its 3 x 3 convolution, and its last scale starts at zero.
Arithmetic is bfloat16, variables are float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

STAGES = (3, 4, 6, 3)
CLASSES = 1000

Norm = Callable[..., Callable[[Array], Array]]


class Affine(nn.Module):
    """A scale and a bias for each feature, without normalization: the baseline to which statistics add their cost."""

    scale_init: Callable[..., Array] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale, bias = (
            self.param(name, init, (x.shape[-1],)).astype(x.dtype)
            for name, init in (("scale", self.scale_init), ("bias", nn.initializers.zeros))
        )
        return x * scale + bias


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, each followed by a normalization, plus a shortcut."""

    norm: Norm
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        y = nn.relu(self.norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.features, (3, 3), self.stride)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.features, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """Logits of images of shape (batch, height, width, 3). `norm` makes a layer, with or without `scale_init`."""

    norm: Norm

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(64, (7, 7), 2, padding=[(3, 3), (3, 3)], use_bias=False, dtype=jnp.bfloat16)(x)
        x = nn.max_pool(nn.relu(self.norm()(x)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(STAGES):
            for block in range(blocks):
                x = Bottleneck(self.norm, 64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(CLASSES, dtype=jnp.bfloat16)(x.mean((1, 2))).astype(jnp.float32)


def training_step(norm: Norm) -> tuple[Callable[..., Any], Callable[[Array], Any]]:
    """A step of stochastic gradient descent, and a function that makes its carry from images.

    `step((variables, opt_state), images, labels)` returns the new carry and the loss.
    """
    network, optimizer = ResNet50(norm), optax.sgd(0.1, momentum=0.9)

    def init(x):
        variables = network.init(jax.random.key(0), x)
        return variables, optimizer.init(variables["params"])

    def step(carry, x, label):
        variables, opt_state = carry

        def loss(params):
            logits, updates = network.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], change)
        return ({**variables, **updates, "params": params}, opt_state), value

    return step, init
