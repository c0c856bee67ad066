"""How each verdict is shown: its words in a count, its colours and its mark. The report, the site and the README use
this table, so that another verdict is another line of it."""

from typing import Literal, NamedTuple

from experiments.harness import protocol


class Mark(NamedTuple):
    """The look of a verdict. Verdicts differ by shape and filling too, for readers who do not see the colours."""

    one: str
    """what one claim does, as in "1 holds" """
    several: str
    colours: tuple[str, str]
    """on a light and on a dark page, of Okabe and Ito's palette or near it"""
    shape: Literal["disk", "diamond", "square", "triangle"]
    filling: Literal["full", "half", "none"]


_BLUE, _RED, _GREY = ("#0072b2", "#56b4e9"), ("#d55e00", "#f28e4b"), ("#6b6e75", "#a3a7b0")

VERDICTS: dict[str, Mark] = {
    protocol.HOLDS: Mark("holds", "hold", _BLUE, "disk", "full"),
    protocol.IN_PART: Mark("holds in part", "hold in part", _BLUE, "disk", "half"),
    protocol.REFUTED: Mark("is refuted", "are refuted", _RED, "diamond", "full"),
    protocol.REFUTED_IN_PART: Mark("is refuted in part", "are refuted in part", _RED, "diamond", "half"),
    protocol.UNDECIDED: Mark("is undecided", "are undecided", _GREY, "square", "none"),
    protocol.NO_EFFECT: Mark("has no effect", "have no effect", _GREY, "triangle", "full"),
}
"""In the order in which verdicts are counted."""

SHAPES = {
    "disk": "M-5 0A5 5 0 0 0 5 0A5 5 0 0 0 -5 0Z",
    "diamond": "M-6 0L0 -6L6 0L0 6Z",
    "square": "M-4.5 -4.5H4.5V4.5H-4.5Z",
    "triangle": "M-5 5L0 -5L5 5Z",
}
"""The marks of the forest plot, as paths of SVG around their centre."""


def classes(verdict: str) -> str:
    """The classes of an element in HTML that shows the verdict."""
    mark = VERDICTS[verdict]
    return f"{_named(verdict)} {mark.shape} {mark.filling}"


def style() -> str:
    """The colours of the verdicts as CSS. The page's `color-scheme` chooses one of each two."""
    lines = (f".{_named(each)} {{ --mark: light-dark({', '.join(mark.colours)}); }}" for each, mark in VERDICTS.items())
    return "\n".join(lines)


def _named(verdict: str) -> str:
    return f"verdict-{verdict.replace(' ', '-')}"
