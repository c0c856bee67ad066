"""A small ResNet (He et al., 2016) in plain Flax, as someone else wrote it: the tests convert it, never edit it."""

import flax.linen as nn
import jax
from flax import nnx


class LinenBlock(nn.Module):
    features: int
    train: bool

    @nn.compact
    def __call__(self, x):
        shortcut = x
        for i in range(2):
            x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
            zero = nn.initializers.zeros if i == 1 else nn.initializers.ones
            x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, scale_init=zero)(x)
            x = nn.relu(x) if i == 0 else x
        if shortcut.shape != x.shape:
            shortcut = nn.Conv(self.features, (1, 1), use_bias=False, name="projection")(shortcut)
            shortcut = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(shortcut)
        return nn.relu(shortcut + x)


class LinenResNet(nn.Module):
    classes: int = 5

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for features in (8, 16):
            x = LinenBlock(features, train)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, inputs, features, rngs):
        self.conv1 = nnx.Conv(inputs, features, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(features, momentum=0.9, scale_init=nnx.initializers.zeros, rngs=rngs)
        self.projection = nnx.data(None)
        if inputs != features:
            self.projection = nnx.Conv(inputs, features, (1, 1), use_bias=False, rngs=rngs)
            self.bn3 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        y = self.bn2(self.conv2(jax.nn.relu(self.bn1(self.conv1(x)))))
        return jax.nn.relu(y + (x if self.projection is None else self.bn3(self.projection(x))))


class NNXResNet(nnx.Module):
    def __init__(self, rngs, classes=5):
        self.stem = nnx.Sequential(
            nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(8, momentum=0.9, rngs=rngs), nnx.relu
        )
        self.blocks = nnx.List([NNXBlock(8, 8, rngs), NNXBlock(8, 16, rngs)])
        self.head = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))
