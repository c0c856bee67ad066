"""Tables of the files under experiments/results, as Markdown, so that every number on a page comes from a run.

Each function reads the results as they are when the site is built. The experiment's own functions (`bench.least`,
`compiled.added`) define what a number means.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from docs.tools import drawings
from experiments.benchmark import bench, compiled, device_tables, exactness
from experiments.harness import forest, protocol, records, report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
VARIANTS = ("batch-size", "recurrent", "noise", "cost")
"""Experiments for the choice of a variant."""
BLOCKS = {"bn": "BN", "bn_relu": "BN + ReLU", "bn_add_relu": "BN + add + ReLU"}
DIRECTIONS = {"forward": "forward", "backward": "forward and backward"}
FLAX = ("bnjax", "Flax Linen", "Flax Linen, two reads")
COUNTED: dict[str, Callable[[dict[str, Any]], str]] = {
    "collectives": lambda e: str(len(e["collectives"])),
    "kB of collectives": lambda e: f"{compiled.merged(e) / 1e3:.0f}",
    "conditionals": lambda e: str(e["conditionals"]),
}
"""What is counted beside bytes of memory, by its name in a table."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def claims() -> list[report.Claim]:
    """The claims in the committed verdicts.json."""
    return report.read(RESULTS / "verdicts.json")


def verdicts(names: Sequence[str] = (), page: str = "results/report.html") -> str:
    """The list of claims with which the report opens; or only these claims, with the measured numbers."""
    chosen = [claim for claim in claims() if not names or claim.id in names]
    return f"<style>\n{report.style()}</style>\n\n{report.listed(chosen, page, measured=bool(names))}"


def tally() -> str:
    """How many claims have which verdict on each data set, and how many parts are decided, in sentences."""
    return report.tally(claims())


def undecided() -> str:
    """The parts that are undecided, and what would decide each."""
    rows = [
        [f"`{claim.id}`", part.name, result.dataset, forest.numbers(part), f"{part.n}", protocol.would_decide(part)]
        for claim in claims()
        for result in claim.results
        for part in result.parts
        if part.verdict == protocol.UNDECIDED
    ]
    return table(["claim", "part", "data set", "effect [interval]", "seeds", "what would decide it"], rows)


def second_data_set() -> str:
    """Which claims were measured on another data set than the first, which were not, and which parts hold on one of the
    two data sets and are refuted on the other, in sentences."""
    first, *others = report.datasets(claims())
    sentences = []
    for other in others:
        without = [f"`{claim.id}`" for claim in claims() if other not in report.datasets([claim])]
        number = f"{len(claims()) - len(without)} of {len(claims())}" if without else f"All {len(claims())}"
        sentences.append(f"{number} claims were measured on {other} as well as on {first}.")
        if without:
            sentences.append(f"Not measured on it: {', '.join(without)}.")
        opposite = [
            f"{each.first.name} (`{each.claim}`: {forest.numbers(each.first)} and {forest.numbers(each.other)})"
            for each in report.opposites(claims())
            if report.source(each.dataset) == other
        ]
        if opposite:
            sentences.append(f"Parts that hold on one of the two and are refuted on the other: {'; '.join(opposite)}.")
        else:
            sentences.append("No part that holds on one of the two is refuted on the other.")
    return " ".join(sentences)


def which_variant() -> str:
    """The flow chart of variants in words."""
    rows = [
        [
            " ".join(each.question),
            f"[`{each.use}`]({each.link}): {' '.join(each.what)}",
            "; ".join(drawings.measured(each)),
        ]
        for each in drawings.BRANCHES
    ]
    return table(
        ["if", "use", "evidence"], [*rows, ["none of these", "`BatchNorm` as it is", "[claims](../claims.md)"]]
    )


def averaging() -> str:
    """Weights as they are, averaged, and averaged with recalibrated statistics."""
    runs = json.loads((RESULTS / "averaging" / "evaluations.json").read_text(encoding="utf-8"))
    rows = []
    for way in runs[0]:
        accuracy, loss = np.array([run[way] for run in runs]).T
        rows.append([way, records.spread(accuracy, ".3f"), records.spread(loss, ".3f")])
    return table(["weights", "test accuracy", "test cross-entropy"], rows)


