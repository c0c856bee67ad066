"""The protocol of the claims: parts with thresholds, intervals over seeds, and verdicts.

A claim is a list of parts. A part is an effect, a threshold with its source, and the side of the threshold on which the
claim is true. The effect of every seed is measured, and its mean has a confidence interval by Student's t over seeds.
A part holds if its interval lies beyond the threshold on the claim's side, is refuted if it lies beyond it on the other
side, and is undecided if the interval contains the threshold, if the effect could not be measured in some seed, or if
there are fewer than `LEAST_SEEDS` seeds.
A ratio is averaged as its logarithm, so that r and 1 / r are treated alike.

With several parts, one would be decided by chance alone more often than the stated error allows. Therefore the parts of
a claim are decided in Holm's order (Holm, 1979): the part with the smallest p-value of m needs p <= ERROR / m, the next
one p <= ERROR / (m - 1), and so on until one fails, after which none is decided. Each interval is given at the level of
its own step, so that it excludes the threshold exactly if the part is decided, unless a remark says why the part
cannot be decided.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats

ERROR = 0.05
"""The probability, at most, that chance alone decides any of a claim's parts."""
LEAST_SEEDS = 10
"""With fewer seeds, nothing is decided."""

HOLDS = "holds"
IN_PART = "holds in part"
REFUTED = "refuted"
REFUTED_IN_PART = "refuted in part"
UNDECIDED = "undecided"
VERDICTS = (HOLDS, IN_PART, REFUTED, REFUTED_IN_PART, UNDECIDED)


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
    """the confidence level of the interval, by Holm's order"""
    n: int
    """number of seeds in which the effect was measured"""
    threshold: float
    side: Literal["above", "below"]
    source: str
    paper: str
    verdict: str
    remark: str
    """why the part cannot be decided whatever its effect; empty if it can"""


def decide(parts: Sequence[Part], effects: Mapping[str, np.ndarray], remarks: Mapping[str, str] = {}) -> list[Decided]:
    """Decide the parts of a claim together.

    Args:
      parts: the parts.
      effects: by name of the part, the effect in each seed; nan where it could not be measured.
      remarks: by name of the part, the reason why it cannot be decided whatever its effect, for example a best learning
        rate at the edge of its grid.

    Returns:
      The parts with effect, interval and verdict, in the order of `parts`.

    Raises:
      ValueError: if names are repeated or an effect is missing, or if a ratio is not positive.
    """
    names = [part.name for part in parts]
    if len({*names}) < len(names) or {*names} != {*effects}:
        raise ValueError(f"decide(): parts {names}, effects {[*effects]}. Expected one effect for each part.")
    measured = {part.name: _Measured.of(part, np.asarray(effects[part.name], float)) for part in parts}
    reasons = {name: remarks.get(name) or measured[name].remark for name in names}
    order = sorted(names, key=lambda name: (bool(reasons[name]), measured[name].p))
    decided, error, stopped = {}, ERROR, False
    for place, name in enumerate(order):
        if not stopped:
            error = ERROR / (len(order) - place)
        stopped = stopped or bool(reasons[name]) or measured[name].p > error
        decided[name] = measured[name].decided(error, reasons[name])
    return [decided[name] for name in names]


def verdict(parts: Sequence[Decided]) -> str:
    """The verdict on a claim.

    It holds, or is refuted, or is undecided, if all parts are. It holds in part if some of them hold. If none holds,
    but some are refuted and the others are undecided, it is refuted in part.
    """
    found = {part.verdict for part in parts}
    if len(found) == 1:
        return found.pop()
    return IN_PART if HOLDS in found else REFUTED_IN_PART


class _Measured(NamedTuple):
    """The effect of a part over seeds, on the scale on which it is averaged: of a ratio, the logarithm."""

    part: Part
    mean: float
    error: float
    """the standard error of the mean"""
    n: int
    p: float
    """the two-sided p-value of Student's test that the mean is the threshold"""
    remark: str
    """why the test decides nothing; empty if it may"""

    @classmethod
    def of(cls, part: Part, values: np.ndarray) -> "_Measured":
        if part.kind == "ratio" and (values <= 0).any():
            raise ValueError(f"decide(): the ratio {part.name!r} has the value {values.min()}. Expected positive ones.")
        finite = values[np.isfinite(values)]
        if finite.size < values.size or finite.size < 2:
            missing = f"could not be measured in {values.size - finite.size} of {values.size} seeds"
            return cls(part, np.nan, np.nan, finite.size, 1.0, missing if values.size > 1 else "one seed has no spread")
        few = f"{values.size} seeds; a verdict needs {LEAST_SEEDS}" if values.size < LEAST_SEEDS else ""
        scaled = np.log(finite) if part.kind == "ratio" else finite
        threshold = math.log(part.threshold) if part.kind == "ratio" else part.threshold
        mean, error = float(scaled.mean()), float(scaled.std(ddof=1) / math.sqrt(scaled.size))
        distance = abs(mean - threshold)
        if error <= 1e-12 * max(1.0, abs(mean)):  # all seeds agree
            p = float(distance <= 1e-12)
        else:
            p = float(2 * scipy.stats.t.sf(distance / error, scaled.size - 1))
        return cls(part, mean, error, finite.size, p, few)

    def decided(self, error: float, reason: str) -> Decided:
        """The part with its interval at the level 1 - error."""
        part, ends, found = self.part, (None, None, None), UNDECIDED
        if np.isfinite(self.mean):
            back = math.exp if part.kind == "ratio" else float
            half = float(scipy.stats.t.ppf(1 - error / 2, self.n - 1)) * self.error
            low, high = back(self.mean - half), back(self.mean + half)
            ends = (back(self.mean), low, high)
            if not reason and self.p <= error:
                found = HOLDS if (ends[0] > part.threshold) == (part.side == "above") else REFUTED
        value, low, high = ends
        facts = (part.name, part.effect, part.kind, value, low, high, 1 - error, self.n)
        return Decided(*facts, part.threshold, part.side, part.source, part.paper, found, reason)
