"""The result of a diagnosis: findings, and a report on each layer."""

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from bnjax.diagnosis.limits import limits
from bnjax.diagnosis.plot import draw, short

SEVERITIES = ("error", "warning", "note")
_UNITS = {"mean shifted": " std", "variance differs": " times", "few updates": " updates"}


class Finding(NamedTuple):
    """A problem of one layer."""

    severity: str  # one of SEVERITIES
    layer: str
    problem: str
    features: tuple[int, int]  # the number of affected features, and of all features
    value: float | None  # of the worst feature
    advice: str


class LayerReport(NamedTuple):
    """Measurements of a layer: arrays of the shape of the statistics; `zero_scale` has the shape of scale.

    The last four are None without a batch, and NaN for features that have no valid value in the batch.
    """

    features: int
    mean: np.ndarray
    var: np.ndarray
    count: tuple[int, int] | None  # least and most updates  # pyright: ignore[reportIncompatibleMethodOverride]
    nonfinite: np.ndarray  # running or batch statistics are not finite, or the running variance is negative
    dead: np.ndarray  # the variance is below epsilon
    zero_scale: np.ndarray | None
    shift: np.ndarray | None
    var_ratio: np.ndarray | None
    batch_size: np.ndarray | None  # n
    effective_batch: float | None  # the least n of all features


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Findings, worst first, and a report for each layer. It is true if there are findings, and prints as a table.

    Example:
      >>> import bnjax
      >>> diagnosis = bnjax.diagnose(*bnjax.bn_init(2))
      >>> bool(diagnosis), [(finding.severity, finding.problem) for finding in diagnosis.findings]
      (True, [('error', 'never updated')])
      >>> diagnosis.as_dict()["layers"]["the model itself"]["mean"]
      [0.0, 0.0]
    """

    findings: list[Finding]
    layers: dict[str, LayerReport]
    epsilon: float

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        sizes = [report.effective_batch for report in self.layers.values() if report.effective_batch]
        features = sum(report.features for report in self.layers.values())
        batch = f"compared with a batch: {len(sizes)}" + (f" (of effectively {min(sizes):.4g})" if sizes else "")
        text = f"findings: {len(self.findings)}; layers: {len(self.layers)}, {batch}; features: {features}"
        if not self.findings:
            return text
        rows = [("severity", "layer", "problem", "features", "value")]
        for severity, layer, problem, (number, of), value, _ in self.findings:
            value = "" if value is None else f"{value:.3g}{_UNITS.get(problem, '')}"
            rows.append((severity, short(layer, 48), problem, f"{number} of {of}", value))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head, *lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        advice = (f"    {finding.advice}" for finding in self.findings)
        return "\n".join([text, head, *(line for pair in zip(lines, advice, strict=True) for line in pair)])

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis for `json.dumps`: a number that is not finite is None, a complex one [real, imaginary]."""
        return _plain({"findings": self.findings, "layers": self.layers, "epsilon": self.epsilon})

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """A figure with a row for each layer: the shift and the variance ratio of its features, beside the limits.

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
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
