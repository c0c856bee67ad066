"""The result of a diagnosis: findings, and a report on each layer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from bnjax.diagnosis.limits import limits
from bnjax.diagnosis.plot import draw, short

SEVERITIES = ("error", "warning", "note")
_UNITS = {"mean shifted": " std", "half precision": " std", "variance differs": " times", "few updates": " updates"}


def listed(values: Iterable[Any], most: int = 4) -> str:
    """The first values, and how many more there are."""
    values = list(map(str, values))
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


class Finding(NamedTuple):
    """A problem of one layer."""

    severity: str  # "error", "warning" or "note"
    layer: str  # the layer's path
    problem: str  # the kind of problem, in words
    features: tuple[int, int]  # the number of affected features, and of all features
    value: float | None  # of the worst feature
    advice: str  # what to do, in a sentence
    damage: float | None = None  # of the worst feature; None if the problem has none
    indices: tuple[Any, ...] = ()  # of the affected features, worst first: indices of the arrays of the layer

    def places(self, most: int = 4) -> str:
        """The indices of the worst features, and how many more are affected."""
        return f"feature{'s' * (len(self.indices) > 1)} {listed(self.indices, most)}"


@dataclass(frozen=True, eq=False)
class LayerReport:
    """Measurements of a layer: arrays of the shape of the statistics; `zero_scale` has the shape of scale.

    The last five are None without a batch, and NaN for features that have no valid value in the batch. Reports are
    equal if their arrays are, where NaN equals NaN.
    """

    features: int  # the number of features
    mean: np.ndarray  # running mean
    var: np.ndarray  # running variance
    count: tuple[int, int] | None  # the minimum and maximum number of updates
    nonfinite: np.ndarray  # running or batch statistics are not finite, or the running variance is negative
    dead: np.ndarray  # the variance is below epsilon, in the batch too
    zero_scale: np.ndarray | None  # |scale| is below 1e-4; None without a scale
    shift: np.ndarray | None  # |mean - batch mean| / sqrt(batch var + epsilon)
    var_ratio: np.ndarray | None  # (var + epsilon) / (batch var + epsilon)
    batch_size: np.ndarray | None  # n, the effective number of values that the batch has of each feature
    effective_batch: float | None  # the smallest n of all features
    # Root mean square of the difference between the outputs in evaluation and training, in units of |scale|, the
    # standard deviation of the output in training, or of the root mean square of the layer's scales if that is larger.
    damage: np.ndarray | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerReport) and _same(vars(self), vars(other))


@dataclass(frozen=True, repr=False, eq=False)
class Diagnosis:
    """Findings, worst first, and a report for each layer. It is true if there are findings, and prints as a table.

    Two diagnoses are equal if their findings and measurements are, where NaN equals NaN. They cannot be hashed.

    Example:
      >>> import bnjax
      >>> diagnosis = bnjax.diagnose(*bnjax.bn_init(2))
      >>> bool(diagnosis), [(finding.severity, finding.problem) for finding in diagnosis.findings]
      (True, [('error', 'never updated')])
      >>> diagnosis.as_dict()["layers"]["the model itself"]["mean"]
      [0.0, 0.0]
    """

    findings: list[Finding]  # the problems, worst first
    layers: dict[str, LayerReport]  # the measurements, by the layer's path
    epsilon: float  # the layers' epsilon

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Diagnosis) and _same(vars(self), vars(other))

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        sizes = [report.effective_batch for report in self.layers.values() if report.effective_batch]
        features = sum(report.features for report in self.layers.values())
        batch = f"compared with a batch: {len(sizes)}" + (f" (of effectively {min(sizes):.4g})" if sizes else "")
        text = f"findings: {len(self.findings)}; layers: {len(self.layers)}, {batch}; features: {features}"
        if sizes and len(sizes) < len(self.layers):
            without = [short(name, 48) for name, report in self.layers.items() if not report.effective_batch]
            text += f"\nwithout moments, not compared: {listed(without)}"
        if not self.findings:
            return text
        rows = [("severity", "layer", "problem", "features", "value", "damage")]
        for f in self.findings:
            number, of = f.features
            value = "" if f.value is None else f"{f.value:.3g}{_UNITS.get(f.problem, '')}"
            damage = "" if f.damage is None else f"{f.damage:.3g} std"
            rows.append((f.severity, short(f.layer, 48), f.problem, f"{number} of {of}", value, damage))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head, *lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        text = f"{text}\n{head}"
        for line, f in zip(lines, self.findings, strict=True):
            ranked = f.damage is not None or f.features[0] < f.features[1]
            text += f"\n{line}\n" + (f"    {f.places()}\n" if ranked else "") + f"    {f.advice}"
        return text

    __repr__ = __str__

    def beyond(self, other: "Diagnosis") -> list[Finding]:
        """The findings that another diagnosis lacks: no finding of it has the same layer and problem.

        After more training, `later.beyond(earlier)` are the new findings and `earlier.beyond(later)` those that are
        gone.

        Example:
          >>> import bnjax
          >>> params, state = bnjax.bn_init(2)
          >>> before = bnjax.diagnose(params, state)
          >>> after = bnjax.diagnose(params, state._replace(mean=state.mean + 1, count=state.count + 1))
          >>> [finding.problem for finding in before.beyond(after)], after.beyond(before)
          (['never updated'], [])
        """
        known = {(finding.layer, finding.problem) for finding in other.findings}
        return [finding for finding in self.findings if (finding.layer, finding.problem) not in known]

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis for `json.dumps`: a number that is not finite is None, a complex one [real, imaginary]."""
        return _plain({"findings": self.findings, "layers": self.layers, "epsilon": self.epsilon})

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """A figure with a row for each layer: the shift and the variance ratio of its features, next to the limits.

        Without the moments of a batch it shows the running mean in running standard deviations, and running variances.

        Args:
          path: file to save the figure in, in the format of the name's suffix; None saves nothing.

        Returns:
          A `matplotlib.figure.Figure`, which belongs to no window.

        Raises:
          ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Diagnosis.plot(): matplotlib is missing. Run `pip install matplotlib`.") from error
        figure = Figure((11, min(2.2 + 0.26 * len(self.layers), 200)), layout="constrained")
        draw(figure, self, limits)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain((np.stack([value.real, value.imag], -1) if np.iscomplexobj(value) else value).tolist())
    if isinstance(value, LayerReport):
        value = vars(value)
    if isinstance(value, Finding):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _same(a: Any, b: Any) -> bool:
    """Equality where NaN equals NaN."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b, equal_nan=True)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b or (a != a and b != b))
