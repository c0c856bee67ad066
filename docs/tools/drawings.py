"""The drawings of the guides: `python -m docs.tools.drawings` writes them again, as SVG files under docs/images.

Each is at most 360 units wide, so that a phone shows its letters in their size. Text stays text. A drawing has a
background of its own, light or dark as the reader's system asks, so that it is legible on a page of either colour.
"""

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from experiments.harness import report

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
VERDICTS = ROOT / "experiments" / "results" / "verdicts.json"

STYLE = """
text { font-family: system-ui, sans-serif; font-size: 12px; fill: #1d1d1f }
.t { font-weight: 600; font-size: 13px } .b { font-weight: 600 } .s { fill: #444 } .i { font-style: italic }
.m { font-family: ui-monospace, monospace; font-size: 11.5px }
.back { fill: #fff } .a { stroke: #555; stroke-width: 1.5; fill: none } .h { fill: #555 }
.blue { fill: #e8f1fa; stroke: #0072b2 } .amber { fill: #fff8e6; stroke: #b06a00 }
.green { fill: #eaf6f0; stroke: #00805d } .grey { fill: #f3f3f3; stroke: #666 }
.cell { fill: #ececef; stroke: #fff } .one { fill: #0072b2; stroke: #fff } .two { fill: #e69f00; stroke: #fff }
.none { fill: none; stroke: #888; stroke-dasharray: 2 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e6e6ea } .s { fill: #b9bcc6 } .back { fill: #1e2129 } .a { stroke: #a3a7b3 } .h { fill: #a3a7b3 }
.blue { fill: #16324a; stroke: #56a8dc } .amber { fill: #3a2d14; stroke: #e0a03c }
.green { fill: #153a30; stroke: #3fc79a } .grey { fill: #2b2e37; stroke: #8a8f9b }
.cell { fill: #3a3e49; stroke: #1e2129 } .one { fill: #56b4e9; stroke: #1e2129 } .two { stroke: #1e2129 }
}
"""


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A drawing with a title for screen readers."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    arrow = '<path class="h" d="M0 0 L10 5 L0 10 z"/>'
    size = 'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"'
    lines = [
        f'{head} role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title>',
        f"<style>{STYLE}</style>",
        f'<defs><marker id="head" {size}>{arrow}</marker></defs>',
        f'<rect class="back" width="{width}" height="{height}" rx="6"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, line: str, style: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(line)}</text>'


def rectangle(x: float, y: float, width: float, height: float, style: str, radius: float = 0) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{style}"/>'


def box(x: float, y: float, width: float, height: float, style: str, lines: Sequence[tuple[str, str]]) -> str:
    """A box with lines of text in its middle, each with its style."""
    first = y + height / 2 + 4 - 8 * (len(lines) - 1)
    middle = x + width / 2
    rows = [text(middle, first + 16 * i, line, kind, "middle") for i, (kind, line) in enumerate(lines)]
    return "\n".join([rectangle(x, y, width, height, style, 6), *rows])


def arrow(path: str) -> str:
    """An arrow along an SVG path."""
    return f'<path class="a" d="{path}" marker-end="url(#head)"/>'


# ---- which values share a mean and a variance

ROWS, COLUMNS, CELL = 8, 6, 15
Share = Callable[[int, int], str]
"""The style of a cell, by its example and its feature."""


class Axes(NamedTuple):
    """One grid: a row is an example, a column a feature. Cells of one colour share a mean and a variance."""

    title: str
    share: Share
    notes: str = ""
    """a letter right of each row"""
    gap: int = 0
    """pixels between the halves of the batch"""
    caption: str = ""


def _column(style: Callable[[int], str]) -> Share:
    return lambda row, column: style(row) if column == 0 else "cell"


DOMAIN = "ABBABAAB"
AXES = {
    "batch": Axes("Batch", _column(lambda _: "one")),
    "synchronized": Axes("Synchronized", _column(lambda _: "one"), gap=12, caption="two devices"),
    "masked": Axes(
        "Masked", lambda row, c: "none" if row in (2, 5, 7) else "one" if c == 0 else "cell", caption="padding left out"
    ),
    "ghost": Axes("Ghost", _column(lambda row: "one" if row < ROWS / 2 else "two"), caption="ghost_size=4"),
    "index": Axes(
        "Per index",
        _column(lambda row: "one" if DOMAIN[row] == "A" else "two"),
        DOMAIN,
        caption="domains A and B",
    ),
    "conditional": Axes(
        "Conditional",
        _column(lambda _: "one"),
        "13221313",
        caption="scale, bias per class",
    ),
    "layer": Axes("Layer norm", lambda row, _: "one" if row == 0 else "cell"),
    "group": Axes("Group norm", lambda row, column: ("one" if column < COLUMNS / 2 else "two") if row == 0 else "cell"),
}


def axes(grid: Axes) -> str:
    """One grid, with its title."""
    left, top = 40, 34
    parts = [text(85, 20, grid.title, "t", "middle")]
    for row in range(ROWS):
        y = top + CELL * row + (grid.gap if row >= ROWS / 2 else 0)
        parts += [rectangle(left + CELL * c, y, CELL, CELL, grid.share(row, c)) for c in range(COLUMNS)]
        if grid.notes:
            parts.append(text(left + CELL * COLUMNS + 6, y + 12, grid.notes[row], "s"))
    bottom = top + CELL * ROWS + grid.gap / 2 + 6
    parts.append(text(left + CELL * COLUMNS / 2, bottom + 14, "features", "s", "middle"))
    parts.append(f'<g transform="translate(30 {top + (CELL * ROWS + grid.gap) / 2}) rotate(-90)">')
    parts.append(text(0, 0, "examples", "s", "middle") + "</g>")
    parts.append(text(85, bottom + 34, grid.caption, "i s", "middle"))
    return svg(170, 206, f"{grid.title}: which values share a mean and a variance", parts)


# ---- training and evaluation


def training() -> str:
    """Training as a flow of data."""
    parts = [
        text(10, 22, "Training: train=True", "t"),
        box(10, 38, 150, 40, "blue", [("t", "x")]),
        box(190, 38, 150, 54, "amber", [("t", "batch statistics"), ("s", "mean and var of x")]),
        box(10, 128, 150, 54, "grey", [("t", "normalize"), ("m", "(x-mean)/√(var+ε)")]),
        box(190, 176, 150, 100, "green", [
            ("t", "running statistics"), ("s", "momentum * old"),
            ("s", "+ (1 - momentum)"), ("s", "* batch statistics"),
        ]),
        box(10, 222, 150, 54, "grey", [("t", "scale and bias"), ("s", "times scale, plus bias")]),
        box(10, 316, 150, 40, "blue", [("t", "y")]),
        box(190, 316, 150, 40, "blue", [("t", "the new state")]),
        arrow("M85 78 V126"), arrow("M160 58 H188"), arrow("M214 92 V155 H162"), arrow("M290 92 V174"),
        arrow("M85 182 V220"), arrow("M85 276 V314"), arrow("M265 276 V314"),
    ]  # fmt: skip
    title = "Training: the statistics of the batch normalize x, and the running statistics absorb them"
    return svg(350, 368, title, parts)


def evaluation() -> str:
    """Evaluation as a flow of data."""
    parts = [
        text(10, 22, "Evaluation: train=False", "t"),
        box(10, 38, 150, 40, "blue", [("t", "x")]),
        box(190, 128, 150, 54, "green", [("t", "running statistics"), ("s", "mean and var, fixed")]),
        box(10, 128, 150, 54, "grey", [("t", "normalize"), ("m", "(x-mean)/√(var+ε)")]),
        box(10, 222, 150, 54, "grey", [("t", "scale and bias"), ("s", "times scale, plus bias")]),
        box(10, 316, 150, 40, "blue", [("t", "y")]),
        box(190, 316, 150, 40, "blue", [("t", "the same state")]),
        arrow("M85 78 V126"), arrow("M190 155 H162"), arrow("M85 182 V220"), arrow("M85 276 V314"),
        arrow("M265 182 V314"),
    ]  # fmt: skip
    return svg(350, 368, "Evaluation: the running statistics normalize x, and stay as they are", parts)


# ---- devices


def devices() -> str:
    """How the moments of devices become those of the whole batch."""
    parts = []
    for i, lines in enumerate((("16 examples",), ("16 examples",), ("9 examples,", "7 masked"))):
        x = 8 + 118 * i
        middle = x + 54
        parts += [
            text(middle, 20, f"device {i}", "t", "middle"),
            box(x, 30, 108, 44, "blue", [("", line) for line in lines]),
            arrow(f"M{middle} 74 V96"),
            box(x, 98, 108, 44, "amber", [("", "moments"), ("s", "of its own part")]),
            arrow(f"M{middle} 142 V164"),
            arrow(f"M{middle} 230 V252"),
            box(x, 254, 108, 44, "green", [("", "mean and var"), ("s", "of the batch")]),
            arrow(f"M{middle} 298 V320"),
            box(x, 322, 108, 44, "blue", [("", "y"), ("s", "of its own part")]),
        ]
    lines = [
        ("t", "one all-reduce"),
        ("s", "2 numbers per feature, 3 under a mask;"),
        ("s", "merged by the number of values"),
    ]
    parts.append(box(8, 166, 344, 64, "grey", lines))
    title = "Devices: each takes the moments of its part, one all-reduce merges them, all have the same statistics"
    return svg(360, 376, title, parts)


# ---- which variant when


class Branch(NamedTuple):
    """A question of the flow chart, and what to use where the answer is yes."""

    question: tuple[str, ...]
    use: str
    what: tuple[str, ...]
    link: str
    evidence: tuple[str, str] | None = None
    """the claim and its part in verdicts.json"""


BRANCHES = (
    Branch(
        ("Recurrent network,", "normalized at each step?"),
        "BNLSTM",
        ("statistics of", "each timestep"),
        "variants.md#recurrent-batch-normalization",
        ("recurrent", "own statistics"),
    ),
    Branch(
        ("Several domains,", "or clean and", "adversarial examples?"),
        "IndexedBatchNorm",
        ("statistics of", "each domain"),
        "variants.md#statistics-for-each-index",
    ),
    Branch(
        ("One network for many", "classes or styles?"),
        "ConditionalBatchNorm",
        ("scale and bias", "of each class"),
        "variants.md#a-scale-and-a-bias-for-each-class",
    ),
    Branch(
        ("Fine-tuning", "on little data?"),
        "BatchNorm",
        ("frozen=True", "in pretrained layers"),
        "variants.md#frozen-statistics",
    ),
    Branch(
        ("Fewer than 16 examples", "on each of", "several devices?"),
        "BatchNorm",
        ("synchronized", "over the devices"),
        "devices.md",
        ("batch-size", "remedy, synchronized"),
    ),
    Branch(
        ("Fewer than 16 examples,", "on one device?"),
        "RenormBatchNorm",
        ("or group norm:", "compare both"),
        "variants.md#batch-renormalization",
        ("batch-size", "remedy, renormalized"),
    ),
    Branch(
        ("Large batches that", "generalize worse", "than small ones?"),
        "GhostBatchNorm",
        ("statistics of", "small groups"),
        "variants.md#ghost-batch-normalization",
        ("batch-size", "remedy for large batches, ghost"),
    ),
)
WORDS = {"holds": "helps", "refuted": "does not help", "no effect": "no effect", "undecided": "undecided"}
"""By the verdict on a part."""


def measured(branch: Branch) -> list[str]:
    """What the committed verdicts say of a branch, in a line if all data sets agree, and else in a line for each."""
    if branch.evidence is None:
        return ["not measured here"]
    claim, part = branch.evidence
    claims = json.loads(VERDICTS.read_text(encoding="utf-8"))["claims"]
    (entry,) = [each for each in claims if each["id"] == claim]
    found = {r["dataset"]: WORDS[p["verdict"]] for r in entry["results"] for p in r["parts"] if p["name"] == part}
    if len({*found.values()}) == 1:
        return [f"measured: {next(iter(found.values()))}"]
    return [f"{report.source(dataset)}: {words}" for dataset, words in found.items()]


def which_variant() -> str:
    """The flow chart: the first question with the answer yes decides."""
    parts, step = [], 104
    for i, branch in enumerate(BRANCHES):
        y = 10 + step * i
        lines = [
            ("b", branch.use),
            *(("", each) for each in branch.what),
            *(("i s", each) for each in measured(branch)),
        ]
        parts += [
            box(6, y + 6, 164, 58, "amber", [("", line) for line in branch.question]),
            arrow(f"M170 {y + 35} H194"),
            text(181, y + 28, "yes", "i s", "middle"),
            box(196, y, 160, 90, "green", lines),
            arrow(f"M88 {y + 64} V{y + step + 4}"),
            text(95, y + 89, "no", "i s"),
        ]
    y = 16 + step * len(BRANCHES)
    parts.append(box(6, y, 164, 52, "green", [("b", "BatchNorm"), ("", "as it is")]))
    return svg(360, y + 62, "Which variant when: the first question with the answer yes decides", parts)


def drawings() -> dict[str, str]:
    """All drawings, by the name of the file."""
    grids = {f"axes-{name}": axes(grid) for name, grid in AXES.items()}
    others = {
        "training": training(),
        "evaluation": evaluation(),
        "devices": devices(),
        "which-variant": which_variant(),
    }
    return {f"{name}.svg": drawn for name, drawn in (grids | others).items()}


def main() -> None:
    """Write all of them."""
    for name, drawn in drawings().items():
        (IMAGES / name).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
