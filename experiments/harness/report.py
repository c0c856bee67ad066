"""The report on all claims: verdicts.json for programs, and report.html, a self-contained file, for people.

The page opens with a tally and with the list of the claims, which the site has too (`listed`): verdicts, and one number
in words (`headline`). A forest plot of all parts of all claims (`forest`) and the sections of the claims follow, then
the protocol, which experiments/README.md states.
"""

import base64
import datetime
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from experiments.harness import forest, marks, protocol
from experiments.harness import headline as headlines

PIXELS = 1.4
"""Pixels of a figure, which has 150 per inch, for each CSS pixel. Its letters then have nearly the size of the text."""

STATEMENT = Path(__file__).parents[1] / "README.md"
"""The file that states the protocol for readers."""


class Change(NamedTuple):
    """A change of a claim's design or threshold after a result had been seen."""

    date: str
    """ISO, such as 2025-01-31"""
    what: str
    """what was changed, and why"""
    seeds: str
    """the seeds of the new measurement, none of which was used before"""


class Result(NamedTuple):
    """The measurement of a claim on one data set."""

    dataset: str
    seeds: int
    """number of seeds behind the measurement"""
    verdict: str
    """one of protocol.VERDICTS, which follows from the parts"""
    parts: tuple[protocol.Decided, ...]
    measured: str
    """a sentence or two on the numbers"""


class Claim(NamedTuple):
    """A claim with its results: an entry of `claims` in verdicts.json."""

    id: str
    """the experiment's name, which is unique"""
    claim: str
    headline: headlines.Headline
    """the part that answers the claim best, and its effect in words"""
    question: str
    source: str
    """the publication that makes the claim, and where in it"""
    protocol: str
    """how it is measured, in sentences"""
    would_change: str
    """what would change the verdict"""
    changes: tuple[Change, ...]
    results: tuple[Result, ...]
    """one for each data set that was run, the digits first"""


class Shown(NamedTuple):
    """What the report shows of a claim's result, beside the numbers of its parts."""

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


class Section(NamedTuple):
    """A claim in the report."""

    claim: Claim
    shown: tuple[Shown, ...]
    """one for each result of the claim, in the same order"""


def write(folder: Path, sections: Sequence[Section], facts: Mapping[str, str]) -> None:
    """Write `verdicts.json` and `report.html`, each completely or not at all.

    Args:
      folder: folder of the files; it is created if necessary.
      sections: the claims, in the order of the report.
      facts: facts about the whole run, by name.

    Raises:
      ValueError: if an id or a data set is repeated, a claim has no result or not one `Shown` for each, a verdict does
        not follow from its parts, a headline names no part or does not fit it, a number is not finite, a date is not
        ISO, the rows of a table differ in length, or a figure is not a PNG file. Nothing is written then.
      OSError: if a figure cannot be read. Nothing is written then.
    """
    _check(sections)
    stated = statement()
    content = {
        "protocol": {"error": protocol.ERROR, "statement": stated},
        "claims": [_plain(section.claim) for section in sections],
    }
    verdicts = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    template = _environment().get_template("report.html.jinja")
    claims = [section.claim for section in sections]
    page = template.render(
        sections=sections,
        axis=forest.axis(),
        facts=facts,
        statement=stated,
        datasets=datasets(claims),
        tally=tally(claims),
        listed=listed(claims),
        style=style(),
        verdicts=marks.VERDICTS,
        parts=sum(len(rows(claim)) for claim in claims),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"verdicts.json": verdicts, "report.html": page}.items():
        beside = folder / f"{name}.part"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, folder / name)


def read(path: Path) -> list[Claim]:
    """The claims in a verdicts.json."""
    return [
        Claim(**entry)._replace(
            headline=headlines.Headline(**entry["headline"]),
            changes=tuple(Change(**change) for change in entry["changes"]),
            results=tuple(
                Result(**result)._replace(parts=tuple(protocol.Decided(**part) for part in result["parts"]))
                for result in entry["results"]
            ),
        )
        for entry in json.loads(path.read_text(encoding="utf-8"))["claims"]
    ]


