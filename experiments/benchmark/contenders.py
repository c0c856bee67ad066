"""Batch normalization of other libraries behind one interface, for the benchmark.

`make(case)` of a contender returns a function without arguments, which runs the case's block once and returns its
results. Libraries that are not installed are left out; bnjax and Flax are always installed.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import bnjax

Block = Literal["bn", "bn_relu", "bn_add_relu"]
Direction = Literal["forward", "backward"]
Dtype = Literal["float32", "bfloat16"]
Layout = Literal["last", "first"]


@dataclass(frozen=True)
class Case:
    """A block to time. With `backward`, gradients are taken for x, scale, bias and the other branch of an addition."""

    shape: tuple[int, ...]
    """shape of x, channels last; the layout `first` moves the channels"""
    block: Block = "bn"
    direction: Direction = "backward"
    dtype: Dtype = "float32"
    layout: Layout = "last"

    @property
    def axis(self) -> int:
        return -1 if self.layout == "last" else 1

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the layout of the case."""
        return self.shape if self.layout == "last" else (self.shape[0], self.shape[-1], *self.shape[1:-1])

    def one(self) -> np.ndarray:
        """A batch of one example, of zeros."""
        return np.zeros((1, *self.stored[1:]), np.float32)

    def arrays(self) -> list[np.ndarray]:
        """x, the other branch of an addition, and the cotangent, float32."""
        return _arrays(self.stored)


@functools.lru_cache(maxsize=1)
def _arrays(shape):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for _ in range(3)]


def _block(case: Case, y: Array, other: Array) -> Array:
    if case.block == "bn_add_relu":
        y = y + other
    return y if case.block == "bn" else jax.nn.relu(y)


Layer = tuple[Callable[[Any, Any, Array], Any], Any, Any]
"""`apply(params, state, x)`, which returns y and the new state; params; and state."""


def step(case: Case, apply: Callable[[Any, Any, Array], Any]) -> Callable[..., Any]:
    """The block as a function of params, state, x, the other branch of an addition, and with `backward` a cotangent."""

    def forward(params, state, x, other):
        y, kept = apply(params, state, x)
        return _block(case, y.astype(x.dtype), other), kept  # Haiku and Equinox return float32 for bfloat16

    def both(params, state, x, other, cotangent):
        if case.block == "bn_add_relu":
            y, pullback, kept = jax.vjp(lambda p, x, o: forward(p, state, x, o), params, x, other, has_aux=True)
        else:
            y, pullback, kept = jax.vjp(lambda p, x: forward(p, state, x, other), params, x, has_aux=True)
        return y, kept, pullback(cotangent)

    return forward if case.direction == "forward" else both


def _compiled(layer: Callable[[Case], Layer]) -> Callable[[Case], Callable[[], Any]]:
    def make(case):
        apply, *variables = layer(case)
        arrays = [jnp.asarray(a, case.dtype) for a in case.arrays()]
        if case.direction == "forward":
            arrays.pop()
        return partial(jax.jit(step(case, apply)), *variables, *arrays)

    return make


def _bnjax(case, **options):
    params, state = bnjax.bn_init(case.shape[-1])
    return (lambda params, state, x: bnjax.bn_apply(params, state, x, True, axis=case.axis, **options)), params, state


def _linen(case, **options):
    from flax import linen as nn

    layer = nn.BatchNorm(use_running_average=False, axis=case.axis, dtype=case.dtype, **options)
    variables = layer.init(jax.random.key(0), case.one())

    def apply(params, stats, x):
        return layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    return apply, variables["params"], variables["batch_stats"]


def _nnx(case):
    from flax import nnx

    layer = nnx.BatchNorm(case.shape[-1], axis=case.axis, dtype=jnp.dtype(case.dtype), rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def apply(params, stats, x):
        # A copy of the variables: NNX rejects variables of another trace.
        layer = nnx.merge(graph, params, jax.tree.map(lambda v: v, stats))
        return layer(x, use_running_average=False), nnx.state(layer, nnx.BatchStat)

    return apply, params, stats


def _haiku(case):
    import haiku as hk  # pyright: ignore[reportMissingImports]

    form = "channels_last" if case.layout == "last" else "channels_first"

    layer = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.99, data_format=form)(x, is_training=True))
    return (lambda params, state, x: layer.apply(params, state, None, x)), *layer.init(jax.random.key(0), case.one())


