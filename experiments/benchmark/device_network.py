"""The measurement of `device` on a network: a training step of ResNet-50, in bfloat16, on one device.

Each step starts from the same variables and has the same batch, so that every timed step does the same work. The
running statistics are those of that batch, as if they had converged to it, so that the guard accepts every running
mean.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bnjax import linen
from bnjax.core import reading
from experiments.benchmark import device_parts as parts
from experiments.benchmark.device_record import Record, times
from experiments.models import resnet50

NONE = "none"
"""A network whose layers have only a scale and a bias."""
MOMENTUM = 0.9
STEPS = 3
"""steps in a timing"""
FAR_MEAN = 1e4
"""a running mean that is far from every mean"""


def networks(libraries: tuple[str, ...]) -> dict[str, resnet50.Norm]:
    """The normalization layer of each network."""
    options: dict[str, Any] = {"use_running_average": False, "momentum": MOMENTUM, "dtype": jnp.bfloat16}
    known: dict[str, resnet50.Norm] = {
        NONE: resnet50.Affine,
        "Flax Linen": partial(nn.BatchNorm, **options),
        "bnjax": partial(linen.BatchNorm, **options),
        **{name: partial(linen.BatchNorm, **options) for name in parts.READ_BY},
    }
    return {name: norm for name, norm in known.items() if name == NONE or name.partition(",")[0] in libraries}


def of_batch(before: Any, after: Any) -> Any:
    """By layer, the batch's mean and variance, from the running statistics before and after a step."""

    def layer(old, new):
        wide = {k: (np.asarray(old[k], np.float64), np.asarray(new[k], np.float64)) for k in ("mean", "var")}
        return {k: (after - MOMENTUM * before) / (1 - MOMENTUM) for k, (before, after) in wide.items()}

    return jax.tree.map(layer, before[0]["batch_stats"], after[0]["batch_stats"], is_leaf=_is_layer)


def settled(before: Any, after: Any) -> Any:
    """The carry before the step, with the batch's statistics as the running ones."""
    variables, optimizer = before

    def layer(old, batch):
        return {**old, **{k: jnp.asarray(v, old[k].dtype) for k, v in batch.items()}}

    stats = jax.tree.map(layer, variables["batch_stats"], of_batch(before, after), is_leaf=_is_layer)
    return {**variables, "batch_stats": stats}, optimizer


def far(carry: Any) -> Any:
    """The carry with running means that are far from every mean."""
    variables, optimizer = carry

    def moved(path, value):
        return jnp.full_like(value, FAR_MEAN) if path[-1].key == "mean" else value

    return {**variables, "batch_stats": jax.tree_util.tree_map_with_path(moved, variables["batch_stats"])}, optimizer


def looked_again(before: Any, after: Any) -> tuple[int, int]:
    """The layers whose running means were too far from the batch's in a step, and the number of layers."""
    olds = jax.tree.leaves(before[0]["batch_stats"], is_leaf=_is_layer)
    batches = jax.tree.leaves(of_batch(before, after), is_leaf=_is_layer)
    count = 0
    for old, batch in zip(olds, batches, strict=True):
        rounding = reading.ROUNDED * np.finfo(np.float32).eps * np.abs(batch["mean"])
        allowed = reading.NEAR * batch["var"] + rounding**2
        count += bool(np.any((batch["mean"] - np.asarray(old["mean"], np.float64)) ** 2 > allowed))
    return count, len(olds)


def _is_layer(tree):
    return "mean" in tree


def resnet(
    record: Record, libraries: tuple[str, ...], images: int, size: int, rounds: int, threads: int
) -> dict[str, Callable[[], Any]]:
    """Times of a training step, by normalization; returns the steps as calls."""
    x = jax.random.normal(jax.random.key(1), (images, size, size, 3), jnp.bfloat16)
    labels = jax.random.randint(jax.random.key(2), (images,), 0, resnet50.CLASSES)
    lowered: dict[str, Any] = {}
    carries: dict[str, Any] = {}
    for name, norm in networks(libraries).items():
        step, init = resnet50.training_step(norm)
        with parts.read_by(name):
            shapes = jax.eval_shape(init, x)
            carries[name] = jax.tree.map(partial(_started, np.random.default_rng(0)), shapes)
            carries[name] = _norms_start(carries[name])
            lowered[name] = jax.jit(step).lower(shapes, x, labels)
        record.say(f"traced {name}")
    programs = record.compiled(lowered, threads)
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, Any] = {}
    for name, program in programs.items():
        ready = record.attempt(name, partial(_prepared, name, program, carries[name], x, labels))
        if ready is not None:
            calls |= ready[0]
            facts |= ready[1]
    found = record.attempt("times", partial(times, calls, rounds, STEPS))
    if found is not None:
        record.keep({"images": images, "size": size, "seconds": found, "facts": facts})
        record.say(", ".join(f"{name} {1e3 * min(seconds):.1f} ms" for name, seconds in found.items()))
    return calls


def _prepared(name, program, carry, *batch):
    """Calls of the step, with running means near and, with the guard, far; and facts about them."""
    if "batch_stats" in carry[0]:
        carry = settled(carry, program(carry, *batch)[0])
    starts = {name: carry} | ({parts.FAR: far(carry)} if name == parts.NEAR else {})
    facts: dict[str, dict[str, Any]] = {}
    for label, start in starts.items():
        after, loss = program(start, *batch)
        memory = program.memory_analysis()
        facts[label] = {"loss": float(loss), "temporary": getattr(memory, "temp_size_in_bytes", None)}
        if "batch_stats" in start[0]:
            facts[label]["looked again"] = looked_again(start, after)
    return {label: partial(program, start, *batch) for label, start in starts.items()}, facts


def beside_torch(
    record: Record, steps: dict[str, Callable[[], Any]], libraries: tuple[str, ...], images: int, size: int, rounds: int
) -> None:
    """Times of PyTorch's training step, in turn with bnjax's and Flax's."""
    beside = parts.torch_on_device() if "PyTorch" in libraries else None
    if beside is None or not steps:
        record.leave_out("PyTorch", "no PyTorch for this device" if beside is None else "the part resnet did not run")
        return
    calls = {name: call for name, call in steps.items() if name in libraries}
    torch, device = beside
    calls["PyTorch"] = _torch_step(torch, device, images, size)
    found = times(calls, rounds, STEPS)
    record.keep({"images": images, "size": size, "seconds": found, "facts": {}})
    record.say(", ".join(f"{name} {1e3 * min(seconds):.1f} ms" for name, seconds in found.items()))


def _torch_step(torch, device, images, size):
    """A step of torchvision's ResNet-50 in bfloat16 by autocast, channels last, with cuDNN's search for algorithms."""
    import torchvision  # pyright: ignore[reportMissingImports]

    torch.backends.cudnn.benchmark = True
    network = torchvision.models.resnet50().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    x = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (images,), device=device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        return loss

    return parts.torch_call(step, torch, device)


def _started(rng, shape):
    """A value for a variable: normal numbers over the square root of the fan-in for kernels, and 0 for all others."""
    if len(shape.shape) < 2:
        return jnp.zeros(shape.shape, shape.dtype)
    fan_in = np.prod(shape.shape[:-1])
    return jnp.asarray(rng.standard_normal(shape.shape, np.float32) * np.sqrt(2 / fan_in), shape.dtype)


def _norms_start(carry):
    """The carry with scales and running variances of 1."""
    variables, optimizer = carry

    def one(path, value):
        return jnp.ones_like(value) if path[-1].key in ("scale", "var") else value

    return jax.tree_util.tree_map_with_path(one, variables), optimizer