def datasets(claims: Iterable[Claim]) -> list[str]:
    """The data sets of the results, each once, whatever the size of their images."""
    return list(dict.fromkeys(source(result.dataset) for claim in claims for result in claim.results))


def source(dataset: str) -> str:
    """The name of a data set without the size of its images, in which claims differ."""
    return re.sub(r" \(\d+ x \d+\)$", "", dataset)


class Opposite(NamedTuple):
    """A part that holds on the first of all data sets and is refuted on another one, or the other way round."""

    claim: str
    """the claim's name"""
    dataset: str
    """the other data set"""
    first: protocol.Decided
    other: protocol.Decided


def opposites(claims: Sequence[Claim]) -> list[Opposite]:
    """The parts on which another data set contradicts the first one. A claim that was not measured on the first has
    none."""
    first = datasets(claims)[:1]
    return [
        Opposite(claim.id, other.dataset, here, there)
        for claim in claims
        for one, other in itertools.product(claim.results, repeat=2)
        if source(one.dataset) in first and source(other.dataset) not in first
        for here, there in itertools.product(one.parts, other.parts)
        if here.name == there.name and {here.verdict, there.verdict} == {protocol.HOLDS, protocol.REFUTED}
    ]


def tally(claims: Sequence[Claim]) -> str:
    """How many claims have which verdict on each data set, how many parts are decided, and how many of them have the
    opposite verdict on the first data set: a sentence for each."""
    return " ".join(tallies(claims))


def tallies(claims: Sequence[Claim]) -> list[str]:
    """The sentences of `tally`."""
    sentences: list[str] = []
    for dataset in datasets(claims):
        results = [result for claim in claims for result in claim.results if source(result.dataset) == dataset]
        counts = Counter(result.verdict for result in results)
        words = [
            f"{counts[verdict]} {mark.one if counts[verdict] == 1 else mark.several}"
            for verdict, mark in marks.VERDICTS.items()
            if counts[verdict]
        ]
        parts = [part.verdict for result in results for part in result.parts]
        decided = len(parts) - parts.count(protocol.UNDECIDED)
        contrary = [source(each.dataset) for each in opposites(claims)].count(dataset)
        sentences.append(
            f"Of {_counted(len(results), 'claim')} on {dataset}, "
            f"{' and '.join(filter(None, (', '.join(words[:-1]), words[-1])))}; "
            f"{decided} of {_counted(len(parts), 'part')} {'is' if decided == 1 else 'are'} decided"
            + (f", {contrary} of them against the verdict on {datasets(claims)[0]}." if contrary else ".")
        )
    return sentences


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Said(NamedTuple):
    """The number of a claim, in words."""

    words: str
    part: protocol.Decided
    dataset: str
    verdict: str
    """the verdict on the part; empty if that on the claim says it already"""


def said(claim: Claim) -> Said:
    """The headline of a claim on its first data set."""
    result = claim.results[0]
    part = _headed(claim, result)
    known = result.verdict.startswith(part.verdict)  # as "holds in part" says of a part that holds
    return Said(headlines.say(claim.headline, part), part, result.dataset, "" if known else part.verdict)


def _headed(claim: Claim, result: Result) -> protocol.Decided:
    """The part that the headline names."""
    for part in result.parts:
        if part.name == claim.headline.part:
            return part
    raise ValueError(f"{claim.id} has no part {claim.headline.part!r} on {result.dataset}. Name one in its headline.")


def verdicts(claim: Claim) -> dict[str, list[str]]:
    """By verdict, the data sets on which the claim has it."""
    found: dict[str, list[str]] = {}
    for result in claim.results:
        found.setdefault(result.verdict, []).append(result.dataset)
    return found


