"""The forest plot of the report: each part's effect and interval as a line of SVG, drawn against its threshold.

The threshold is in the middle of every line, and the side on which the claim is true is to its right. All ratios share
one logarithmic scale, whose ends are `ENDS` times the threshold. A difference has no scale in common with another one,
and a ratio within a tenth of its threshold could not be told from it on the common scale. Their lines have scales of
their own, whose ends are written on them.

Positions are in percent of the width, so that a line fills any width and its letters and marks keep their size.
"""

import math
from typing import NamedTuple

from markupsafe import Markup

from experiments.harness import protocol

ENDS = 8
TICKS = (8, 4, 2)
"""The factors at the ticks of the common scale, on either side of the threshold."""
NEAR = 1.1
"""A ratio whose interval is within this factor of the threshold has a scale of its own."""
OWN = (1.1, 1.05, 1.02, 1.01, 1.005, 1.002, 1.001)
"""The ends of such scales, as factors."""
MARGIN = 4.0
"""Percent of the width between an end of a scale and the edge."""
EDGE = 1.04
"""Where an arrow says that an interval goes on, in half widths of the scale."""


class Line(NamedTuple):
    """The places of a part on its line: 0 is the threshold, 1 and -1 are the ends of the scale."""

    value: float
    low: float
    high: float
    """low <= high, whatever the claim's side"""
    ends: tuple[str, str]
    """what is written on the left and the right end; empty on the common scale"""


def place(part: protocol.Decided) -> Line | None:
    """The part on its line, with the claim's side to the right; None if it was not measured."""
    if part.value is None or part.low is None or part.high is None:
        return None
    measured = (part.value, part.low, part.high)
    if part.kind == "ratio":
        scaled = [math.log(x / part.threshold) for x in measured]
        furthest = max(map(abs, scaled))
        own = [factor for factor in OWN if math.log(factor) >= furthest] if furthest <= math.log(NEAR) else []
        scale, ends = math.log(min(own, default=ENDS)), (f"÷{min(own)}", f"×{min(own)}") if own else ("", "")
    else:
        scaled = [x - part.threshold for x in measured]
        scale = _round_up(max(map(abs, scaled)))
        ends = (f"−{scale:g}", f"+{scale:g}")  # noqa: RUF001  the sign that is as wide as a plus
    if part.side == "below":
        scaled, ends = [-x for x in scaled], ends[::-1]
    value, *interval = (x / scale for x in scaled)
    return Line(value, min(interval), max(interval), ends)


def line(part: protocol.Decided) -> Markup:
    """The part's line as an SVG element."""
    found, kind = place(part), f"verdict-{protocol.VERDICTS.index(part.verdict) + 1}"
    label = f"{part.verdict}: {numbers(part)}, {limit(part)}"
    shapes = [f'<line class="threshold" x1="50%" x2="50%" y1="0" y2="100%"/>']
    if found is not None:
        if any(found.ends):
            shapes += [
                f'<text x="{x}%" y="26" text-anchor="{anchor}">{end}</text>'
                for x, anchor, end in zip((0, 100), ("start", "end"), found.ends, strict=True)
            ]
        else:
            shapes += [f'<line class="tick" x1="{x}" x2="{x}" y1="0" y2="100%"/>' for x in map(_x, _ticks())]
        low, high = (min(max(end, -EDGE), EDGE) for end in (found.low, found.high))
        if low < high:
            shapes.append(f'<line class="interval" x1="{_x(low)}" x2="{_x(high)}" y1="12" y2="12"/>')
        if found.low < -EDGE:
            shapes.append(_shape(-EDGE, "M-5 0L4 -6V6Z"))
        if found.high > EDGE:
            shapes.append(_shape(EDGE, "M5 0L-4 -6V6Z"))
        if -EDGE <= found.value <= EDGE:
            shapes.append(_shape(found.value, _MARKS[part.verdict]))
    content = "".join(shapes)
    return Markup(
        f'<svg class="line {kind}" role="img" aria-label="{{}}" height="30" width="100%">{content}</svg>'
    ).format(label)


_MARKS = {
    protocol.HOLDS: "M-5 0A5 5 0 0 0 5 0A5 5 0 0 0 -5 0Z",
    protocol.REFUTED: "M-6 0L0 -6L6 0L0 6Z",
    protocol.UNDECIDED: "M-4.5 -4.5H4.5V4.5H-4.5Z",
}
"""A disk, a diamond and a square, so that verdicts differ without colour too."""


def axis() -> Markup:
    """The common scale of ratios, with its ends, as an SVG element."""
    texts = [f'<text x="{_x(0)}" y="12" text-anchor="middle">threshold</text>']
    for x, factor in zip(_ticks(), (*TICKS, *TICKS[::-1]), strict=True):
        texts.append(f'<text x="{_x(x)}" y="12" text-anchor="middle">{factor}×</text>')
    return Markup(
        '<svg role="img" aria-label="The threshold is in the middle; ticks are at 2, 4 and 8 times its distance '
        f'on either side" height="16" width="100%">{"".join(texts)}</svg>'
    )


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
        return f"{x:.2e}" if shown > 6 else f"{round(x, shown) + 0.0:.{shown}f}"

    return f"{text(part.value)} [{text(part.low)}, {text(part.high)}]"


def limit(part: protocol.Decided) -> str:
    """The side of the threshold on which the claim is true."""
    return f"claimed {'>' if part.side == 'above' else '<'} {part.threshold:g}"


def _ticks() -> list[float]:
    right = [math.log(factor) / math.log(ENDS) for factor in TICKS]
    return [-x for x in right] + right[::-1]


def _x(place: float) -> str:
    return f"{50 + place * (50 - MARGIN):.2f}%"


def _shape(place: float, path: str) -> str:
    return f'<svg class="mark" x="{_x(place)}" y="12" overflow="visible"><path d="{path}"/></svg>'


def _round_up(x: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is at least x; 1 for 0."""
    if x == 0:
        return 1.0
    power = math.floor(math.log10(x))
    return next(end for end in (float(f"{digit}e{power}") for digit in (1, 2, 5, 10)) if end >= x)
