"""The protocol of the claims: parts with thresholds and margins, intervals over seeds, and verdicts.

A claim is a list of parts. A part is an effect, a threshold with its source, and the side of the threshold on which the
claim is true. The effect of every seed is measured, and its mean has a confidence interval by Student's t over seeds.
A ratio is averaged as its logarithm, so that r and 1 / r are treated alike. A part

    holds             if its interval lies beyond the threshold on the claim's side,
    is refuted        if it lies beyond the threshold on the other side,
    has no effect     if it contains the threshold, but lies within the part's margin around no effect,
    is undecided      otherwise; or if the effect could not be measured in some seed.

The third is a test of equivalence by two one-sided tests (Schuirmann, 1987). A part without a margin never has it.

A part that is undecided may get more seeds. They are judged at fixed numbers of seeds only, the `LOOKS`, because an
interval that is looked at after every seed excludes any threshold at last. The part is decided at its first look that
decides anything, and stays as it is; an undecided part shows its last look. Seeds beyond the last complete look count
for nothing.

The error is spent in advance: each of m parts has ERROR / m, and of this its look k has the share SPENT[k] (alpha
spending by fixed shares; Lan & DeMets, 1983). The interval of a look has the level 1 - SPENT[k] ERROR / m. A wrong
decision of any of the three kinds needs an interval that misses the true effect. By Bonferroni's inequality the
probability that any interval of any look of any part does so is at most ERROR, however parts and looks depend on each
other.

Holm's order (1979), which hands on the error of the parts that were decided, is not used. It is valid for one
hypothesis a part, and a part has two here. A part at its threshold, which is rightly decided as without effect, would
hand on its error, although it can be decided wrongly itself. With eight parts that are measured precisely, a third of
the claims without any effect would have a part that holds or is refuted.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats

ERROR = 0.05
"""The probability, at most, that any of a claim's parts is decided wrongly at any look, on one data set."""
LOOKS = (10, 20, 30, 40)
"""The numbers of seeds at which parts are judged."""
SPENT = (1 / 2, 1 / 6, 1 / 6, 1 / 6)
"""The share of a part's error that each look has."""
LEAST_SEEDS = LOOKS[0]
"""With fewer seeds, nothing is decided."""
NO_EFFECT_FROM = LOOKS[1]
"""With fewer seeds, no part is decided as without effect: results of ten seeds were known when margins were fixed."""

HOLDS = "holds"
IN_PART = "holds in part"
REFUTED = "refuted"
REFUTED_IN_PART = "refuted in part"
UNDECIDED = "undecided"
NO_EFFECT = "no effect"
VERDICTS = (HOLDS, IN_PART, REFUTED, REFUTED_IN_PART, UNDECIDED, NO_EFFECT)
MOST_SEEDS = 1000
"""The most seeds that `would_decide` thinks of."""


class Margin(NamedTuple):
    """The range around no effect in which differences do not matter."""

    size: float
    """of a ratio, a number above 1: from 1 / size to size; of a difference, above 0: from -size to size"""
    source: str
    """the argument or the publication that the size comes from"""


TENTH = Margin(1.1, "a tenth, which `placement` called worth a rule before it was measured")
"""The margin of ratios whose threshold is 1."""
POINT = Margin(0.01, "one percentage point: the differences in accuracy that the publications report are larger")
"""The margin of differences of accuracies whose threshold is 0."""


class Part(NamedTuple):
    """One testable statement of a claim, fixed before its measurement."""

    name: str
    """a short name, unique in its claim"""
    effect: str
    """the measured quantity, in words, with its unit"""
    threshold: float
    source: str
    """the publication or the argument that the threshold comes from"""
    kind: Literal["ratio", "difference"] = "ratio"
    """a ratio is positive and is averaged as its logarithm; a difference may have any sign"""
    side: Literal["above", "below"] = "above"
    """the side of the threshold on which the claim is true"""
    paper: str = ""
    """the publication's own number for this effect, if it gives one"""
    margin: Margin | None = None
    """the range around no effect that counts as no effect; None if the threshold is not no effect, or if no size of a
    difference that matters is known"""


class Decided(NamedTuple):
    """A part with its measurement: an entry of `parts` in verdicts.json."""

    name: str
    effect: str
    kind: Literal["ratio", "difference"]
    value: float | None
    """the mean over seeds, geometric for a ratio; None if it could not be measured in every seed"""
    low: float | None
    """the lower end of the interval; None if there is none"""
    high: float | None
    level: float
    """the confidence level of the interval: that of its look"""
    n: int
    """number of seeds in which the effect was measured, of those of the look"""
    threshold: float
    side: Literal["above", "below"]
    source: str
    paper: str
    verdict: str
    remark: str
    """why the part cannot be decided whatever its effect; empty if it can"""
    margin: float | None = None
    """the size of the margin around no effect; None if the part has none"""
    margin_source: str = ""


def decide(parts: Sequence[Part], effects: Mapping[str, np.ndarray], remarks: Mapping[str, str] = {}) -> list[Decided]:
    """Decide the parts of a claim.

    Args:
      parts: the parts.
      effects: by name of the part, the effect in each seed, in the order in which seeds were added; nan where it could
        not be measured.
      remarks: by name of the part, the reason why it cannot be decided whatever its effect, for example a best learning
        rate at the edge of its grid.

    Returns:
      The parts with effect, interval and verdict, in the order of `parts`.

    Raises:
      ValueError: if names are repeated or an effect is missing, if a ratio is not positive, or if a margin is empty.
    """
    names = [part.name for part in parts]
    if len({*names}) < len(names) or {*names} != {*effects}:
        raise ValueError(f"decide(): parts {names}, effects {[*effects]}. Expected one effect for each part.")
    error = ERROR / len(parts)
    return [_decide(part, np.asarray(effects[part.name], float), error, remarks.get(part.name, "")) for part in parts]


