"""The cost of batch normalization in bnjax and in other libraries, relative to the machine's speed of copying.

All calls that are compared run in one process, interleaved. Before each there is a rest, because the threads of another
library may still spin (PyTorch's for about 20 ms), then a warm-up call, then the timed call. glibc returns large blocks
to the system, and paging them in again can take longer than the layer, so `keep_memory` makes it keep them. On a shared
machine other programs can only add to a time, most to PyTorch's, whose threads spin at barriers. A call is therefore
represented by its minimum time, reported with the spread of its times. Results are ratios, because absolute times
depend on the machine.

A pass is one read or write of an array of x's size. The forward pass needs 3 (read x for the statistics, read x, write
y), forward and backward pass together 8 (read x and dy for the two sums, read both again, write dx), a copy 2.
"""

import ctypes
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import bnjax
from experiments.benchmark import contenders, footprint
from experiments.benchmark.contenders import Block, Case, Direction, Dtype, Layout
from experiments.harness import data, plot, records

Part = Literal["libraries", "growth", "small", "vmap", "variants", "network", "folded"]

# The minimum number of passes that a block needs.
PASSES = {
    ("bn", "forward"): 3,
    ("bn", "backward"): 8,
    ("bn_relu", "forward"): 3,
    ("bn_relu", "backward"): 8,
    ("bn_add_relu", "forward"): 4,
    ("bn_add_relu", "backward"): 12,
}
MEGABYTES = (1, 4, 16, 64, 256, 400)
MODELS = 8
REST = 0.03  # seconds


@dataclass(frozen=True)
class Bench:
    """The configuration of the benchmark. Its fields are the flags of the command line."""

    parts: tuple[Part, ...] = get_args(Part)
    """what to measure: all libraries; growth with size; a small batch; eight models in one vmap; the variants of
    batch normalization; memory and compile time of networks; evaluation with folded batch normalization"""
    shapes: tuple[str, ...] = ("32x56x56x64", "64x28x28x128", "256x7x7x512", "8192x256")
    """shapes of x, channels last"""
    blocks: tuple[Block, ...] = get_args(Block)
    """only batch normalization, with ReLU, or with the addition of another branch and ReLU"""
    directions: tuple[Direction, ...] = get_args(Direction)
    """only forward, or forward with backward"""
    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    """dtypes of x; dtypes after the first are timed only in the first layout"""
    layouts: tuple[Layout, ...] = get_args(Layout)
    """channels last or first"""
    libraries: tuple[str, ...] = tuple(contenders.CONTENDERS)
    """libraries to time; a library that is not installed is left out"""
    megabytes: tuple[int, ...] = MEGABYTES
    """sizes of x for the growth, in units of 2**20 bytes"""
    ghost_size: int = 16
    """examples in a group, for the variants"""
    rounds: int = 25
    """timings of each call"""
    out: Path = Path("results")
    """folder for config.json, times.jsonl and figures, in a folder of their own"""

    def __post_init__(self) -> None:
        records.check_positive(self, "megabytes", "ghost_size", "rounds")
        if "bnjax" not in self.libraries or not set(self.libraries) <= set(contenders.CONTENDERS):
            raise data.InputError(
                f"libraries={self.libraries}: expected bnjax and some of {list(contenders.CONTENDERS)}."
            )
        for shape in self.shapes:
            if len(sizes(shape)) < 2 or not all(sizes(shape)):
                raise data.InputError(f"shapes={shape}: expected sizes joined by x, such as 8192x256.")


def sizes(shape: str) -> tuple[int, ...]:
    """The shape (8192, 256) from the text 8192x256. A size that is not a number becomes 0."""
    return tuple(int(size) if size.isdecimal() else 0 for size in shape.split("x"))


