"""The measurements of `device` on one layer: the speed of copying, the layer's time, the guard's cost, its exactness.

The guard decides, in each call in training, whether the statistics that were taken around the running mean are exact;
if not, x is read twice more. On one GPU there is no guard: the statistics are taken around the mean of a part of x. The
same layer is therefore traced in two more ways, with the guard, and around the running mean without it.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

import bnjax
from bnjax.core import moments, reading
from experiments.benchmark import bench, contenders, exactness
from experiments.benchmark.contenders import Case, Direction
from experiments.benchmark.device_record import Pending, Record, times

NO_GUARD = "bnjax, no guard"
NEAR = "bnjax, guard, running mean near"
FAR = "bnjax, guard, running mean far"
FLAX = ("Flax Linen", "Flax Linen, two reads")
DISTANCE = 10.0
"""distance of a far running mean from the mean, in standard deviations; the guard allows sqrt(8)"""
RATIOS = (0.0, 10.0, 1e3, 1e4)
"""|mean| / std of the data for exactness"""


def unguarded(x: Array, shift: Array, *, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Moments in one read of `x` around the shift, as the guard's first look takes them, and nothing after it."""
    centered = x.astype(shift.dtype) - shift
    offset = jnp.mean(centered, axes)
    var = jnp.maximum(jnp.mean(centered * centered, axes) - offset * offset, 0)
    count = math.prod(x.shape[a] for a in axes)
    return jnp.full_like(var, count), jnp.squeeze(shift, axes) + offset, var


READ_BY: dict[str, Any] = {NO_GUARD: unguarded, NEAR: reading.guarded_look}
"""Other ways than the library's to take the statistics of a device's array, by name."""


@contextlib.contextmanager
def read_by(name: str) -> Generator[None]:
    """A context in which bnjax is traced with the statistics of this name; with any other name, with its own.

    Programs traced before or after are not affected.
    """
    jax.clear_caches()
    try:
        with mock.patch.object(moments, "read_anywhere", READ_BY.get(name, moments.read_anywhere)):
            yield
    finally:
        jax.clear_caches()


def dtype_of(name: str) -> Any:
    """The dtype of this name."""
    return jnp.dtype(name)


def label(case: Case) -> str:
    """The case in a few words."""
    return f"{'x'.join(map(str, case.shape))}, {case.block}, {case.direction}, {case.dtype}"


def arrays(shape: tuple[int, ...], dtype: str, number: int) -> list[Array]:
    """Normal numbers, made on the device."""
    return [_normal(shape, dtype)(jax.random.key(i)) for i in range(number)]


@functools.cache
def _normal(shape, dtype):
    return jax.jit(lambda key: jax.random.normal(key, shape, dtype_of(dtype)))


def torch_on_device() -> Any:
    """PyTorch, and its device like JAX's: a GPU, or the CPU if JAX has no GPU. None if it has no such device."""
    if "PyTorch" not in contenders.installed():
        return None
    import torch  # pyright: ignore[reportMissingImports]

    on_gpu = jax.default_backend() == "gpu"
    return None if on_gpu and not torch.cuda.is_available() else (torch, "cuda" if on_gpu else "cpu")


