"""The cost of batch normalization in programs compiled for TPUs and GPUs: traffic, collectives, conditionals, memory.

No program runs: `compilers` compiles for devices that this machine does not have, and `traffic` reads the result. A
pass is one read or write of one device's shard of an array of x's size. The forward pass needs 3 (read x for the
statistics, read x, write y), and fewer if the statistics are fused into the operation that makes x. In a network, the
cost of normalization is the difference in bytes to the same network whose layers have only a scale and a bias.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from experiments.benchmark import compiled_programs, compilers, contenders
from experiments.benchmark.compiled_programs import LIBRARIES, NONE, SMALL, WIDE
from experiments.benchmark.contenders import Block, Case, Direction, Dtype
from experiments.benchmark.traffic import Program
from experiments.harness import data, plot, records

Part = Literal["layer", "variants", "synchronized", "small", "resnet50", "nnx"]

IMAGES = {"v5e": 128, "h100": 128, "h100-8": 32}
"""images per device, by the targets for which networks are compiled"""
TARGETS: dict[str, tuple[str, ...]] = {
    "layer": (_ALL := tuple(name for name in compilers.TARGETS if name != "v5e-64")),
    "variants": _ALL,
    "synchronized": ("v5e", "v5e-64", "v5e-256", "h100-8"),
    "small": ("h100", "h100-8"),  # on a TPU it fits on the chip
    "resnet50": tuple(IMAGES),
    "nnx": tuple(IMAGES),
}
"""the targets for which each part is compiled; 64 chips only add a number of devices to the part `synchronized`"""


@dataclass(frozen=True)
class Compiled:
    """The configuration of the counts. Its fields are the flags of the command line."""

    targets: tuple[str, ...] = tuple(compilers.TARGETS)
    """what to compile for; a target whose compiler is not installed is left out"""
    parts: tuple[Part, ...] = get_args(Part)
    """what to compile: the layer in each library; its variants, masks and layouts; a wide layer by `jit` over sharded
    arrays and by `shard_map`; a small layer; steps of a ResNet-50 in Linen, and of a small network in NNX"""
    out: Path = Path("results")
    """folder for config.json, programs.jsonl and the figure, in a folder of their own"""


def run(config: Compiled) -> None:
    """Passes over memory, collectives and conditionals in programs compiled for TPU and GPU, without either."""
    jax.config.update("jax_platforms", "cpu")  # no program runs, and a plugin without its device would log errors
    folder = config.out / "compiled"
    targets = compilers.installed(config.targets)
    for name in config.targets:
        if name not in targets:
            print(f"left out: {name}, whose compiler, {compilers.target(name).module}, is not installed")
    if not targets:
        raise data.InputError("targets: none has a compiler here. Install bnjax's extra `compiled`, on Linux.")
    records.write_config(folder, config, libraries=contenders.versions())
    with (folder / "programs.jsonl").open("w") as file:
        for name in targets:
            for entry in tqdm(compiled_for(name, *config.parts), desc=name, unit="program"):
                file.write(json.dumps(entry) + "\n")
                file.flush()
    entries = read(folder)
    report(entries)
    figure(folder, entries)


def read(folder: Path) -> list[dict[str, Any]]:
    """The counts of a run, an entry for each program. Programs that the compiler could not print are named."""
    entries = [json.loads(line) for line in (folder / "programs.jsonl").read_text().splitlines()]
    for e in entries:
        if "unread" in e:
            print(f"left out: {e['target']}, {e.get('variant') or e['library']}, {e['direction']}: {e['unread']}")
    return [e for e in entries if "unread" not in e]


def compiled_for(name: str, *parts: str) -> Iterator[dict[str, Any]]:
    """The entries of these parts for one target, counted by a separate process."""
    for line in compilers.lines(name, "-m", __name__, name, *parts):
        if line.startswith("{"):
            yield json.loads(line)


# Functions of the process that compiles for one target.


def programs(mesh: Any, name: str, part: str) -> Iterator[dict[str, Any]]:
    """Entries of one part for one target."""
    if name not in TARGETS[part]:
        return
    if part in ("resnet50", "nnx"):
        images = IMAGES[name] * mesh.size
        for facts, f, variables, x in compiled_programs.networks(part, images):
            yield {**facts, "images": IMAGES[name], **count(mesh, f, variables, [x, compiled_programs.labels(images)])}
        return
    if part == "synchronized":
        layers = compiled_programs.synchronized(mesh)
    else:
        layers = compiled_programs.small(mesh.size) if part == "small" else compiled_programs.layers(part, mesh.size)
    for facts, f, variables, case in layers:
        yield {**facts, **count_layer(mesh, f, variables, case)}


def count_layer(mesh: Any, f: Callable[..., Any], variables: Any, case: Case) -> dict[str, Any]:
    """`count` of a function of `contenders.step`, with the passes of the case."""
    arrays = [jax.ShapeDtypeStruct(case.stored, case.dtype)] * (2 if case.direction == "forward" else 3)
    return count(mesh, f, variables, arrays, math.prod(case.shape) * jnp.dtype(case.dtype).itemsize // mesh.size)


def count(mesh: Any, f: Callable[..., Any], variables: Any, arrays: list[Any], pass_bytes: int = 0) -> dict[str, Any]:
    """Compile `f(*variables, *arrays)`, with the arrays sharded over the devices by examples, and count.

    Returns:
      Bytes moved, also in passes of `pass_bytes`; collectives as [kind, bytes]; the number of conditionals; temporary
      bytes; seconds to compile.
      If the compiler cannot print its program, only the reason, as `unread`.
    """
    whole, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    variables, arrays = (
        jax.tree.map(lambda v, s=sharding: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree)
        for tree, sharding in ((variables, whole), (arrays, divided))
    )
    begun = time.perf_counter()
    compiled = jax.jit(f).lower(*variables, *arrays).compile()
    seconds = time.perf_counter() - begun
    try:
        text, memory = compiled.as_text(), compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # the compiler cannot print some programs for TPU 7x
        return {"unread": str(error).partition("\n")[0]}
    assert text is not None
    assert memory is not None
    program = Program(text)
    return {
        "bytes": program.bytes,
        "passes": round(program.bytes / pass_bytes, 3) if pass_bytes else None,
        "collectives": [[c.kind, c.bytes] for c in program.collectives],
        "conditionals": program.conditionals,
        "temporary": memory.temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


# Tables and figure, from the counts.


def of(entries: list[dict[str, Any]], **facts: Any) -> dict[str, dict[str, Any]]:
    """The entries with these facts, by library."""
    return {e["library"]: e for e in entries if all(e.get(k) == v for k, v in facts.items())}


def added(entries: dict[str, dict[str, Any]], library: str) -> float:
    """Bytes that a library's normalization adds to a network, divided by those that Flax's adds."""
    none, flax = entries[NONE]["bytes"], entries["Flax Linen"]["bytes"]
    return (entries[library]["bytes"] - none) / (flax - none)


def report(entries: list[dict[str, Any]]) -> None:
    """Print the tables."""
    targets = list(dict.fromkeys(e["target"] for e in entries if e["part"] == "layer"))
    libraries = [name for name in LIBRARIES if any(e["library"] == name for e in entries)]
    print("\nPasses over an array of x's size + collectives (their kB) + conditionals, of one layer compiled for")
    for target in targets:
        print(f"\n{target:34}" + "".join(f"{name:>23}" for name in libraries))
        for block, direction, dtype in itertools.product(get_args(Block), get_args(Direction), get_args(Dtype)):
            row = of(entries, target=target, part="layer", variant=None, block=block, direction=direction, dtype=dtype)
            if row:
                cells = (_cell(row.get(name)) for name in libraries)
                print(f"{block:12}{direction:9}{dtype:13}" + "".join(f"{cell:>23}" for cell in cells))
        for variant in dict.fromkeys(e.get("variant") for e in entries):
            for direction in get_args(Direction):
                row = of(entries, target=target, part="layer", variant=variant or "", direction=direction)
                if row:
                    cells = (_cell(row.get(name)) for name in libraries)
                    print(f"{variant:25}{direction:9}" + "".join(f"{cell:>23}" for cell in cells))
    print(f"\nThe same of one layer whose x is {' x '.join(map(str, WIDE))} on a device, bfloat16\n")
    for e in entries:
        if e["part"] == "synchronized":
            print(f"{e['target']:8}{e['mapping']:10}{e['direction']:9}{e['library']:12}{_cell(e):>23}")
    print(f"\nThe same of one small layer whose x is {' x '.join(map(str, SMALL))} on a device, bfloat16\n")
    for e in entries:
        if e["part"] == "small":
            print(f"{e['target']:8}{e['direction']:9}{e['library']:23}{e['variant'] or '':8}{_cell(e):>23}")
    print(
        "\nA training step: GB moved on a device, collectives and their MB, conditionals, GB of temporary memory,\n"
        "and the bytes that normalization adds, in parts of what Flax's adds\n"
    )
    for e in entries:
        if "images" in e:
            same = of(entries, target=e["target"], part=e["part"])
            ratio = f"{added(same, e['library']):8.3f}" if NONE in same else ""
            print(
                f"{e['part']:10}{e['target']:8}{e['library']:24}{e['bytes'] / 1e9:8.3f}{len(e['collectives']):6}"
                f"{merged(e) / 1e6:8.2f}{e['conditionals']:>6}{e['temporary'] / 1e9:8.3f}{ratio}"
            )


def merged(entry: dict[str, Any]) -> int:
    """Bytes of the results of a program's collectives, on one device."""
    return sum(size for _, size in entry["collectives"])


