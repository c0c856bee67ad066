"""The forest plot of the report: each part's effect and interval as a line of SVG, drawn against its threshold.

The threshold is in the middle of every line, and the side on which the claim is true is to its right. All ratios share
one logarithmic scale, whose ends are `ENDS` times the threshold. A difference has no scale in common with another one,
and a ratio within a tenth of its threshold could hardly be told from it on the common scale. Their lines have scales of
their own, whose ends are written on them. The lines of one part on several data sets share a scale.

Positions are in percent of the width, so that a line fills any width and its letters and marks keep their size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from experiments.harness import marks, protocol

TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"

ENDS = 8
"""The ends of the common scale, as a factor."""
TICKS = (8, 4, 2)
"""The factors at the ticks of the common scale, on either side of the threshold."""
OWN = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1)
"""The ends of the scales of ratios near their threshold, as factors."""
ROOM = 0.93
"""The part of its own scale that an interval may fill."""
MARGIN = 4.0
"""Percent of the width between an end of a scale and the edge."""
EDGE = 1.04
"""Where an arrow says that an interval goes on, in half widths of the scale."""


class Scale(NamedTuple):
    """The scale of a part's lines."""

    end: float
    """distance of the ends from the threshold; of a ratio, its logarithm"""
    labels: tuple[str, str]
    """by end, the left one first, what is written on it; empty on the common scale"""


class Line(NamedTuple):
    """The places of a part on its line: 0 is the threshold, and 1 the end of the scale on the claim's side."""

    value: float
    low: float
    high: float
    """low <= high, whatever the claim's side"""


def scale(parts: Sequence[protocol.Decided]) -> Scale:
    """The scale for a part on some data sets."""
    part, distances = parts[0], [abs(x) for each in parts for x in _distances(each)]
    if not distances:
        return Scale(1, ("", ""))
    furthest = max(distances)
    own = [factor for factor in OWN if ROOM * math.log(factor) >= furthest]
    if part.kind == "difference":
        end = _round_up(furthest / ROOM)
        less, more = f"{MINUS}{end:g}", f"+{end:g}"
    elif own:
        end = math.log(min(own))
        less, more = f"÷{min(own)}", f"{TIMES}{min(own)}"
    else:
        return Scale(math.log(ENDS), ("", ""))
    return Scale(end, (less, more) if part.side == "above" else (more, less))


def place(part: protocol.Decided, on: Scale) -> Line | None:
    """The part on its line; None if it was not measured."""
    found = [(x if part.side == "above" else -x) / on.end for x in _distances(part)]
    return Line(found[0], min(found[1:]), max(found[1:])) if found else None


def lines(parts: Sequence[protocol.Decided]) -> list[Markup]:
    """The lines of a part on some data sets, each an SVG element. The last one has the ends of the scale."""
    on = scale(parts)
    return [_line(part, place(part, on), on, last=i == len(parts)) for i, part in enumerate(parts, 1)]


def _line(part: protocol.Decided, found: Line | None, on: Scale, last: bool) -> Markup:
    # Vertical lines reach beyond the element, to join those of the next one. The page cuts them at the end of the part.
    shapes = [f'<line class="threshold" x1="{_x(0)}" x2="{_x(0)}" {_LONG}/>']
    if not any(on.labels):
        shapes += [f'<line class="tick" x1="{x}" x2="{x}" {_LONG}/>' for x in map(_x, _ticks())]
    elif last:
        shapes += [
            f'<text x="{x}%" y="27" text-anchor="{anchor}">{label}</text>'
            for x, anchor, label in zip((0, 100), ("start", "end"), on.labels, strict=True)
        ]
    if found is not None:
        low, high = (min(max(end, -EDGE), EDGE) for end in (found.low, found.high))
        if low < high:
            shapes.append(f'<line class="interval" x1="{_x(low)}" x2="{_x(high)}" y1="{_MIDDLE}" y2="{_MIDDLE}"/>')
        if found.low < -EDGE:
            shapes.append(_shape(-EDGE, "M-5 0L4 -6V6Z"))
        if found.high > EDGE:
            shapes.append(_shape(EDGE, "M5 0L-4 -6V6Z"))
        if -EDGE <= found.value <= EDGE:
            shapes.append(_shape(found.value, marks.SHAPES[marks.VERDICTS[part.verdict].shape]))
    label = f"{part.verdict}: {numbers(part)}, {limit(part)}"
    start = Markup('<svg class="line {}" role="img" aria-label="{}" height="{}" width="100%">')
    height = 30 if last and any(on.labels) else 24
    return start.format(marks.classes(part.verdict), label, height) + Markup("".join(shapes)) + Markup("</svg>")


_LONG = 'y1="-100" y2="200"'
_MIDDLE = 12


def axis() -> Markup:
    """The common scale of ratios as an SVG element."""
    places = zip(
        (0.0, *_ticks()), ("threshold", *(f"{factor}{TIMES}" for factor in (*TICKS, *TICKS[::-1]))), strict=True
    )
    texts = [f'<text x="{_x(place)}" y="12" text-anchor="middle">{text}</text>' for place, text in places]
    return Markup(f'<svg height="16" width="100%">{"".join(texts)}</svg>')


def numbers(part: protocol.Decided) -> str:
    """The effect and its interval, with two digits of the interval's half width."""
    if part.value is None or part.low is None or part.high is None:
        return "not measured"
    half = min(part.value - part.low, part.high - part.value)
    decimals = 1 - math.floor(math.log10(half)) if half > 0 else 0

    def text(x: float) -> str:
        own = 1 - math.floor(math.log10(abs(x))) if x else 0
        least = own if part.kind == "ratio" or not half else 0  # a ratio of 0.0 would tell nothing
        shown = max(decimals, least, 0)
        words = f"{x:.3g}" if shown > 6 else f"{round(x, shown) + 0.0:.{shown}f}"
        return MINUS + words[1:] if words.startswith("-") else words

    return f"{text(part.value)} [{text(part.low)}, {text(part.high)}]"


def limit(part: protocol.Decided) -> str:
    """The side of the threshold on which the claim is true."""
    return f"claimed {'>' if part.side == 'above' else '<'} {part.threshold:g}"


def _distances(part: protocol.Decided) -> list[float]:
    """Of the effect and the ends of its interval from the threshold; of a ratio, in logarithms; empty if unmeasured."""
    if part.value is None or part.low is None or part.high is None:
        return []
    measured = (part.value, part.low, part.high)
    if part.kind == "ratio":
        return [math.log(x / part.threshold) for x in measured]
    return [x - part.threshold for x in measured]


def _ticks() -> list[float]:
    right = [math.log(factor) / math.log(ENDS) for factor in TICKS]
    return [-x for x in right] + right[::-1]


def _x(place: float) -> str:
    return f"{50 + place * (50 - MARGIN):.2f}%"


def _shape(place: float, path: str) -> str:
    return f'<svg class="mark" x="{_x(place)}" y="{_MIDDLE}" overflow="visible"><path d="{path}"/></svg>'


def _round_up(x: float) -> float:
    """The least number that is at least x, and 1, 2 or 5 times a power of ten; 1 for 0."""
    if x == 0:
        return 1.0
    power = math.floor(math.log10(x))
    return next(end for end in (float(f"{digit}e{power}") for digit in (1, 2, 5, 10)) if end >= x)