def verdict(parts: Sequence[Decided]) -> str:
    """The verdict on a claim.

    If all parts have one verdict, it is that. If some hold, the claim holds in part. If none holds, a part without
    effect contradicts the claim as a refuted one does: if all parts are one or the other, the claim is refuted, and if
    some of them are undecided, it is refuted in part.
    """
    found = {part.verdict for part in parts}
    if len(found) == 1:
        return found.pop()
    if HOLDS in found:
        return IN_PART
    return REFUTED_IN_PART if UNDECIDED in found else REFUTED


def next_look(seeds: int) -> int | None:
    """The number of seeds of the look after those that so many seeds complete; None after the last one."""
    return next((look for look in LOOKS if look > seeds), None)


def may_be_decided(part: Decided) -> bool:
    """Whether more seeds may decide a part: it is undecided only for its interval or for too few seeds."""
    return part.verdict == UNDECIDED and (not part.remark or part.remark == _few(part.n))


def would_decide(part: Decided) -> str:
    """What would decide an undecided part, in words: the seeds that its mean and spread would need, or, if more seeds
    cannot decide it, the reason why. Empty for a part that is decided.

    The mean and spread of more seeds will be others. A number of seeds after the last look, at which no part is judged,
    is rounded to two digits.
    """
    if part.verdict != UNDECIDED:
        return ""
    if not may_be_decided(part):
        return f"a design in which this does not occur: {part.remark}"
    if part.n < LEAST_SEEDS or part.value is None or part.low is None or part.high is None:
        return f"{LEAST_SEEDS} seeds or more"
    scale = math.log if part.kind == "ratio" else float
    mean, half = scale(part.value), (scale(part.high) - scale(part.low)) / 2
    error = (1 - part.level) * SPENT[-1] / SPENT[LOOKS.index(part.n)]  # later looks have less of it than the first
    deviation = half * math.sqrt(part.n) / float(scipy.stats.t.ppf((1 + part.level) / 2, part.n - 1))
    distance = mean - scale(part.threshold)
    needed = {HOLDS if (distance > 0) == (part.side == "above") else REFUTED: abs(distance)}
    if part.margin is not None:
        needed[NO_EFFECT] = scale(part.margin) - abs(mean)
    for seeds in (*(look for look in LOOKS if look > part.n), *range(LOOKS[-1] + 1, MOST_SEEDS + 1)):
        reached = float(scipy.stats.t.ppf(1 - error / 2, seeds - 1)) * deviation / math.sqrt(seeds)
        for found, room in needed.items():
            if room > reached:
                about = f"{seeds}" if seeds in LOOKS else f"about {round(seeds, 1 - math.floor(math.log10(seeds)))}"
                return f"{about} seeds with this mean and spread ({found})"
    return f"more than {MOST_SEEDS} seeds with this mean and spread"


def _few(seeds: int) -> str:
    return f"{seeds} seeds; a verdict needs {LEAST_SEEDS}"


def _decide(part: Part, values: np.ndarray, error: float, remark: str) -> Decided:
    """The part at its first look that decides it, or else at the last one; `error` is that of all looks together."""
    if part.kind == "ratio" and (values <= 0).any():
        raise ValueError(f"decide(): the ratio {part.name!r} has the value {values.min()}. Expected positive ones.")
    if part.margin is not None and part.margin.size <= (1 if part.kind == "ratio" else 0):
        raise ValueError(f"decide(): the margin of {part.name!r} has the size {part.margin.size}. Expected a range.")
    found = _look(part, values[:LEAST_SEEDS], SPENT[0] * error, remark)
    for seeds, share in zip(LOOKS[1:], SPENT[1:], strict=True):
        if found.verdict == UNDECIDED and seeds <= values.size:
            found = _look(part, values[:seeds], share * error, remark)
    return found


def _look(part: Part, values: np.ndarray, error: float, remark: str) -> Decided:
    """The part at one look, with the interval at the level 1 - error. A mean, its interval and a margin are compared on
    the scale on which the effect is averaged: of a ratio, the logarithm."""
    finite = values[np.isfinite(values)]
    value = low = high = None
    found = UNDECIDED
    if finite.size < max(values.size, 2):
        unmeasured = f"could not be measured in {values.size - finite.size} of {values.size} seeds"
        remark = remark or (unmeasured if values.size > 1 else "one seed has no spread")
    else:
        remark = remark or (_few(values.size) if values.size < LEAST_SEEDS else "")
        scale, back = (math.log, math.exp) if part.kind == "ratio" else (float, float)
        scaled = np.array([scale(each) for each in finite])
        mean, deviation = float(scaled.mean()), float(scaled.std(ddof=1))
        if deviation <= 1e-12 * max(1.0, abs(mean)):
            deviation = 0.0  # all seeds agree, up to rounding
        half = float(scipy.stats.t.ppf(1 - error / 2, finite.size - 1)) * deviation / math.sqrt(finite.size)
        value, low, high = back(mean), back(mean - half), back(mean + half)
        distance = mean - scale(part.threshold)
        if not remark and abs(distance) > max(half, 1e-12):
            found = HOLDS if (distance > 0) == (part.side == "above") else REFUTED
        elif not remark and part.margin is not None and values.size >= NO_EFFECT_FROM:
            found = NO_EFFECT if abs(mean) + half < scale(part.margin.size) else UNDECIDED
    facts = (part.name, part.effect, part.kind, value, low, high, 1 - error, finite.size)
    margin = (None, "") if part.margin is None else part.margin
    return Decided(*facts, part.threshold, part.side, part.source, part.paper, found, remark, *margin)