def torch_call(call: Callable[[], Any], torch: Any, device: str) -> Callable[[], Any]:
    """A call of PyTorch that `times` can wait for."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return lambda: Pending(call(), wait)


# The speed of copying.


def copy_speed(record: Record, mebibytes: int, rounds: int) -> None:
    """Bytes read and written in a second by x * c, with x in bfloat16 and c known only at run time."""
    x = jnp.ones(mebibytes * 2**19, jnp.bfloat16)
    program = jax.jit(jnp.multiply).lower(x, jnp.bfloat16(1)).compile()
    found = times({"copy": partial(program, x, jnp.bfloat16(1))}, rounds, 5)
    record.keep({"bytes": 2 * x.nbytes, "seconds": found})


def speed(results: dict[str, Any]) -> float:
    """The speed of copying in bytes a second, by the minimum time."""
    entry = results["parts"]["copy"][0]
    return entry["bytes"] / min(entry["seconds"]["copy"])


def bandwidth(entry: dict[str, Any], name: str) -> float:
    """Bytes a second of a library: the minimum number of passes of the block, over the minimum time."""
    bytes_ = math.prod(entry["shape"]) * dtype_of(entry["dtype"]).itemsize
    return bench.PASSES[entry["block"], entry["direction"]] * bytes_ / min(entry["seconds"][name])


# The layer.


def cases(shapes: tuple[str, ...], dtypes: tuple[str, ...], blocks: tuple[str, ...]) -> list[Case]:
    """What to time. Dtypes after the first are combined only with the first block."""
    found: list[Any] = [
        (bench.sizes(shape), block, direction, dtype)
        for shape, dtype, block, direction in itertools.product(shapes, dtypes, blocks, get_args(Direction))
        if dtype == dtypes[0] or block == blocks[0]
    ]
    return [Case(*each) for each in found]


def _lowered(case: Case, layer: contenders.Layer) -> Any:
    apply, *variables = layer
    shapes = [jax.ShapeDtypeStruct(case.stored, dtype_of(case.dtype))] * (2 if case.direction == "forward" else 3)
    return jax.jit(contenders.step(case, apply)).lower(*variables, *shapes)


def layer(
    record: Record, every: list[Case], libraries: tuple[str, ...], rounds: int, repeats: int, threads: int
) -> None:
    """Times of the layer in each library."""
    made = {
        (name, case): record.attempt(f"{name}, {label(case)}", partial(_made, name, case))
        for case, name in itertools.product(every, libraries)
        if name in contenders.LAYERS
    }
    programs = record.compiled({key: each[0] for key, each in made.items() if each is not None}, threads)
    held: tuple[Any, list[Array]] = (None, [])
    beside = torch_on_device() if "PyTorch" in libraries else None
    for case in every:
        if record.late(label(case)):
            continue
        if held[0] != (case.shape, case.dtype):
            held = (None, [])  # frees the memory before the next arrays are made
            held = ((case.shape, case.dtype), arrays(case.shape, case.dtype, 3))
            if beside:
                beside[0].cuda.empty_cache()
        given = held[1][: 2 if case.direction == "forward" else 3]
        calls: dict[str, Callable[[], Any]] = {"copy": partial(jax.jit(jnp.negative), given[0])}
        for name in libraries:
            if (name, case) in programs:
                calls[name] = partial(programs[name, case], *made[name, case][1], *given)
        if beside:
            call = record.attempt(f"PyTorch, {label(case)}", partial(_torch_layer, case, *beside))
            calls |= {} if call is None else {"PyTorch": call}
        found = record.attempt(label(case), partial(times, calls, rounds, repeats))
        if found is not None:
            facts = {"shape": case.shape, "block": case.block, "direction": case.direction, "dtype": case.dtype}
            record.keep({**facts, "seconds": found})
            record.say(f"{label(case)}: " + ", ".join(f"{name} {1e6 * min(s):.0f} us" for name, s in found.items()))


def _made(name, case):
    """The program of a library, not compiled yet, and its variables."""
    layer = contenders.LAYERS[name][1](case)
    return _lowered(case, layer), layer[1:]


def _torch_layer(case, torch, device):
    """The block in PyTorch, after a first call, so that a failure affects only PyTorch."""
    options = {"device": device, "dtype": getattr(torch, case.dtype)}
    tensors = [torch.randn(case.shape, **options) for _ in range(3)]
    call = torch_call(contenders.torch_block(case, *tensors), torch, device)
    jax.block_until_ready(call())
    return call


# The guard.


def guard(
    record: Record, shapes: tuple[str, ...], dtype: Any, layers: int, rounds: int, repeats: int, threads: int
) -> None:
    """Times of one layer and of a chain of layers: as the library has it, with the guard, after the guard sent x to be
    read again, and without it."""
    every: list[tuple[Case, int]] = []
    for shape in map(bench.sizes, shapes):
        forward, both = (Case(shape, "bn", direction, dtype) for direction in get_args(Direction))
        every += [(forward, 1), (both, 1), (forward, layers)]
    made = {(name, *key): _guard_program(name, *key) for name in ("bnjax", *FLAX) for key in every}
    for read in READ_BY:
        with read_by(read):
            made |= {(read, *key): _guard_program("bnjax", *key) for key in every}
    programs = record.compiled({key: program for key, (program, _) in made.items()}, threads)
    for case, number in every:
        name = f"{label(case)}, {number} in a chain"
        if record.late(name):
            continue
        given = arrays(case.shape, dtype, 1 if number > 1 else 2 if case.direction == "forward" else 3)
        calls: dict[str, Callable[[], Any]] = {}
        for library in ("bnjax", *READ_BY, *FLAX):
            if (library, case, number) in programs:
                program, variables = programs[library, case, number], made[library, case, number][1]
                calls[library] = partial(program, *variables, *given)
                if library == NEAR:
                    params, state = variables
                    far = state._replace(mean=state.mean + DISTANCE)
                    calls[FAR] = partial(program, params, far, *given)
        for issued in dict.fromkeys((1, max(1, repeats // number))):
            found = record.attempt(name, partial(times, calls, rounds, issued))
            if found is not None:
                facts = {"shape": case.shape, "direction": case.direction, "dtype": dtype}
                record.keep({**facts, "layers": number, "issued": issued, "seconds": found})
                least = ", ".join(f"{each} {1e6 * min(seconds):.0f} us" for each, seconds in found.items())
                record.say(f"{name}, {issued} at once: {least}")


def _guard_program(name, case, number):
    """A program of one layer or of a chain, not compiled yet, and its variables, with a running mean of 0."""
    apply, *variables = layer = contenders.LAYERS[name][1](case)
    if number == 1:
        return _lowered(case, layer), variables
    x = jax.ShapeDtypeStruct(case.stored, dtype_of(case.dtype))
    return jax.jit(_chain(apply, number)).lower(*variables, x), variables


def _chain(apply, layers):
    """This many layers, one after another, with nothing between."""

    def call(params, state, x):
        kept: list[Any] = []
        for _ in range(layers):
            x, new = apply(params, state, x)
            kept.append(new)
        return x, kept

    return call


# Exactness.


def exact(record: Record, rows: int, features: int) -> None:
    """Errors against float64 for data far from 0, and the second derivative against that of the plain formula."""
    case = Case((rows, features), "bn", "backward", "float32")
    params, state = bnjax.bn_init(features)

    def apply(params, state, x):  # momentum 0: the new state has the statistics of the batch
        return bnjax.bn_apply(params, state, x, True, momentum=0.0)

    layers: dict[str, contenders.Layer] = {"bnjax": (apply, params, state)}
    for name, fast in zip(FLAX, (True, False), strict=True):
        flax = nn.BatchNorm(use_running_average=False, momentum=0.0, use_fast_variance=fast)
        variables = flax.init(jax.random.key(0), case.one())
        layers[name] = (partial(_flax, flax), variables["params"], variables["batch_stats"])
    steps = {name: jax.jit(contenders.step(case, layer[0])) for name, layer in layers.items()}
    rng = np.random.default_rng(0)
    for ratio in RATIOS:
        x = (rng.standard_normal((rows, features)) + ratio).astype(np.float32)
        cotangent = rng.standard_normal(x.shape, np.float32)
        given = [jnp.asarray(v) for v in (x, np.zeros_like(x), cotangent)]
        near = state._replace(mean=jnp.full_like(state.mean, ratio + 0.5))
        starts = [("bnjax", "near", near), ("bnjax", "0", state), *((name, None, layers[name][2]) for name in FLAX)]
        for name, where, start in starts:
            call = partial(steps[name], layers[name][1], start, *given)
            result = record.attempt(f"{name}, {ratio:g}", lambda call=call: jax.device_get(call()))
            if result is not None:
                facts = {"library": name, "ratio": ratio, "running mean": where}
                record.keep({**facts, **_errors(result, x, cotangent)})
    found = record.attempt("second derivative", second_derivative)
    if found is not None:
        record.keep({"library": "bnjax", "second derivative": found})


def _flax(flax, params, stats, x):
    return flax.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])


def _errors(result: Any, x: np.ndarray, cotangent: np.ndarray) -> dict[str, float | None]:
    """The largest errors of mean (in standard deviations), var (relative), y, and dx (in parts of its largest)."""
    y, kept, (_, dx) = result
    mean, var = kept[:2] if isinstance(kept, tuple) else (kept["batch_stats"]["mean"], kept["batch_stats"]["var"])
    wide = x.astype(np.float64)
    exact_y, exact_dx = exactness.oracle(x, cotangent)
    errors = {
        "mean": (mean - wide.mean(0)) / wide.std(0),
        "var": var / wide.var(0) - 1,
        "y": y - exact_y,
        "dx": (dx - exact_dx) / np.abs(exact_dx).max(),
    }
    worst = {name: float(np.abs(error).max()) for name, error in errors.items()}
    return {name: value if np.isfinite(value) else None for name, value in worst.items()}


def second_derivative() -> float | None:
    """The distance between second derivatives of bn_apply and of the plain formula, both float32, in parts of the
    largest; None where it is not finite."""
    x, weight, direction = jax.random.normal(jax.random.key(0), (3, 256, 16))
    params, state = bnjax.bn_init(16)

    def ours(x):
        return bnjax.bn_apply(params, state, x, True)[0]

    def plain(x):
        mean = jnp.mean(x, 0, keepdims=True)
        return (x - mean) / jnp.sqrt(jnp.mean((x - mean) ** 2, 0, keepdims=True) + 1e-5)

    def second(layer):
        gradient = jax.grad(lambda x: jnp.sum(weight * jnp.tanh(layer(x))))
        return jax.jit(jax.grad(lambda x: jnp.sum(direction * gradient(x))))(x)

    got, want = (np.asarray(second(layer), np.float64) for layer in (ours, plain))
    distance = float(np.abs(got - want).max() / np.abs(want).max())
    return distance if np.isfinite(distance) else None
