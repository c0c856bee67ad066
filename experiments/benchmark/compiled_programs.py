"""The programs that `compiled` compiles: layers, their variants, and training steps of networks.

The functions return each program as the facts that name it, a function, its variables, and its case or its images. For
layers the function is `contenders.step`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.benchmark import bench, contenders
from experiments.benchmark.contenders import Block, Case, Direction, Dtype
from experiments.models import resnet50

Mapping = Literal["jit", "shard_map"]

LIBRARIES = ("bnjax", "Flax Linen", "Flax Linen, two reads", "Haiku", "Equinox")
NONE = "none"
"""A network whose layers have only a scale and a bias."""
SHAPE = (128, 56, 56, 256)
"""shapes of x on one device, larger than the on-chip memory of a TPU"""
WIDE = (256, 14, 14, 2048)
"""shapes of x on one device for the part `synchronized`: of that size, with the features of ResNet-50's last layers"""
SMALL = (32, 7, 7, 2048)
"""shapes of x on one device for the part `small`: of a ResNet-50's last layers, whose reductions XLA does not split"""


def layers(part: str, devices: int) -> Iterator[tuple[dict[str, Any], Callable[..., Any], Any, Case]]:
    """The part `layer`: the layer in each library; or `variants`: bnjax's variants, masks, and channels first."""
    shape = (SHAPE[0] * devices, *SHAPE[1:])
    if part == "layer":
        matrix = itertools.product(_known(), get_args(Block), get_args(Direction), get_args(Dtype))
        for library, block, direction, dtype in matrix:
            # ReLU and addition cost the same in all libraries, so two libraries suffice to measure them.
            if block == "bn" or library in LIBRARIES[:3]:
                case = Case(shape, block, direction, dtype)
                yield _layer(case, library, contenders.LAYERS[library][1](case))
        return
    for library, direction in itertools.product(LIBRARIES[:2], get_args(Direction)):
        case = Case(shape, "bn", direction, "bfloat16", "first")
        yield _layer(case, library, contenders.LAYERS[library][1](case), variant="channels first")
    case = Case(shape, "bn", "backward", "bfloat16")
    for variant, (apply, variables) in variants(shape).items():
        yield _layer(case, "bnjax", (apply, *variables), variant=variant)


def _layer(case, library, layer, variant=None):
    apply, *variables = layer
    facts = {"part": "layer", "library": library, "variant": variant, **asdict(case), "shape": SHAPE}
    return facts, contenders.step(case, apply), variables, case


def synchronized(mesh: Any) -> Iterator[tuple[dict[str, Any], Callable[..., Any], Any, Case]]:
    """A wide layer, by `jit` over arrays sharded by examples and by `shard_map` with the layer's `axis_name`."""
    matrix = itertools.product(("bnjax", "Flax Linen"), get_args(Mapping), get_args(Direction))
    for library, mapping, direction in matrix:
        case = Case((WIDE[0] * mesh.size, *WIDE[1:]), "bn", direction, "bfloat16")
        options = {"axis_name": "data"} if mapping == "shard_map" else {}
        facts, f, variables, case = _layer(case, library, contenders.LAYERS[library][1](case, **options))
        if mapping == "shard_map":
            f = mapped(mesh, f, direction)
        yield {**facts, "part": "synchronized", "mapping": mapping, "shape": WIDE}, f, variables, case


def small(devices: int) -> Iterator[tuple[dict[str, Any], Callable[..., Any], Any, Case]]:
    """A small layer, plain in each library, and masked in bnjax."""
    for library, direction in itertools.product(_known(), get_args(Direction)):
        case = Case((SMALL[0] * devices, *SMALL[1:]), "bn", direction, "bfloat16")
        layer = contenders.LAYERS[library][1](case)
        variants = {None: layer} | ({"masked": (_masked_layer, *layer[1:])} if library == "bnjax" else {})
        for variant, each in variants.items():
            facts, f, variables, case = _layer(case, library, each, variant)
            yield {**facts, "part": "small", "shape": SMALL}, f, variables, case


