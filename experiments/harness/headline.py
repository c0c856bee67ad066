"""The number by which a claim is known, in words: "15 times fewer steps with batch normalization".

A study names one of its parts and how to say its effect. The words follow from the part as it was decided. Their
direction is not written down: an effect names what it compares, as in "steps to a target, plain / batch normalization",
so that the side of the subject in the effect says whether a ratio above 1 is more of it or less.
"""

import math
import re
from typing import Literal, NamedTuple

from experiments.harness import protocol

Comparison = Literal["number", "amount", "height", "size"]

COMPARATIVES: dict[Comparison, tuple[str, str]] = {
    "number": ("more", "fewer"),
    "amount": ("more", "less"),
    "height": ("higher", "lower"),
    "size": ("larger", "smaller"),
}
"""By what is compared, the words for a subject that has more of it than the other, and for one that has less."""

_SUPERSCRIPT = str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹")


class Headline(NamedTuple):
    """The part that answers a claim best, and how to say its effect. It is fixed before the measurement."""

    part: str
    """the name of the part"""
    words: str
    """a phrase in which {} is the number with its comparative, or only the number if there is no subject"""
    subject: str = ""
    """what the phrase speaks about, as the part's effect names it before or after its "/" or " - "; empty if the effect
    compares nothing"""
    comparison: Comparison = "number"
    """which comparative the phrase has"""


def check(headline: Headline, part: protocol.Part | protocol.Decided) -> None:
    """Refuse a headline that the part cannot fill.

    Raises:
      ValueError: if the phrase has no place for the number, or if the effect does not name the subject on one side.
    """
    if headline.part != part.name or headline.words.count("{}") != 1:
        raise ValueError(f"{headline} of the part {part.name!r}: expected its name, and one {{}} in the words.")
    if headline.subject:
        _is_first(headline.subject, part)


def say(headline: Headline, part: protocol.Decided) -> str:
    """The effect of a part in words."""
    check(headline, part)
    if part.value is None:
        return "not measured"
    number = _compared(headline, part, part.value) if headline.subject else rounded(part.value)
    return headline.words.format(number)


def _compared(headline: Headline, part: protocol.Decided, value: float) -> str:
    """The number and the comparative, such as "15 times fewer", "22% higher", or "4.5 more" of a difference."""
    more, less = COMPARATIVES[headline.comparison]
    first = _is_first(headline.subject, part)
    if part.kind == "difference":
        gained = value if first else -value
        return f"{rounded(abs(gained))} {more if gained > 0 else less}" if gained else f"neither {more} nor {less}"
    times = value if first else 1 / value
    if abs(times - 1) < 1e-9:
        return f"neither {more} nor {less}"
    if 0.5 < times < 2:
        return f"{rounded(100 * abs(times - 1))}% {more if times > 1 else less}"
    return f"{rounded(max(times, 1 / times))} times {more if times > 1 else less}"


def _is_first(subject: str, part: protocol.Part | protocol.Decided) -> bool:
    """Whether the effect has the subject before its operator, not after it."""
    operator, name = " / " if part.kind == "ratio" else " - ", re.escape(subject)
    before = re.search(rf"(?<!\w){name}{operator}", part.effect)
    after = re.search(rf"{operator}{name}(?!\w)", part.effect)
    if bool(before) == bool(after):
        raise ValueError(f"the effect {part.effect!r} has {subject!r} on {'both sides' if before else 'no side'}.")
    return bool(before)


def rounded(number: float) -> str:
    """A positive number, or 0, with two digits."""
    if number == 0:
        return "0"
    if not 1e-3 <= abs(number) < 1e9:
        digits, _, power = f"{number:.1e}".partition("e")
        return f"{digits} \N{MULTIPLICATION SIGN} 10{str(int(power)).translate(_SUPERSCRIPT)}"
    decimals = max(0, 1 - math.floor(math.log10(abs(float(f"{number:.1e}")))))
    return f"{float(f'{number:.1e}'):,.{decimals}f}"