def run(config: Bench) -> None:
    """Time, memory and compile time of batch normalization, against other libraries and the speed of copying."""
    kept = keep_memory()
    folder = config.out / "bench"
    device = jax.devices()[0]
    records.write_config(
        folder,
        config,
        device=device.device_kind,
        cores=os.cpu_count(),
        memory_kept=kept,
        libraries=contenders.versions(),
    )
    with (folder / "times.jsonl").open("w") as lines:
        for part in config.parts:
            for entry in MEASURES[part](config):
                lines.write(json.dumps({"part": part, **entry}) + "\n")
                lines.flush()
    results = read(folder)
    report(results)
    figures(folder, results)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The measurements of a run, by part."""
    results: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "times.jsonl").read_text().splitlines():
        entry = json.loads(line)
        results.setdefault(entry.pop("part"), []).append(entry)
    return results


def keep_memory() -> bool:
    """Make glibc keep freed memory (one arena, no separately mapped blocks, no trimming); False if that failed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # of malloc.h
    return mallopt is not None and all(
        [mallopt(arena_max, 1), mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1)]
    )


def times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each call, with the calls interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(REST)
            jax.block_until_ready(call())
            begun = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(round(time.perf_counter() - begun, 7))
    return seconds


def copies(x: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    """Ways to read an array and write one of the same size. The fastest is the limit."""
    here = jnp.asarray(x, dtype)
    negative = jax.jit(jnp.negative)
    calls: dict[str, Callable[[], Any]] = {"copy by XLA": lambda: negative(here)}
    if jax.default_backend() == "cpu":
        threads = os.cpu_count() or 1
        source = np.asarray(here).reshape(-1).view(np.uint8)
        parts = list(zip(*(np.array_split(a, threads) for a in (np.empty_like(source), source)), strict=True))
        pool = ThreadPoolExecutor(threads)
        calls["copy by threads"] = lambda: list(pool.map(lambda part: np.copyto(*part), parts))
    return calls


def _timed(case: Case, rounds: int, names: Iterable[str]) -> dict[str, Any]:
    calls = {name: contenders.CONTENDERS[name][1](case) for name in names}
    return {**asdict(case), "seconds": times({**copies(case.arrays()[0], case.dtype), **calls}, rounds)}


def _libraries(config: Bench) -> Iterator[dict[str, Any]]:
    # Arrays are made once per shape and layout. The second dtype and the second layout are not combined.
    matrix = itertools.product(config.layouts, config.shapes, config.dtypes, config.blocks, config.directions)
    cases = [
        Case(sizes(shape), block, direction, dtype, layout)
        for layout, shape, dtype, block, direction in matrix
        if layout == config.layouts[0] or dtype == config.dtypes[0]
    ]
    for case in tqdm(cases, desc="libraries", unit="case"):
        yield _timed(case, config.rounds, _names(config))


def _names(config: Bench) -> list[str]:
    return [name for name in config.libraries if name in contenders.installed()]


def _growth(config: Bench) -> Iterator[dict[str, Any]]:
    names = [name for name in ("bnjax", "Flax Linen", "PyTorch") if name in _names(config)]
    for megabytes in tqdm(config.megabytes, desc="growth", unit="size"):
        yield _timed(Case((megabytes * 1024, 256)), config.rounds, names)


def _small(config: Bench) -> Iterator[dict[str, Any]]:
    for direction in config.directions:
        yield _timed(Case((60, 100), direction=direction), 20 * config.rounds, _names(config))


def _vmap(config: Bench) -> Iterator[dict[str, Any]]:
    """Eight models in one vmap, and eight calls of one model."""
    shape = (32, 28, 28, 64)
    x, cotangent = jax.random.normal(jax.random.key(0), (2, MODELS, *shape))
    params, state = bnjax.bn_init(shape[-1])
    many = jax.tree.map(lambda v: jnp.stack([v] * MODELS), params)
    step = _step(bnjax.bn_apply, state)
    one, together = jax.jit(step), jax.jit(jax.vmap(step))
    pairs = list(zip(x, cotangent, strict=True))
    calls = {
        "one vmap": lambda: together(many, x, cotangent),
        "eight calls": lambda: [one(params, *pair) for pair in pairs],
    }
    yield {"shape": shape, "models": MODELS, "seconds": times(calls, config.rounds)}


def _variants(config: Bench) -> Iterator[dict[str, Any]]:
    """The variants of batch normalization and bn_apply itself, forward with backward, float32."""
    for shape in tqdm([sizes(shape) for shape in config.shapes], desc="variants", unit="shape"):
        x, cotangent = jax.random.normal(jax.random.key(0), (2, *shape))
        calls = {
            name: partial(jax.jit(_step(apply, state)), params, x, cotangent)
            for name, (apply, (params, state)) in variants(shape, config.ghost_size).items()
        }
        yield {"shape": shape, "seconds": times(calls, config.rounds)}


def _folded(config: Bench) -> Iterator[dict[str, Any]]:
    """Evaluation of a network without batch normalization, with folded batch normalization, and with it."""
    shape = (32, 32, 32, 32)
    calls = footprint.serving(jax.random.normal(jax.random.key(0), shape))
    yield {"shape": shape, "seconds": times(calls, 3 * config.rounds)}


def variants(shape: tuple[int, ...], ghost_size: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, Any]]]:
    """Functions called like `bn_apply(params, state, x, train)`, and their variables."""
    features = shape[-1]
    plain, indexed = bnjax.bn_init(features), bnjax.indexed_bn_init(features, 10)
    classes = jax.tree.map(lambda v: jnp.broadcast_to(v, (10, features)), plain[0])
    label = jnp.arange(shape[0]) % 10

    def ghost(*args):
        return bnjax.ghost_bn_apply(*args, ghost_size=ghost_size)

    def renorm(*args):
        return bnjax.renorm_bn_apply(*args, r_max=bnjax.RENORM_R_MAX, d_max=bnjax.RENORM_D_MAX)

    def index(*args):
        return bnjax.indexed_bn_apply(*args, index=jnp.int32(3))

    def conditional(params, state, x, train):
        return bnjax.bn_apply(bnjax.conditional_params(params, label, x), state, x, train)

    def frozen(params, state, x, train):
        return bnjax.bn_apply(params, state, x, False)

    return {
        "bn_apply": (bnjax.bn_apply, plain),
        "ghost_bn_apply": (ghost, plain),
        "renorm_bn_apply": (renorm, plain),
        "indexed_bn_apply": (index, indexed),
        "conditional": (conditional, (classes, plain[1])),
        "frozen": (frozen, plain),
    }