def listed(claims: Sequence[Claim], page: str = "", measured: bool = False) -> Markup:
    """The list of claims as HTML without an empty line: verdicts, claim and its number in words.

    Args:
      claims: the claims.
      page: where the report is, for links from another page.
      measured: whether the sentences on the measured numbers follow each claim.
    """
    text = _environment().get_template("claims.html.jinja").render(claims=claims, page=page, measured=measured)
    return Markup(text)


def style() -> str:
    """The CSS of `listed` and of the verdicts."""
    return f"{marks.style()}\n{Path(__file__).with_name('claims.css').read_text(encoding='utf-8')}"


def statement(path: Path = STATEMENT) -> dict[str, str]:
    """The paragraphs of the protocol by their names, from the list `* **Name.** Text` in its Markdown file."""
    text = path.read_text(encoding="utf-8")
    items = re.findall(r"^\* \*\*(.+?)\.\*\* (.+(?:\n  .+)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words) for name, words in items}


def _plain(value: Any) -> Any:
    """The value with every named tuple as a dict."""
    if hasattr(value, "_asdict"):
        return {name: _plain(field) for name, field in value._asdict().items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _check(sections: Sequence[Section]) -> None:
    for name, times in Counter(section.claim.id for section in sections).items():
        if times > 1:
            raise ValueError(f"write(sections=...): {times} have the id {name!r}. Give each an id of its own.")
    for section in sections:
        _check_claim(section)
        for shown in section.shown:
            lengths = sorted({len(row) for row in shown.table})
            if len(lengths) > 1:
                raise ValueError(
                    f"write(sections=...): {section.claim.id} has table rows of {lengths[0]} to {lengths[-1]} cells. "
                    "Fill the short ones with empty strings."
                )


def _check_claim(section: Section) -> None:
    name, results = f"write(sections=...): {section.claim.id}", section.claim.results
    found = [result.dataset for result in results]
    if not found or len({*found}) < len(found) or len(section.shown) != len(found):
        raise ValueError(
            f"{name} has results on {found} and {len(section.shown)} of Shown. "
            "Pass one result or more, each on a data set of its own, and one Shown for each."
        )
    for result in results:
        follows = protocol.verdict(result.parts)
        if not result.parts or result.verdict != follows:
            raise ValueError(
                f"{name} has {len(result.parts)} parts on {result.dataset} and the verdict {result.verdict!r}. "
                f"Pass one part or more, and the verdict that follows from them, {follows!r}."
            )
        headlines.check(section.claim.headline, _headed(section.claim, result))
        for part in result.parts:
            numbers = [x for x in (part.value, part.low, part.high, part.threshold) if x is not None]
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} has {numbers} in part {part.name!r}. Pass None for what was not measured.")
    for change in section.claim.changes:
        try:
            datetime.date.fromisoformat(change.date)
        except ValueError as error:
            raise ValueError(f"{name} has a change of {change.date!r}. Pass an ISO date.") from error


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
    filters.update(rows=rows, lines=forest.lines, numbers=forest.numbers, limit=forest.limit)
    filters.update(said=said, verdicts=verdicts, classes=marks.classes, would_decide=protocol.would_decide)
    return environment


class Row(NamedTuple):
    """A part on each data set on which it was decided."""

    part: protocol.Decided
    """the part on the first of the data sets, for its fixed facts"""
    on: dict[str, protocol.Decided]
    """by data set"""


def rows(claim: Claim) -> list[Row]:
    """The parts of a claim side by side over data sets. Parts with different thresholds are in different rows."""
    found: dict[Any, Row] = {}
    for result in claim.results:
        for part in result.parts:
            fixed = (part.name, part.effect, part.kind, part.threshold, part.side, part.source, part.paper)
            found.setdefault(fixed, Row(part, {})).on[result.dataset] = part
    return list(found.values())


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


def _fields(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Names and values as text. The fields of a nested configuration are named `outer.inner`."""
    fields: dict[str, str] = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return fields
