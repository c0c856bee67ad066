"""The report of all experiments: verdicts.json for programs, and report.html, a self-contained file, for people."""

import base64
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

HOLDS = "holds"
IN_PART = "holds in part"
NOT_HERE = "does not hold here"
VERDICTS = (HOLDS, IN_PART, NOT_HERE)

PIXELS = 1.4
"""Pixels of a figure, which has 150 per inch, for each CSS pixel. Its letters then have nearly the size of the text."""


class Verdict(NamedTuple):
    """The verdict on one claim, an entry of verdicts.json."""

    id: str
    """the experiment's name, which is unique"""
    claim: str
    source: str
    """the publication that makes the claim, and where in it"""
    measured: str
    threshold: str
    """the measurement required for each verdict"""
    verdict: str
    """one of VERDICTS"""
    seeds: int
    """number of runs behind the measured numbers"""


class Section(NamedTuple):
    """One experiment in the report."""

    verdict: Verdict
    figures: list[Path]
    """PNG files"""
    title: str
    """the statement of the figures, for readers who cannot see them"""
    table: list[list[str]]
    """header row first; empty for no table"""
    seconds: float
    """duration of the experiment"""
    configuration: dict[str, Any]
    """field -> value"""
    command: str
    """command that repeats the experiment"""


def write(folder: Path, sections: Sequence[Section], facts: Mapping[str, str]) -> None:
    """Write `verdicts.json` and `report.html`, each completely or not at all.

    Args:
      folder: folder of the files; it is created if necessary.
      sections: the experiments, in the order of the report.
      facts: facts about the whole run, by name.

    Raises:
      ValueError: if a verdict is not in VERDICTS, an id is repeated, the rows of a table differ in length, or a figure
        is not a PNG file. Nothing is written then.
      OSError: if a figure cannot be read. Nothing is written then.
    """
    _check(sections)
    verdicts = json.dumps([section.verdict._asdict() for section in sections], indent=2, ensure_ascii=False) + "\n"
    template = _environment().get_template("report.html.jinja")
    page = template.render(sections=sections, facts=facts, verdicts=VERDICTS, tally=_tally(sections))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"verdicts.json": verdicts, "report.html": page}.items():
        beside = folder / f"{name}.part"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, folder / name)


def _check(sections: Sequence[Section]) -> None:
    for name, times in Counter(section.verdict.id for section in sections).items():
        if times > 1:
            raise ValueError(f"write(sections=...): {times} have the id {name!r}. Give each an id of its own.")
    for section in sections:
        name, verdict = section.verdict.id, section.verdict.verdict
        if verdict not in VERDICTS:
            raise ValueError(f"write(sections=...): {name} has the verdict {verdict!r}. Pass one of {VERDICTS}.")
        lengths = sorted({len(row) for row in section.table})
        if len(lengths) > 1:
            raise ValueError(
                f"write(sections=...): {name} has table rows of {lengths[0]} to {lengths[-1]} cells. "
                "Fill the short ones with empty strings."
            )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters
    filters.update(picture=_picture, duration=_duration, numeric=_numeric, fields=_fields)
    return environment


def _picture(path: Path) -> dict[str, Any]:
    """Attributes of an img. The width in CSS pixels gives the letters of all figures the same size."""
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"write(sections=...): {path} is not a PNG file. Save the figure as PNG.")
    width, height = (round(int.from_bytes(content[i : i + 4]) / PIXELS) for i in (16, 20))
    return {"src": "data:image/png;base64," + base64.b64encode(content).decode(), "width": width, "height": height}


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "time unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _numeric(table: list[list[str]]) -> list[bool]:
    """By column, whether it contains numbers, possibly among words such as "never"."""
    number = re.compile(r"[-+\u2212<>≤≥≈]? ?\d")
    return [any(map(number.match, column[1:])) for column in zip(*table, strict=True)]


def _tally(sections: Sequence[Section]) -> str:
    counts = Counter(section.verdict.verdict for section in sections)
    several = {HOLDS: "hold", IN_PART: "hold in part", NOT_HERE: "do not hold here"}
    parts = [f"{counts[verdict]} {verdict if counts[verdict] == 1 else several[verdict]}" for verdict in VERDICTS]
    return f"Of {len(sections)} claims, {parts[0]}, {parts[1]} and {parts[2]}."


def _fields(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Names and values as text. The fields of a nested configuration are named `outer.inner`."""
    fields = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return fields