def _step(apply, state) -> Callable[..., Any]:
    """Output, state, and the gradients with respect to parameters and x."""

    def step(params, x, cotangent):
        y, pullback, kept = jax.vjp(lambda params, x: apply(params, state, x, True), params, x, has_aux=True)
        return y, kept, pullback(cotangent)

    return step


MEASURES: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "libraries": _libraries,
    "growth": _growth,
    "small": _small,
    "vmap": _vmap,
    "variants": _variants,
    "network": lambda config: footprint.measure(config.rounds),
    "folded": _folded,
}


def least(entry: dict[str, Any]) -> dict[str, float]:
    """The minimum time of each call, with the fastest copy under the name `copy`."""
    found = {name: min(seconds) for name, seconds in entry["seconds"].items()}
    copied = [found.pop(name) for name in list(found) if name.startswith("copy by")]
    return {**found, "copy": min(copied)} if copied else found


def of_the_limit(entry: dict[str, Any]) -> dict[str, float]:
    """The time of each library, divided by the time of the block's passes at the speed of copying."""
    found = least(entry)
    limit = PASSES[entry["block"], entry["direction"]] * found.pop("copy") / 2
    return {name: seconds / limit for name, seconds in found.items()}


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def spread(entry: dict[str, Any], name: str) -> float:
    """(median - least) / least of the times of each call."""
    seconds = entry["seconds"][name]
    return statistics.median(seconds) / min(seconds) - 1


def disturbed(entry: dict[str, Any]) -> list[str]:
    """The calls whose median exceeds the minimum time by more than half, which other programs on the machine cause."""
    return [name for name in entry["seconds"] if spread(entry, name) > 0.5]


