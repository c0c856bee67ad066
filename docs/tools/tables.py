"""Tables of the files under experiments/results, as Markdown."""

import json
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def verdicts() -> str:
    """Each claim with what was measured and the verdict."""
    rows = [
        [f"[{v['id']}](results/report.html#{v['id']})", v["claim"], v["measured"], v["verdict"]]
        for v in json.loads((RESULTS / "verdicts.json").read_text(encoding="utf-8"))
    ]
    return table(["experiment", "claim", "measured", "verdict"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"verdicts": verdicts}
"""By the name in the comment on a page."""