def _equinox(case):
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(case.shape[-1], axis_name="batch", mode="batch")
    params, rest = eqx.partition(layer, eqx.is_inexact_array)
    channels = len(case.shape) - 2 if case.layout == "last" else 0

    def apply(params, state, x):
        def example(x):  # Equinox has channels first
            y, kept = eqx.combine(params, rest)(jnp.moveaxis(x, channels, 0), state)
            return jnp.moveaxis(y, 0, channels), kept

        return jax.vmap(example, axis_name="batch", out_axes=(0, None))(x)

    return apply, params, state


def _keras(case):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # pyright: ignore[reportMissingImports]

    policy = case.dtype if case.dtype == "float32" else f"mixed_{case.dtype}"
    layer = keras.layers.BatchNormalization(axis=case.axis, dtype=policy)
    layer.build((None, *case.one().shape[1:]))
    params = [v.value for v in layer.trainable_variables]
    stats = [v.value for v in layer.non_trainable_variables]
    return (lambda params, stats, x: layer.stateless_call(params, stats, x, training=True)), params, stats


def torch_block(case: Case, x: Any, other: Any, cotangent: Any) -> Callable[[], Any]:
    """The block in PyTorch, with tensors in the case's layout; on a GPU its call returns before the work is done."""
    import torch  # pyright: ignore[reportMissingImports]

    if case.layout == "last" and x.ndim == 4:  # PyTorch's channels_last: NCHW in shape, NHWC in memory
        x, other, cotangent = (t.permute(0, 3, 1, 2) for t in (x, other, cotangent))
    layer = (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d)(case.shape[-1]).to(x.device)

    def block(x, other):  # in place, as in torchvision's networks
        y = layer(x)
        if case.block == "bn_add_relu":
            y += other
        return y if case.block == "bn" else torch.relu_(y)

    def forward():
        with torch.no_grad():
            return block(x, other)

    def both():
        layer.zero_grad()
        leaves = [t.detach().requires_grad_() for t in (x, other)]
        y = block(leaves[0], leaves[1] if case.block == "bn_add_relu" else other)
        y.backward(cotangent)
        return y, leaves

    return forward if case.direction == "forward" else both


def _torch(case):
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    call = torch_block(case, *(torch.from_numpy(a).to(device, getattr(torch, case.dtype)) for a in case.arrays()))

    def finished():
        out = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return finished


LAYERS: dict[str, tuple[str, Callable[..., Layer]]] = {
    "bnjax": ("bnjax", _bnjax),
    "Flax Linen": ("flax", _linen),
    "Flax Linen, two reads": ("flax", partial(_linen, use_fast_variance=False)),
    "Flax NNX": ("flax", _nnx),
    "Haiku": ("haiku", _haiku),
    "Equinox": ("equinox", _equinox),
    "Keras on JAX": ("keras", _keras),
}
"""The module and the layer of each library on JAX. bnjax's and Flax Linen's take options, such as `axis_name`."""

# A layer with a comma in its name is a variant of Flax's, which is counted in `compiled` and not timed.
CONTENDERS: dict[str, tuple[str, Callable[[Case], Callable[[], Any]]]] = {
    **{name: (module, _compiled(layer)) for name, (module, layer) in LAYERS.items() if "," not in name},
    "PyTorch": ("torch", _torch),
}


def installed() -> list[str]:
    """The names of the contenders whose library is installed."""
    return [name for name, (module, _) in CONTENDERS.items() if importlib.util.find_spec(module)]


def versions() -> dict[str, str]:
    """The versions of the other libraries."""
    names = {"haiku": "dm-haiku"}
    modules = {CONTENDERS[name][0] for name in installed()} - {"bnjax"}
    return {module: importlib.metadata.version(names.get(module, module)) for module in sorted(modules)}
