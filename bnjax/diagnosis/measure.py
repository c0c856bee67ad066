"""A doctor for running statistics, for when evaluation disagrees with training.

For each feature, by its running mean and var and by those of one batch of effectively n values (Kish, 1965):

    shift = |mean - batch mean| / sqrt(batch var + epsilon)        var_ratio = (var + epsilon) / (batch var + epsilon)
    n = (sum of weights)^2 / sum of squared weights

By chance alone the shift is about 1 / sqrt(n), and the logarithm of the ratio sqrt(2 / n): the limits widen with it,
and a larger batch finds smaller faults. It works on the host, in float64. It cannot see how many examples are behind
the places of a convolution, which count one by one though neighbours are alike; nor, among many features, a few whose
variance alone is off, since a rarely active feature looks the same.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from bnjax.core import checks, trees
from bnjax.core.records import BNParams, BNState
from bnjax.diagnosis.plot import draw, short

SEVERITIES = ("error", "warning", "note")
# Limits are SHIFT + NOISE / sqrt(n) and RATIO e^(NOISE sqrt(2 / (n - 1))). Of networks trained on digits (connected
# fully and residual, BN before and after the nonlinearity, batches of 32 to 128, momentum 0.9 and 0.99) those stay
# within them whose learning rate and number of steps let statistics keep up.
NOISE = 3.0
SHIFT, RATIO = 0.5, 3.0  # for weights that move, and for places of a convolution, which are alike
SHARE = 0.25  # of a layer's features: a few that are rarely active may have any variance in one batch
SEVERE_SHIFT, SEVERE_RATIO = 1.0, 4.0  # if half of the features are off by that, it shows in every output
INITIAL = 0.1  # what is left of the initial mean 0 and variance 1: statistics are off by about as much
UPDATES = 0.5  # of those of the feature with most
BATCH = 16  # below, a batch's mean is off by more than a quarter of a standard deviation, its variance by a third
SCALE = 1e-4  # features of branches that start at 0 are below 1e-3 by chance

_COMPARE = "Is preprocessing that of training? If so, the statistics lag: bnjax.recalibrate, or a lower momentum."
_DIVERGED = "Training diverged: restore an earlier checkpoint, then lower the learning rate or clip gradients."
_ADVICE = {
    "non-finite statistics": "bnjax absorbs only what is finite, this came from elsewhere: bnjax.recalibrate.",
    "negative variance": "E[x^2] - E[x]^2 rounded below 0, or it is no variance: bnjax.recalibrate.",
    "non-finite scale": _DIVERGED,
    "non-finite bias": _DIVERGED,
    "non-finite batch": "This layer's input is not finite: see the first such layer, its data, overflow of float16.",
    "never updated": "No batch had two valid values of these features: see masks, indices, domains.",
    "never updated, all": 'Keep the batch_stats that apply(..., mutable=["batch_stats"]) returns; is the layer frozen?',
    "mean shifted": _COMPARE,
    "variance differs": _COMPARE,
    "initial values": "Train longer, lower the momentum, or pass momentum=bnjax.debiased(...), which forgets 0 and 1.",
    "few updates": "Masks or rare indices leave them out: momentum=bnjax.cumulative_average, or bnjax.recalibrate.",
    "not counted": "Imported: a momentum that depends on the count forgets such statistics at once. Set count.",
    "small batch": "Share statistics over devices (axis_name), renormalize (renorm_bn_apply), or freeze the layer.",
    "dead features": "Constant inputs, as of a dead ReLU or an empty pixel, come out as bias. Harmless where few.",
    "dead features, all": "The layer puts out its bias alone: is its input connected, did all units before it die?",
    "zero scale": "Pruned, or driven to 0 by weight decay, which bnjax.training.decay_mask keeps from scale.",
    "zero scale, all": "Intended where a residual branch starts at 0. After training: the layer does nothing.",
}
_UNITS = {"mean shifted": " std", "variance differs": " times", "few updates": " updates"}


class Finding(NamedTuple):
    """One thing wrong with one layer: the `features` are how many, and of how many; `value` is that of the worst."""

    severity: str
    layer: str
    problem: str
    features: tuple[int, int]
    value: float | None
    advice: str


class LayerReport(NamedTuple):
    """What was measured of a layer: arrays of the shape of the statistics, `zero_scale` of that of scale.

    The last four are None if no batch was given, and NaN for the features that it has no values of.
    """

    features: int
    mean: np.ndarray
    var: np.ndarray
    count: tuple[int, int] | None  # least and most updates  # pyright: ignore[reportIncompatibleMethodOverride]
    nonfinite: np.ndarray  # where statistics, of the batch too, are not finite, or a variance is negative
    dead: np.ndarray  # where there is next to no variance
    zero_scale: np.ndarray | None
    shift: np.ndarray | None
    var_ratio: np.ndarray | None
    batch_size: np.ndarray | None  # n
    effective_batch: float | None  # the least n


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Findings, worst first, and what was measured of each layer. True if there are findings; printed it is a table."""

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
        """All of it as `json.dumps` takes it: what is not finite is None, a complex number is [real, imaginary]."""
        return _plain({"findings": self.findings, "layers": self.layers, "epsilon": self.epsilon})

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """A figure with a row for each layer: shift and variance ratio of its features beside what sampling explains.

        Without the moments of a batch it shows the running mean in running standard deviations, and running variances.

        Args:
          path: where to save it, if anywhere, in the format that the name ends in.

        Returns:
          A `matplotlib.figure.Figure`, which belongs to no window.

        Raises:
          ImportError: without matplotlib.
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


def diagnose(
    params: Any, batch_stats: Any, batch_moments: Any = None, *, epsilon: float = 1e-5, momentum: float | None = None
) -> Diagnosis:
    """What may be wrong with running statistics, layer by layer, worst first, with advice.

        shift = |mean - batch mean| / sqrt(batch var + epsilon)
        var_ratio = (var + epsilon) / (batch var + epsilon)

    Errors make evaluation unreliable, warnings may hurt it, notes may be intended. Within a severity the finding
    comes first whose value is the most times its limit (those without a limit lead), then that of more of its layer.
    The limits are constants of this module.

    Args:
      params, batch_stats: a Linen model's collections, NNX states as `bnjax.nnx.functional` gives them, dictionaries
        of `BNParams` and of `BNState`, or those of one layer.
      batch_moments: what one batch in training leaves, `model.apply({"params": params, "batch_stats": batch_stats}, x,
        train=True, mutable=["batch_stats", "batch_moments"])[1]["batch_moments"]`, or `bnjax.Moments` for each layer.
        Take the batch from the data that evaluation fails on. Features without moments are examined by themselves.
      epsilon: of the layers.
      momentum: of the layers, a number. Where updates are counted it tells how much of the initial values is left.

    Returns:
      Diagnosis: `findings`, `layers` by name, `str()` for a table, `as_dict()` for JSON, `plot()`.

    Raises:
      TypeError, ValueError: for traced arrays, a momentum that is not a number in [0, 1], no layer with a running mean
        and variance, or moments of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> from bnjax.diagnosis.measure import diagnose
      >>> x = jnp.arange(200.0).reshape(100, 2) / 50
      >>> params, state = bnjax.bn_init(2)
      >>> _, state = bnjax.bn_apply(params, state, x, train=True, momentum=0.0)
      >>> print(diagnose(params, state, bnjax.batch_moments(x)))
      findings: 0; layers: 1, compared with a batch: 1 (of effectively 100); features: 2
      >>> print(diagnose(params, state, bnjax.batch_moments(x + 5)))
      findings: 1; layers: 1, compared with a batch: 1 (of effectively 100); features: 2
      severity  layer             problem       features  value
      error     the model itself  mean shifted  2 of 2    4.33 std
          Is preprocessing that of training? If so, the statistics lag: bnjax.recalibrate, or a lower momentum.
    """
    epsilon = checks.positive("diagnose", "epsilon", epsilon)
    if callable(momentum):
        raise TypeError("diagnose(momentum=...): expected a number. Leave out a function of the count: it is debiased.")
    if momentum is not None:
        momentum = float(checks.momentum("diagnose", momentum)[0])
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, batch_stats, batch_moments))):
        raise TypeError("diagnose(...): got traced arrays. Call it outside of jit, grad and vmap.")
    layers = trees.norms(params, batch_stats)
    if not layers:
        raise ValueError(
            "diagnose(batch_stats=...): no layer there has both a mean and a var. Pass variables['batch_stats'], "
            "what nnx.state(model, nnx.BatchStat) gives, or BNState."
        )
    if batch_moments is not None and not jax.tree.leaves(batch_moments):
        raise ValueError(
            "diagnose(batch_moments=...): there are no moments in it. Layers of Flax give none: convert the model by "
            "bnjax.linen.convert or bnjax.nnx.convert, and run it in training with batch_moments mutable."
        )
    given = {name.strip("/"): arrays for name, arrays in trees.leaves(batch_moments).items()}
    reports, paired, ranked = {}, [], []
    with np.errstate(all="ignore"):  # what is not finite is looked for
        for name, (own, state) in sorted(layers.items(), key=lambda item: _natural(item[0])):
            layer = name or "the model itself"
            moments = given.get(f"{name}/moments".strip("/"), given.get(name, {}))
            moments = {**moments, **given.get(f"{name}/support".strip("/"), {})}
            paired.append(moments)
            reports[layer] = _measured(layer, own, state, moments, epsilon)
            for severity, problem, where, value, excess in _problems(reports[layer], own, state, epsilon, momentum):
                if number := int(where.sum()):
                    whole = f"{problem}, all" if number == where.size else problem
                    advice = _ADVICE.get(whole, _ADVICE[problem])
                    finding = Finding(severity, layer, problem, (number, where.size), value, advice)
                    ranked.append(((SEVERITIES.index(severity), -excess, -number / where.size), finding))
    if any("weight" in v for v in given.values()) and not any("weight" in v for v in paired):
        raise ValueError(
            f"diagnose(batch_moments=...): moments of {sorted(given)}, but statistics of {sorted(layers)}. "
            'Pass the collection alone, left["batch_moments"], of the same model.'
        )
    ranked.sort(key=lambda pair: pair[0])
    return Diagnosis([finding for _, finding in ranked], reports, epsilon)


def _measured(layer: str, params: BNParams, state: BNState, moments: Mapping[str, Any], epsilon: float) -> LayerReport:
    """A layer by itself and, if it has moments, beside them."""
    mean, var = _wide(state.mean), np.real(_wide(state.var))
    nonfinite = ~np.isfinite(mean) | ~np.isfinite(var) | (var < 0)
    dead = var < epsilon
    shift = ratio = size = None
    if "weight" in moments and (_wide(moments["weight"]) > 0).any():
        weight, batch_mean, batch_var = (_wide(moments[name]) for name in ("weight", "mean", "var"))
        if batch_mean.shape != mean.shape:
            raise ValueError(
                f"diagnose(batch_moments=...): the batch's mean of {layer} has shape {batch_mean.shape}, the running "
                f"mean {mean.shape}. Pass what the same model left, with all axes of its statistics."
            )
        seen = weight > 0
        size = np.where(seen, weight / _wide(moments.get("mean_weight", np.ones_like(weight))), np.nan)
        shift = np.where(seen, abs(mean - batch_mean) / np.sqrt(batch_var + epsilon), np.nan)
        ratio = np.where(seen, (var + epsilon) / (batch_var + epsilon), np.nan)
        nonfinite |= seen & ~(np.isfinite(batch_mean) & np.isfinite(batch_var))
        gone = seen & (batch_var < epsilon) & ~dead
        dead |= gone & (gone.sum() >= SHARE * gone.size)
    return LayerReport(
        var.size,
        mean,
        var,
        None if state.count is None or not var.size else (int(np.min(state.count)), int(np.max(state.count))),
        nonfinite,
        dead & ~nonfinite,
        None if params.scale is None else abs(_wide(params.scale)) < SCALE,
        shift,
        ratio,
        size,
        None if size is None else float(np.nanmin(size)),
    )


def _problems(
    report: LayerReport, params: BNParams, state: BNState, epsilon: float, momentum: float | None
) -> Iterator[tuple[str, str, np.ndarray, float | None, float]]:
    """Severity, problem, the features where it is, the worst's value, and how many times its limit that is."""
    mean, var = report.mean, report.var
    finite, initial = np.isfinite(mean) & np.isfinite(var), (mean == 0) & (var == 1)
    settled = ~initial & ~report.nonfinite  # a cause is not reported by its symptoms again
    yield "error", "non-finite statistics", ~finite, None, math.inf
    yield "error", "negative variance", finite & (var < 0), float(var.min(initial=0, where=finite)), math.inf
    yield "error" if initial.all() else "warning", "never updated", initial, None, math.inf
    for name, value in params._asdict().items():
        if value is not None:
            yield "error", f"non-finite {name}", ~np.isfinite(_wide(value)), None, math.inf
    yield "warning" if 2 * report.dead.sum() > var.size else "note", "dead features", report.dead, None, 1
    if report.zero_scale is not None:
        yield "note", "zero scale", report.zero_scale, None, 1
    if state.count is not None:
        count = _wide(state.count)
        least, most = float(count.min(initial=np.inf, where=settled & (count > 0))), count.max(initial=0)
        yield "note", "not counted", settled & (count == 0), None, 1
        yield "warning", "few updates", settled & (count > 0) & (count < UPDATES * most), least, UPDATES * most / least
        if momentum is not None:
            left = np.where(settled & (count > 0), momentum**count, 0)
            worst = float(left.max(initial=0))
            yield "error" if worst > 0.5 else "warning", "initial values", left > INITIAL, worst, worst / INITIAL
    if report.shift is None or report.var_ratio is None or report.batch_size is None:
        return
    ratio, size = report.var_ratio, report.effective_batch or 0
    yield "error", "non-finite batch", finite & (var >= 0) & report.nonfinite, None, math.inf
    yield "warning", "small batch", report.batch_size < BATCH, size, BATCH / size
    # A batch may miss the few examples that a feature is active for, and have next to no variance then. In units of the
    # larger variance its mean is within a few 1 / sqrt(n) all the same.
    common = report.shift / np.sqrt(np.maximum(ratio, 1))
    seen = settled & (report.batch_size > 0)
    alive = seen & (var + epsilon >= 2 * epsilon * ratio)  # the batch's variance is epsilon or more
    shift_limit, ratio_limit = limits(report.batch_size)
    for problem, where, values, distance, limit, severe, share in (
        ("mean shifted", seen, report.shift, common, shift_limit, SEVERE_SHIFT, 0),
        ("variance differs", alive, ratio, abs(np.log(ratio)), np.log(ratio_limit), math.log(SEVERE_RATIO), SHARE),
    ):
        off = where & (distance > limit)
        if off.any() and off.sum() >= share * off.size:
            times = np.where(off, distance / limit, 0)
            severity = "error" if np.median(distance[where]) > severe else "warning"
            yield severity, problem, off, float(values.flat[times.argmax()]), float(times.max())


def limits(size: Any) -> tuple[Any, Any]:
    """How much of the shift and of the ratio of variances sampling explains."""
    return SHIFT + NOISE / np.sqrt(size), RATIO * np.exp(NOISE * np.sqrt(2 / np.maximum(size - 1, 0)))


def _wide(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def _natural(name: str) -> list[Any]:
    """A key by which layer 2 comes before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


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