def _cell(entry):
    if entry is None:
        return ""
    return f"{entry['passes']:.2f} + {len(entry['collectives'])} ({merged(entry) / 1e3:.0f}) + {entry['conditionals']}"


def figure(folder: Path, entries: list[dict[str, Any]]) -> None:
    """`compiled.png`: passes of the layer with ReLU, and bytes that normalization adds to a ResNet-50."""
    targets = list(dict.fromkeys(e["target"] for e in entries))
    facts = {"part": "layer", "variant": None, "block": "bn_relu", "direction": "backward", "dtype": "bfloat16"}
    layers = {target: of(entries, target=target, **facts) for target in targets}
    networks = {target: of(entries, target=target, part="resnet50") for target in targets}
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name in LIBRARIES[:3]:
        passes = {t: e[name]["passes"] for t, e in layers.items() if name in e}
        bytes_ = {t: (e[name]["bytes"] - e[NONE]["bytes"]) / 1e9 for t, e in networks.items() if name in e}
        for title, values in ("passes of BN + ReLU with backward", passes), ("GB added to a ResNet-50 step", bytes_):
            if values:
                panels.setdefault(title, {})[name] = values
    if panels:
        plot.bars(
            folder / "compiled.png", panels, title="Main memory that batch normalization moves, compiled, bfloat16"
        )


def main(name: str, *parts: str) -> None:
    """Compile for one target and print the entries, a line each."""
    mesh = compilers.mesh(name)
    for part in parts:
        for entry in programs(mesh, name, part):
            print(json.dumps({"target": name, **entry}, default=_plain), flush=True)


def _plain(value):
    return value.item() if isinstance(value, np.generic) else str(value)


if __name__ == "__main__":
    main(*sys.argv[1:])
