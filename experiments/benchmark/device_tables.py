"""The results of `device` as tables of text, for the command's output and for the pages."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.benchmark import bench, device_network, device_parts

Table = tuple[list[str], list[list[str]]]
"""head and rows"""
BLOCKS = {"bn": "BN", "bn_relu": "BN + ReLU", "bn_add_relu": "BN + add + ReLU"}
DIRECTIONS = {"forward": "forward", "backward": "forward and backward"}
SMALL = 2**20
"""values of x below which a time is the time to issue the call"""


def read(folder: Path) -> dict[str, Any]:
    """The content of device.json in a folder."""
    return json.loads((folder / "device.json").read_text(encoding="utf-8"))


def markdown(table: Table) -> str:
    """A table in Markdown."""
    head, rows = table
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


def entries(results: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """What a part measured; nothing if it was left out."""
    return results["parts"].get(part, [])


def names(every: Iterable[dict[str, Any]]) -> list[str]:
    """The calls that were timed in some entry."""
    return list(dict.fromkeys(name for entry in every for name in entry["seconds"]))


def ratio(found: Iterable[dict[str, Any]], of: str, to: str) -> float:
    """The minimum time of one call over that of another, the geometric mean over entries."""
    return bench.geometric_mean(min(e["seconds"][of]) / min(e["seconds"][to]) for e in found)


def layer(results: dict[str, Any]) -> Table:
    """By block: how many times as fast as each library bnjax is, and each library's fraction of the speed of copying.

    Both are geometric means over the shapes; a library that failed for one of the shapes is left out there.
    """
    every = entries(results, "layer")
    libraries = [name for name in names(every) if name != "copy"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for e in every:
        small = "" if _values(e) >= SMALL else ", a call's overhead"
        groups.setdefault((e["dtype"], e["block"], e["direction"], small), []).append(e)
    rows: list[list[str]] = []
    for (dtype, block, direction, small), same in groups.items():
        cells = [f"{BLOCKS[block]}, {DIRECTIONS[direction]}, {dtype}{small}"]
        for name in libraries:
            both = [e for e in same if name in e["seconds"] and "bnjax" in e["seconds"]]
            if name != "bnjax":
                cells.append(f"{ratio(both, name, 'bnjax'):.2f}" if both else "-")
        for name in libraries:
            some = [device_parts.bandwidth(e, name) for e in same if name in e["seconds"]]
            part = bench.geometric_mean(some) / device_parts.speed(results) if some else 0
            cells.append("" if small else f"{part:.0%}" if some else "-")
        rows.append(cells)
    times = [f"{name} / bnjax" for name in libraries if name != "bnjax"]
    return ["", *times, *(f"{name}, of the copy speed" for name in libraries)], rows


def times_beside(results: dict[str, Any], block: str, direction: str, dtype: str) -> dict[str, str]:
    """By library, its time in multiples of bnjax's, as a geometric mean over all shapes but the smallest."""
    wanted = {"block": block, "direction": direction, "dtype": dtype}
    every = [e for e in entries(results, "layer") if _values(e) >= SMALL and all(e[k] == v for k, v in wanted.items())]
    return {name: f"{ratio(every, name, 'bnjax'):.2f}" for name in names(every) if name != "copy"}


def layer_times(results: dict[str, Any]) -> Table:
    """By case: the minimum time of each call in microseconds, and the spread (median / minimum - 1) of bnjax's."""
    every = entries(results, "layer")
    libraries = names(every)
    rows = [
        [
            " x ".join(map(str, e["shape"])) + f", {e['dtype']}",
            f"{BLOCKS[e['block']]}, {DIRECTIONS[e['direction']]}",
            *(f"{1e6 * min(e['seconds'][n]):.0f}" if n in e["seconds"] else "-" for n in libraries),
            f"{bench.spread(e, 'bnjax'):.0%}" if "bnjax" in e["seconds"] else "-",
        ]
        for e in every
    ]
    return ["shape", "block", *(f"{name}, µs" for name in libraries), "spread"], rows


def guard(results: dict[str, Any]) -> Table:
    """By shape: the minimum time of a layer in microseconds, for one layer and in a chain, and what the guard adds."""
    every = entries(results, "guard")
    timed = names(every)
    rows: list[list[str]] = []
    for e in every:
        least = {name: 1e6 * min(seconds) / e["layers"] for name, seconds in e["seconds"].items()}
        chain = f"a chain of {e['layers']}, " if e["layers"] > 1 else ""
        issued = "one call at a time" if e["issued"] == 1 else f"{e['issued']} calls at once"
        label = f"{' x '.join(map(str, e['shape']))}, {e['dtype']}, {chain}{DIRECTIONS[e['direction']]}, {issued}"
        pair = device_parts.NEAR in least and device_parts.NO_GUARD in least
        cost = f"{least[device_parts.NEAR] - least[device_parts.NO_GUARD]:.1f}" if pair else "-"
        rows.append([label, *(f"{least[n]:.1f}" if n in least else "-" for n in timed), cost])
    return ["µs for each layer", *timed, "the guard adds"], rows


