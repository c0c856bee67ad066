"""The table of checks of a layer: problems, the features that have them, and what to do."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax.core.records import BNState
from bnjax.diagnosis.arguments import Layer, wide
from bnjax.diagnosis.damage import rarely_active, relative, rows
from bnjax.diagnosis.limits import (
    BATCH,
    INITIAL,
    SEVERE_DAMAGE,
    SEVERE_INITIAL,
    SEVERE_RATIO,
    SEVERE_SHIFT,
    SHARE,
    UPDATES,
    limits,
    single_limit,
)
from bnjax.diagnosis.report import SEVERITIES, Finding, LayerReport

_COMPARE = "Is preprocessing that of training? If so, the statistics lag: bnjax.recalibrate, or a lower momentum."
_DIVERGED = "Training diverged: restore an earlier checkpoint, then lower the learning rate or clip gradients."
ADVICE = {
    "non-finite statistics": "bnjax absorbs only finite statistics, so other code wrote these: bnjax.recalibrate.",
    "negative variance": "E[x^2] - E[x]^2 was rounded below 0, or this is not a variance: bnjax.recalibrate.",
    "non-finite scale": _DIVERGED,
    "non-finite bias": _DIVERGED,
    "non-finite batch": "The input is not finite: look at the first such layer, at its data, and for float16 overflow.",
    "never updated": "No batch had two valid values of these features: see masks, indices, domains.",
    "never updated, all": 'Keep the batch_stats that apply(..., mutable=["batch_stats"]) returns; is the layer frozen?',
    "half precision": "Updates below half a step of the dtype are lost: cast batch_stats to float32, then recalibrate.",
    "evaluation mode": "Its moments have weight 0: frozen, use_running_average=True, or masked. It was not compared.",
    "mean shifted": _COMPARE,
    "variance differs": _COMPARE,
    "variance differs, amplified": "Evaluation amplifies these features: bnjax.recalibrate. Was their variance edited?",
    "initial values": "Train longer, lower the momentum, or pass momentum=bnjax.debiased(...), which forgets 0 and 1.",
    "few updates": "Masks or rare indices exclude them: momentum=bnjax.cumulative_average, or bnjax.recalibrate.",
    "not counted": "Imported without a count: a momentum that depends on it forgets these statistics. Set count.",
    "small batch": "Share statistics over devices (axis_name), renormalize (renorm_bn_apply), or freeze the layer.",
    "dead features": "A constant input (a dead ReLU, an empty pixel) gives the output bias. Harmless for few features.",
    "dead features, all": "The output is always bias: is the input connected, did all units before it die?",
    "dead features, no batch": "Harmless if their input is constant (a dead ReLU); else fatal: pass batch_moments.",
    "zero scale": "Pruned, or driven to 0 by weight decay: bnjax.training.decay_mask excludes scale from it.",
    "zero scale, all": "Intended where a residual branch starts at 0. After training: the layer does nothing.",
}
USUAL_MOMENTUM = 0.99  # the default of Flax's layers and of ours


class Check(NamedTuple):
    """A row of one layer's table of checks: a problem, and the features that have it.

    `value` is what a finding reports of the worst feature, and `times_limit` is how many times a feature exceeds its
    limit, infinite where no value is tolerated. For a problem with a damage, the damage is `times_limit`. All are
    arrays of the shape of `affected`, or one number for all features.
    """

    problem: str
    severity: str
    affected: np.ndarray
    value: Any = None
    times_limit: Any = math.inf
    damage: Any = None
    case: str = ""  # selects the advice for this case

    def finding(self, layer: str) -> Finding:
        """The finding on this layer, with the value of the worst feature. At least one feature is affected."""
        number, of, worst = int(self.affected.sum()), self.affected.size, self._order()
        value, damage = (
            None if values is None else float(np.broadcast_to(values, self.affected.shape).flat[worst[0]])
            for values in (self.value, self.damage)
        )
        case = self.case or (", all" if number == of else "")
        advice = ADVICE.get(self.problem + case, ADVICE[self.problem])
        places = np.stack(np.unravel_index(worst, self.affected.shape), -1).tolist()
        indices = tuple(place[0] if len(place) == 1 else tuple(place) for place in places)
        return Finding(self.severity, layer, self.problem, (number, of), value, advice, damage, indices)

    def rank(self) -> tuple[int, float, float]:
        """The sort key: severity, then damage or value / limit of the worst feature, then the share of features."""
        times_limit = np.broadcast_to(self.times_limit, self.affected.shape).flat[self._order()[0]]
        return SEVERITIES.index(self.severity), -float(times_limit), -float(self.affected.mean())

    def _order(self) -> np.ndarray:
        """The flat indices of the affected features, worst first."""
        places = np.flatnonzero(self.affected)
        return places[np.argsort(-np.broadcast_to(self.times_limit, self.affected.shape).flat[places], kind="stable")]


def checks(layer: Layer, report: LayerReport, epsilon: float, momentum: float | None) -> list[Check]:
    """The table of checks of a layer, those without an affected feature included."""
    mean, var, state = report.mean, report.var, layer.state
    finite, initial = np.isfinite(mean) & np.isfinite(var), (mean == 0) & (var == 1)
    negative = finite & (var < 0)
    settled = ~initial & ~report.nonfinite  # a feature with a known cause is not reported for its symptoms as well
    many_dead = 2 * report.dead.sum() > var.size
    case = ", no batch" if report.batch_size is None and not report.dead.all() else ""
    table = [
        Check("non-finite statistics", "error", ~finite),
        Check("negative variance", "error", negative, var.min(initial=0, where=finite)),
        Check("never updated", "error" if initial.all() else "warning", initial),
        *(
            Check(f"non-finite {name}", "error", ~np.isfinite(wide(value)))
            for name, value in layer.params._asdict().items()
            if value is not None
        ),
        Check("dead features", "warning" if many_dead else "note", report.dead, times_limit=1, case=case),
        _half_precision(report, state, epsilon, momentum),
    ]
    if report.zero_scale is not None:
        table.append(Check("zero scale", "note", report.zero_scale, times_limit=1))
    if state.count is not None:
        counts = np.broadcast_to(wide(state.count), settled.shape)  # one count may serve all features
        table += _count_checks(counts, settled, momentum)
    if report.batch_size is None and layer.moments:
        table.append(Check("evaluation mode", "note", np.full(var.shape, not initial.all()), times_limit=1))
    if report.batch_size is not None:
        table.append(Check("non-finite batch", "error", finite & ~negative & report.nonfinite))
        table += _batch_checks(layer, report, settled, epsilon)
    return table


def _half_precision(report: LayerReport, state: BNState, epsilon: float, momentum: float | None) -> Check:
    """Statistics in a dtype of less than 32 bits.

    An update adds (1 - momentum) (batch mean - mean), which is lost if it is less than half the spacing of the dtype's
    numbers at the mean. So the mean may stop at spacing / (2 (1 - momentum)) from that of the data. So may the
    variance; the relative error of the standard deviation is half that of the variance.
    """
    rest = 1 - (USUAL_MOMENTUM if momentum is None else momentum)
    narrow = [value is not None and _bits(value) < 32 for value in state]
    std = np.sqrt(report.var + epsilon)
    stops = np.zeros(std.shape)
    for value, unit, affected in zip((state.mean, state.var), (std, 2 * std**2), narrow, strict=False):
        if affected and rest:
            stops = np.where(report.nonfinite, 0, np.maximum(stops, _spacing(value) / (2 * rest * unit)))
    return Check("half precision", "warning", np.full(std.shape, any(narrow)), stops if stops.any() else None, stops)


def _bits(values: Any) -> int:
    dtype = np.asarray(values).dtype
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.inexact) else 32


def _spacing(values: Any) -> np.ndarray:
    """The distance of neighbouring numbers of the dtype, at the values."""
    info = jnp.finfo(np.asarray(values).dtype)
    return float(info.eps) * 2.0 ** np.floor(np.log2(np.maximum(abs(wide(values)), float(info.tiny))))


def _count_checks(count: np.ndarray, settled: np.ndarray, momentum: float | None) -> list[Check]:
    """Checks of how many updates each feature absorbed."""
    counted, least = settled & (count > 0), UPDATES * count.max(initial=0)
    table = [
        Check("not counted", "note", settled & (count == 0), times_limit=1),
        Check("few updates", "warning", counted & (count < least), count, least / count),
    ]
    if momentum is not None:
        left = np.where(counted, momentum**count, 0)  # the weight of the initial 0 and 1 in the running statistics
        severity = "error" if left.max(initial=0) > SEVERE_INITIAL else "warning"
        table.append(Check("initial values", severity, left > INITIAL, left, left / INITIAL))
    return table


def _batch_checks(layer: Layer, report: LayerReport, settled: np.ndarray, epsilon: float) -> list[Check]:
    """Checks of the running statistics against the moments of a batch."""
    shift, ratio, size, damage = report.shift, report.var_ratio, report.batch_size, report.damage
    assert shift is not None
    assert ratio is not None
    assert size is not None
    assert damage is not None
    relevance = relative(layer.scale())
    shift_limit, ratio_limit = limits(size)
    compared = settled & (size > 0)
    # A batch may lack the few examples for which a feature is active, so that its variance is next to 0 and the shift
    # in its units is huge. In units of the larger variance the mean is still within a few 1 / sqrt(n).
    distance = relevance * shift / np.sqrt(np.maximum(ratio, 1))
    shifted = compared & (distance > shift_limit)
    # For the same reason variances are compared only where the batch's is epsilon or more.
    batch_mean, batch_var = wide(layer.moments["mean"]), wide(layer.moments["var"])
    rare = rarely_active(report.mean, report.var, batch_mean, batch_var, size)
    alive = compared & (report.var + epsilon >= 2 * epsilon * ratio) & ~rare
    log_ratio = relevance * abs(np.log(ratio))
    differs = alive & (log_ratio > np.log(ratio_limit))
    many = rows(differs).mean(-1, keepdims=True) >= SHARE
    differs = (rows(differs) & many).reshape(differs.shape)
    # A single feature counts if evaluation amplifies it. One that evaluation shrinks may have been active before.
    amplified = alive & (relevance * (1 / np.sqrt(ratio) - 1) > np.sqrt(single_limit(size)) - 1)

    def severity(affected, distance, compared, severe):
        whole = any(c.any() and np.median(d[c]) > severe for d, c in zip(rows(distance), rows(compared), strict=True))
        return "error" if whole or damage.max(initial=0, where=affected) > SEVERE_DAMAGE else "warning"

    either = differs | amplified
    return [
        Check("small batch", "warning", size < BATCH, size, BATCH / size),
        Check("mean shifted", severity(shifted, distance, compared, SEVERE_SHIFT), shifted, shift, damage, damage),
        Check(
            "variance differs",
            severity(either, log_ratio, alive, math.log(SEVERE_RATIO)),
            either,
            ratio,
            damage,
            damage,
            "" if differs.any() else ", amplified",
        ),
    ]