def mapped(mesh: Any, f: Callable[..., Any], direction: Direction) -> Callable[..., Any]:
    """A function of `contenders.step` on each device's part of the arrays, by `shard_map`."""
    divided, both = P("data"), direction == "backward"
    arrays, gradients = [divided] * (3 if both else 2), [(P(), divided)] if both else []
    return jax.shard_map(f, mesh=mesh, in_specs=(P(), P(), *arrays), out_specs=(divided, P(), *gradients))


def _known() -> list[str]:
    there = contenders.installed()
    return [name for name in LIBRARIES if name.partition(",")[0] in there]


def variants(shape: tuple[int, ...]) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Functions called like `bn_apply(params, state, x)`, and their variables."""
    calls = bench.variants(shape, 16)
    calls |= {
        "without a state": (
            lambda params, state, x, train: bnjax.bn_apply(params, None, x, train),
            calls["bn_apply"][1],
        ),
        "masked": (_masked, calls["bn_apply"][1]),
    }
    return {
        name: (lambda params, state, x, f=apply: f(params, state, x, True), variables)
        for name, (apply, variables) in calls.items()
        if name not in ("bn_apply", "frozen")
    }


def _masked_layer(params, state, x):
    return _masked(params, state, x, True)


def _masked(params, state, x, train):
    mask = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)) < x.shape[0] - 3  # a batch padded by 3 examples
    return bnjax.bn_apply(params, state, x, train, mask=mask)


def networks(part: str, images: int) -> Iterator[tuple[dict[str, Any], Callable[..., Any], Any, Any]]:
    """Training steps: of a ResNet-50 in Linen, part `resnet50`, or of a small network in NNX, part `nnx`."""
    if part == "resnet50":
        x = jax.ShapeDtypeStruct((images, 224, 224, 3), jnp.bfloat16)
        for library, norm in _linen_norms().items():
            step, init = resnet50.training_step(norm)
            yield {"part": part, "library": library}, step, [jax.eval_shape(init, x)], x
    else:
        x = jax.ShapeDtypeStruct((images, 32, 32, 3), jnp.bfloat16)
        for library, layer in _nnx_norms().items():
            step, variables = _nnx_step(layer)
            yield {"part": part, "library": library}, step, [variables], x


def labels(images: int) -> jax.ShapeDtypeStruct:
    """The labels that a training step of a network takes after its images."""
    return jax.ShapeDtypeStruct((images,), jnp.int32)


def _linen_norms() -> dict[str, resnet50.Norm]:
    from flax import linen as nn

    from bnjax import linen

    options: dict[str, Any] = {"use_running_average": False, "momentum": 0.9, "dtype": jnp.bfloat16}
    return {
        NONE: resnet50.Affine,
        "Flax Linen": partial(nn.BatchNorm, **options),
        "Flax Linen, two reads": partial(nn.BatchNorm, use_fast_variance=False, **options),
        "bnjax": partial(linen.BatchNorm, **options),
    }


def _nnx_norms() -> dict[str, Any]:
    from flax import nnx

    from bnjax import nnx as ours

    return {"Flax NNX": nnx.BatchNorm, "bnjax": ours.BatchNorm}


def _nnx_step(norm):
    """A training step of a network of six convolutions in NNX, and its variables."""
    import optax
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            sizes = (3, 64, 64, 128, 128, 256, 256)
            options = {"dtype": jnp.bfloat16, "rngs": rngs}
            self.convs = nnx.List(
                [nnx.Conv(m, n, (3, 3), use_bias=False, **options) for m, n in itertools.pairwise(sizes)]
            )
            self.norms = nnx.List([norm(n, momentum=0.9, **options) for n in sizes[1:]])
            self.head = nnx.Linear(sizes[-1], 10, rngs=rngs)

        def __call__(self, x):
            for conv, layer in zip(self.convs, self.norms, strict=True):
                x = nnx.relu(layer(conv(x), use_running_average=False))
            return self.head(x.mean((1, 2)).astype(jnp.float32))

    graph, params, stats = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))), nnx.Param, nnx.BatchStat)

    def step(variables, x, label):
        params, stats = variables

        def loss(params):
            # A copy of the variables: NNX rejects variables of another trace.
            model = nnx.merge(graph, params, jax.tree.map(lambda v: v, stats))
            value = optax.softmax_cross_entropy_with_integer_labels(model(x), label).mean()
            return value, nnx.state(model, nnx.BatchStat)

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), stats), value

    return step, (params, stats)