def errors(quantity: str) -> str:
    """The largest errors of each library, against |mean| / std of the data."""
    entries = exactness.read(RESULTS / "exactness")
    rows = exactness.by_library(entries, quantity)
    ratios = list(next(iter(rows.values())))
    cells = [[name, *("not finite" if e[r] is None else f"{e[r]:.1e}" for r in ratios)] for name, e in rows.items()]
    return table(["library", *(f"{ratio:g}" for ratio in ratios)], cells)


def _programs() -> list[dict[str, Any]]:
    lines = (RESULTS / "compiled" / "programs.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "unread" not in entry]


def passes(dtype: str = "bfloat16") -> str:
    """Passes over memory of one layer, collectives and conditionals: bnjax / Flax / Flax with two reads."""
    entries = [entry for entry in _programs() if entry["part"] == "layer"]
    targets = list(dict.fromkeys(e["target"] for e in entries))
    kinds = [(block, direction) for block in BLOCKS for direction in DIRECTIONS]
    facts: dict[str, Any] = {"variant": None, "dtype": dtype}

    def cells(block, direction, value):
        found = (compiled.of(entries, target=t, block=block, direction=direction, **facts) for t in targets)
        return [_side_by_side(row, FLAX, value) for row in found]

    rows = [
        [f"{BLOCKS[block]}, {DIRECTIONS[direction]}", *cells(block, direction, lambda e: f"{e['passes']:.1f}")]
        for block, direction in kinds
    ]
    rows += [[f"BN, {DIRECTIONS['backward']}: {what}", *cells("bn", "backward", n)] for what, n in COUNTED.items()]
    return table(["passes: bnjax / Flax / Flax, two reads", *targets], rows)


def _side_by_side(row: dict[str, dict[str, Any]], names: Sequence[str], value: Callable[[Any], str]) -> str:
    return "\N{NO-BREAK SPACE}/ ".join(value(row[name]) if name in row else "-" for name in names)


def synchronized() -> str:
    """Passes, collectives and conditionals of a wide layer, by sharded `jit` and by `shard_map`: bnjax / Flax."""
    entries = [entry for entry in _programs() if entry["part"] == "synchronized"]
    mappings, targets = (list(dict.fromkeys(entry[fact] for entry in entries)) for fact in ("mapping", "target"))
    values = {"passes": lambda e: f"{e['passes']:.1f}", **COUNTED}
    rows = []
    for mapping, direction, target in itertools.product(mappings, DIRECTIONS, targets):
        row = compiled.of(entries, target=target, mapping=mapping, direction=direction)
        label = f"`{mapping}`, {DIRECTIONS[direction]}, {target}"
        rows.append([label, *(_side_by_side(row, FLAX[:2], value) for value in values.values())])
    return table(["bnjax / Flax", *values], rows)


def small() -> str:
    """Passes of a small layer on GPUs, and under a mask."""
    entries = [entry for entry in _programs() if entry["part"] == "small"]
    targets = list(dict.fromkeys(e["target"] for e in entries))
    found = {(e["library"], e["variant"], e["direction"], e["target"]): f"{e['passes']:.1f}" for e in entries}
    rows = [
        [f"{library}{', masked' if variant else ''}, {DIRECTIONS[direction]}"]
        + [found.get((library, variant, direction, target), "-") for target in targets]
        for library, variant, direction in dict.fromkeys(key[:3] for key in found)
    ]
    return table(["passes of a small layer", *targets], rows)


def variants_compiled() -> str:
    """Passes over memory of variants, masks and layouts, forward and backward, bfloat16."""
    entries = [e for e in _programs() if e["part"] == "layer" and e.get("variant") and e["library"] == "bnjax"]
    targets = list(dict.fromkeys(e["target"] for e in entries))
    found = {(e["variant"], e["target"]): e for e in entries if e["direction"] == "backward"}
    names = list(dict.fromkeys(name for name, _ in found))
    rows = [[n, *(f"{found[n, t]['passes']:.1f}" if (n, t) in found else "-" for t in targets)] for n in names]
    return table(["passes, forward and backward, bfloat16", *targets], rows)


def networks() -> str:
    """A training step of networks: bytes moved, what normalization adds to them, collectives, conditionals, memory."""
    entries = [entry for entry in _programs() if "images" in entry]
    rows = []
    for part, target in dict.fromkeys((e["part"], e["target"]) for e in entries):
        same = compiled.of(entries, part=part, target=target)
        flax = same.get("Flax Linen") or same["Flax NNX"]
        ours = same["bnjax"]
        moved = [same.get(name) for name in (compiled.NONE, "Flax Linen, two reads")]
        none, twice = ("" if e is None else f"{e['bytes'] / 1e9:.2f}" for e in moved)
        rows.append(
            [
                f"{'ResNet-50' if part == 'resnet50' else 'NNX network'}, {target}, {ours['images']} images",
                none,
                f"{flax['bytes'] / 1e9:.2f}",
                twice,
                f"{ours['bytes'] / 1e9:.2f}",
                f"{ours['bytes'] / flax['bytes']:.3f}",
                f"{compiled.added(same, 'bnjax'):.3f}" if compiled.NONE in same else "",
                f"{len(flax['collectives'])}, {len(ours['collectives'])}",
                f"{compiled.merged(flax) / 1e6:.1f}, {compiled.merged(ours) / 1e6:.1f}",
                ", ".join(str(e["conditionals"]) for e in (flax, ours)),
                f"{flax['temporary'] / 1e9:.2f}, {ours['temporary'] / 1e9:.2f}",
            ]
        )
    head = ["a step", "GB: no BN", "Flax", "Flax, two reads", "bnjax", "bnjax / Flax", "of what BN adds"]
    pairs = (f"{what}: Flax, bnjax" for what in ("collectives", "MB of collectives", "conditionals", "temporary GB"))
    return table([*head, *pairs], rows)


def _times() -> dict[str, list[dict[str, Any]]]:
    return bench.read(RESULTS / "bench")


def performance() -> str:
    """What the measurements amount to, in four sentences."""
    results = device_tables.read(RESULTS / "device")
    head, steps = device_tables.resnet(results)
    step = {row[0]: dict(zip(head, row, strict=True)) for row in steps}
    head, layers = device_tables.layer(results)
    layer = {row[0]: dict(zip(head, row, strict=True)) for row in layers}
    ours, flax = step["bnjax"], step["Flax Linen"]
    forward, both = layer["BN, forward, bfloat16"], layer["BN, forward and backward, bfloat16"]
    facts = {"layout": "last", "dtype": "float32", "block": "bn", "direction": "backward"}
    entries = [e for e in _times()["libraries"] if all(e[k] == v for k, v in facts.items())]
    cpu = [bench.least(e)["Flax Linen"] / bench.least(e)["bnjax"] for e in entries]
    return (
        f"A training step of ResNet-50 on one H100 takes {ours['ms a step']} ms with bnjax and {flax['ms a step']} ms "
        "with Flax Linen.\n"
        f"One layer on that GPU, forward and backward in bfloat16, is {both['Flax Linen / bnjax']} times as fast as "
        f"Flax's and {both['PyTorch / bnjax']} times as fast as PyTorch's, but its forward pass has only "
        f"{forward['Flax Linen / bnjax']} times the speed of Flax's.\n"
        f"On a CPU one layer, forward and backward in float32, is {bench.geometric_mean(cpu):.2f} times as fast as "
        "Flax's.\n"
        "Nothing was timed on TPUs or on several devices: in compiled programs a synchronized layer has one collective "
        "forward and one backward, as in Flax."
    )


def libraries() -> str:
    """How many times as fast as each library, by minimum times, geometric mean over the shapes."""
    entries = _times()["libraries"]
    names = [name for name in entries[0]["seconds"] if not name.startswith("copy") and name != "bnjax"]
    keys = [tuple(e[k] for k in ("layout", "dtype", "block", "direction")) for e in entries]
    rows = []
    for key in dict.fromkeys(keys):
        same = [e for e, k in zip(entries, keys, strict=True) if k == key]
        ratios = [bench.geometric_mean(bench.least(e)[n] / bench.least(e)["bnjax"] for e in same) for n in names]
        limit = bench.geometric_mean(bench.of_the_limit(e)["bnjax"] for e in same)
        layout, dtype, block, direction = key
        label = f"{BLOCKS[block]}, {DIRECTIONS[direction]}"
        label += "" if dtype == "float32" else f", {dtype}"
        rows.append(
            [label + (", channels first" if layout == "first" else ""), *(f"{v:.2f}" for v in [*ratios, limit])]
        )
    return table(["", *names, "of the limit"], rows)


def bench_facts() -> str:
    """The versions and settings of the committed benchmark, in a sentence."""
    config = records.read_config(RESULTS / "bench")
    found = ", ".join(f"{name} {version}" for name, version in config["libraries"].items())
    shapes = ", ".join(shape.replace("x", " x ") for shape in config["config"]["shapes"])
    rounds = config["config"]["rounds"]
    return (
        f"The committed run compares the minimum of {rounds} times of each call, on {config['cores']} shared CPU "
        f"cores, with jax {config['jax']}, {found}. Means are geometric, over the shapes {shapes}."
    )


def network() -> str:
    """Memory and time of a network of 12 blocks."""
    entries = _times()["network"]
    names = list(entries[0]["values"])
    rows = [[e["measure"], *(f"{e['values'][n]:.3g}" if n in e["values"] else "" for n in names)] for e in entries]
    return table(["", *(f"bnjax, `{n}`" if n == "save_statistics" else n for n in names)], rows)


def variants_timed() -> str:
    """Times of the variants in multiples of `bn_apply`'s."""
    entries = _times()["variants"]
    names = list(entries[0]["seconds"])
    rows = []
    for e in entries:
        least = bench.least(e)
        rows.append([" x ".join(map(str, e["shape"])), *(f"{least[n] / least['bn_apply']:.2f}" for n in names)])
    return table(["shape of x", *(f"`{name}`" for name in names)], rows)


def device(name: str, folder: Path = RESULTS / "device") -> str:
    """A table of `device_tables.TABLES`, or the facts about the device, from the results in a folder."""
    results = device_tables.read(folder)
    return device_tables.facts(results) if name == "facts" else table(*device_tables.TABLES[name](results))


COMPARED = ("bnjax", "Flax Linen", "Flax Linen, two reads", "Haiku", "Equinox")
"""Libraries of README's table."""


def comparison() -> str:
    """The measured rows of README's table: errors, and passes over memory, beside other libraries for JAX."""
    found = exactness.by_library(exactness.read(RESULTS / "exactness"), "y")
    errors = [found[name][1e4] for name in COMPARED]
    rows = [
        [
            "largest error of y at \\|mean\\|/std = 10⁴, float32",
            *("not finite" if error is None else f"{error:,.0f}" if error >= 1 else f"{error:.1g}" for error in errors),
        ]
    ]
    for part, target, what in (
        ("layer", "v5e", "passes over memory, TPU v5e"),
        ("layer", "h100", "passes over memory, H100"),
        ("small", "h100", "the same of a small layer"),
    ):
        facts = {"part": part, "target": target, "variant": None, "block": "bn", "direction": "backward"}
        row = compiled.of(_programs(), dtype="bfloat16", **facts)
        rows.append([what, *(f"{row[name]['passes']:.1f}" for name in COMPARED)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES: dict[str, Callable[[], str]] = {
    "verdicts": verdicts,
    "tally": tally,
    "undecided": undecided,
    "second-data-set": second_data_set,
    "variant-verdicts": lambda: verdicts(VARIANTS, "../results/report.html"),
    "which-variant": which_variant,
    "cost-verdict": lambda: verdicts(["cost"], "../results/report.html"),
    "averaging": averaging,
    "errors-output": lambda: errors("y"),
    "errors-gradient": lambda: errors("dx"),
    "passes": passes,
    "passes-float32": lambda: passes("float32"),
    "synchronized": synchronized,
    "small": small,
    "variants-compiled": variants_compiled,
    "networks": networks,
    "performance": performance,
    "libraries": libraries,
    "bench-facts": bench_facts,
    "device-facts": lambda: device("facts"),
    "device-resnet": lambda: device("resnet"),
    "device-layer": lambda: device("layer"),
    "device-guard": lambda: device("guard"),
    "device-exact": lambda: device("exact"),
    "network": network,
    "variants-timed": variants_timed,
}
"""By the name in the comment on a page, `<!-- table: name -->`."""