def figures(folder: Path, results: dict[str, Any]) -> None:
    """`libraries.png`, of the first layout and dtype that were measured, and `growth.png`."""
    if entries := results.get("libraries"):
        layout, dtype = entries[0]["layout"], entries[0]["dtype"]
        panels: dict[tuple[str, str], dict[str, list[float]]] = {}
        for e in entries:
            if (e["layout"], e["dtype"]) == (layout, dtype):
                panel = panels.setdefault((e["direction"], e["block"]), {})
                for name, value in of_the_limit(e).items():
                    panel.setdefault(name, []).append(value)
        direction, block = key = ("backward", "bn") if ("backward", "bn") in panels else next(iter(panels))
        means = ", ".join(f"{name} {geometric_mean(values):.1f}" for name, values in panels[key].items())
        title = (
            f"{plot.BLOCKS[block]}, {direction}, over the limit of memory: {means} ({dtype}, channels {layout}). "
            "Dots are geometric means of the shapes, lines their range."
        )
        plot.limits(folder / "libraries.png", panels, title=title)
    if entries := results.get("growth"):
        series: dict[str, list[float]] = {}
        for e in entries:
            for name, seconds in least(e).items():
                passes = PASSES["bn", "backward"] / 2 if name == "copy" else 1
                series.setdefault(name, []).append(1e9 * passes * seconds / math.prod(e["shape"]))
        megabytes = [math.prod(e["shape"]) * 4 / 2**20 for e in entries]
        plot.growth(folder / "growth.png", megabytes, series, title="Time for each value, over the size of a batch")


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    if entries := results.get("libraries"):
        names = [name for name in entries[0]["seconds"] if not name.startswith("copy")]
        print("\nThe time of each library divided by bnjax's (minimum times, geometric mean over shapes); bnjax's time")
        print("divided by that of the passes at the speed of copying (limit); (median - minimum) / minimum (spread).\n")
        print(f"{'':34}" + "".join(f"{name:>14}" for name in names[1:]) + f"{'limit':>8}{'spread':>8}")
        keys = [tuple(e[k] for k in ("layout", "dtype", "direction", "block")) for e in entries]
        for key in dict.fromkeys(keys):
            rows = [e for e, k in zip(entries, keys, strict=True) if k == key]
            ratios = [geometric_mean(least(e)[n] / least(e)["bnjax"] for e in rows) for n in names[1:]]
            limit = geometric_mean(of_the_limit(e)["bnjax"] for e in rows)
            wide = statistics.fmean(spread(e, "bnjax") for e in rows)
            label = f"{key[3]:12}{key[2]:9}{key[1]:9} {key[0]}"
            print(f"{label:34}" + "".join(f"{r:>14.2f}" for r in ratios) + f"{limit:>8.2f}{wide:>8.0%}")
        if names := sorted({name for e in entries for name in disturbed(e)}):
            print(f"\nDisturbed, medians more than half above the minimum for: {', '.join(names)}. Run it again, or")
            print("compare only the minimum times.")
    for part, title in ("growth", "Growth: ns for each value"), ("small", "A small batch: microseconds"):
        for i, e in enumerate(results.get(part, [])):
            found = least(e)
            scale = 1e9 / math.prod(e["shape"]) if part == "growth" else 1e6
            if i == 0:
                print(f"\n{title}\n\n{'':24}" + "".join(f"{name:>14}" for name in found))
            label = f"{math.prod(e['shape']) * 4 / 2**20:.0f} MB" if part == "growth" else e["direction"]
            print(f"{label:24}" + "".join(f"{seconds * scale:>14.2f}" for seconds in found.values()))
    for e in results.get("vmap", []):
        found = least(e)
        ratio = found["one vmap"] / found["eight calls"]
        print(f"\n{e['models']} models in one vmap take {ratio:.2f} of the time of as many calls")
    for i, e in enumerate(results.get("variants", [])):
        found = least(e)
        if i == 0:
            print(f"\nVariants: times bn_apply\n\n{'':24}" + "".join(f"{name:>18}" for name in found))
        label = "x".join(map(str, e["shape"]))
        print(f"{label:24}" + "".join(f"{seconds / found['bn_apply']:>18.2f}" for seconds in found.values()))
    footprint.report(results.get("network", []))
    for e in results.get("folded", []):
        found = least(e)
        print("\nEvaluation: times a network that never had batch normalization\n")
        for name, seconds in found.items():
            print(f"{name:24}{seconds / found['never had it']:>8.3f}{1e3 * seconds:>10.2f} ms")