def resnet(results: dict[str, Any]) -> Table:
    """By normalization: the minimum time of a step, images a second, and its cost as a fraction of Flax's."""
    rows: list[list[str]] = []
    for e in [*entries(results, "resnet"), *entries(results, "pytorch")]:
        least = {name: min(seconds) for name, seconds in e["seconds"].items()}
        base, flax = (least.get(name) for name in (device_network.NONE, "Flax Linen"))
        for name, seconds in least.items():
            about = e["facts"].get(name, {})
            again = about.get("looked again")
            added = "" if base is None or flax is None or flax <= base else f"{(seconds - base) / (flax - base):.3f}"
            rows.append(
                [
                    name if base is not None or name == "PyTorch" else f"{name}, beside PyTorch",
                    f"{1e3 * seconds:.2f}",
                    f"{bench.spread(e, name):.1%}",
                    f"{e['images'] / seconds:.0f}",
                    added,
                    f"{about['temporary'] / 1e9:.2f}" if about.get("temporary") else "",
                    ""
                    if again is None or name not in (device_parts.NEAR, device_parts.FAR)
                    else f"{again[0]} of {again[1]}",
                ]
            )
    head = ["normalization", "ms a step", "spread", "images a second", "adds, of what Flax adds", "temporary GB"]
    return [*head, "running means too far for the guard"], rows


def exact(results: dict[str, Any]) -> Table:
    """The largest error of each quantity, by library and |mean| / std."""
    found = [e for e in entries(results, "exact") if "ratio" in e]
    ratios = list(dict.fromkeys(e["ratio"] for e in found))
    kinds = list(dict.fromkeys((e["library"], e["running mean"]) for e in found))
    cells = {(e["library"], e["running mean"], e["ratio"]): e for e in found}
    rows = [
        [
            f"{name}{f', running mean {where}' if where else ''}, {quantity}",
            *(_error(cells, name, where, r, quantity) for r in ratios),
        ]
        for quantity in ("y", "dx", "mean", "var")
        for name, where in kinds
    ]
    return ["largest error at |mean| / std of", *(f"{r:g}" for r in ratios)], rows


def _error(cells, name, where, ratio, quantity):
    entry = cells.get((name, where, ratio))
    return "-" if entry is None else "not finite" if entry[quantity] is None else f"{entry[quantity]:.1e}"


def facts(results: dict[str, Any]) -> str:
    """The device, its clocks under load, the speed of copying and the versions, in sentences."""
    device = results["device"]
    driver = device["driver"] or {}
    said = [f"Device: {device['name']}"]
    if driver:
        said[0] += f", driver {driver['driver_version']}, {driver['memory.total']} MiB, limit {driver['power.limit']} W"
    if results["parts"].get("copy"):
        said.append(f"A copy reads and writes {device_parts.speed(results) / 1e9:.0f} GB a second")
    if clocks := load(results):
        said.append(f"Under load the driver reported {clocks}")
    said.append("Versions: " + ", ".join(f"{name} {version}" for name, version in device["libraries"].items()))
    return ". ".join(said) + "."


def load(results: dict[str, Any]) -> str:
    """The range of the readings while the GPU was busy at least half of the time; the text is empty without any."""
    readings = [r for part in results["clocks"].values() for r in part]
    busy = [r for r in readings if _number(r["utilization.gpu"]) >= 50]
    if not busy:
        return ""
    parts: list[str] = []
    for field, what, unit in (
        ("clocks.sm", "an SM clock", "MHz"),
        ("clocks.mem", "a memory clock", "MHz"),
        ("temperature.gpu", "a temperature", "°C"),
        ("power.draw", "a power", "W"),
    ):
        values = [_number(r[field]) for r in busy]
        parts.append(
            f"{what} of {min(values):.0f} to {max(values):.0f} (median {statistics.median(values):.0f}) {unit}"
        )
    return ", ".join(parts)


def _number(text: str) -> float:
    """A reading; one that the driver does not give counts as 0."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _values(entry):
    size = 1
    for length in entry["shape"]:
        size *= length
    return size


TABLES = {"layer": layer, "layer_times": layer_times, "guard": guard, "resnet": resnet, "exact": exact}


def report(results: dict[str, Any]) -> str:
    """The whole report, in Markdown."""
    parts = [facts(results)]
    parts += [markdown(table(results)) for name, table in TABLES.items() if entries(results, name.partition("_")[0])]
    second = [e["second derivative"] for e in entries(results, "exact") if "second derivative" in e]
    if second:
        parts.append(f"Second derivative, distance to the plain formula's in parts of the largest: {second[0]}.")
    if results["left_out"]:
        parts.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in results["left_out"].items()) + ".")
    return "\n\n".join(parts)
