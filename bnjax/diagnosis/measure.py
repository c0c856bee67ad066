"""A diagnosis of running statistics, for when evaluation disagrees with training.

The running mean and var of each feature are compared with the moments of one batch, of effective size n (Kish, 1965):

    shift = |mean - batch mean| / sqrt(batch var + epsilon)        var_ratio = (var + epsilon) / (batch var + epsilon)
    n = (sum of weights)^2 / sum of squared weights

Sampling alone makes the shift about 1 / sqrt(n) and the logarithm of the ratio about sqrt(2 / n). The limits contain
these terms, so a larger batch reveals smaller faults. The computation runs on the host, in float64. Two things stay
hidden from it. The pixels of a convolution count as independent values, although neighbouring pixels are correlated, so
n is too large. A few features whose variance alone is off are not reported, because a rarely active feature looks the
same.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from bnjax.core import checks, trees
from bnjax.core.records import BNParams, BNState
from bnjax.diagnosis.limits import (
    BATCH,
    INITIAL,
    SCALE,
    SEVERE_INITIAL,
    SEVERE_RATIO,
    SEVERE_SHIFT,
    SHARE,
    UPDATES,
    limits,
)
from bnjax.diagnosis.report import SEVERITIES, Diagnosis, Finding, LayerReport

_COMPARE = "Is preprocessing that of training? If so, the statistics lag: bnjax.recalibrate, or a lower momentum."
_DIVERGED = "Training diverged: restore an earlier checkpoint, then lower the learning rate or clip gradients."
_ADVICE = {
    "non-finite statistics": "bnjax absorbs finite statistics only, so other code wrote these: bnjax.recalibrate.",
    "negative variance": "E[x^2] - E[x]^2 was rounded below 0, or this is no variance: bnjax.recalibrate.",
    "non-finite scale": _DIVERGED,
    "non-finite bias": _DIVERGED,
    "non-finite batch": "The input is not finite: look at the first such layer, at its data, and for float16 overflow.",
    "never updated": "No batch had two valid values of these features: see masks, indices, domains.",
    "never updated, all": 'Keep the batch_stats that apply(..., mutable=["batch_stats"]) returns; is the layer frozen?',
    "mean shifted": _COMPARE,
    "variance differs": _COMPARE,
    "initial values": "Train longer, lower the momentum, or pass momentum=bnjax.debiased(...), which forgets 0 and 1.",
    "few updates": "Masks or rare indices exclude them: momentum=bnjax.cumulative_average, or bnjax.recalibrate.",
    "not counted": "Imported without a count: a momentum that depends on it forgets these statistics. Set count.",
    "small batch": "Share statistics over devices (axis_name), renormalize (renorm_bn_apply), or freeze the layer.",
    "dead features": "A constant input (a dead ReLU, an empty pixel) gives the output bias. Harmless for few features.",
    "dead features, all": "The output is always bias: is the input connected, did all units before it die?",
    "zero scale": "Pruned, or driven to 0 by weight decay, which bnjax.training.decay_mask excludes scale from.",
    "zero scale, all": "Intended where a residual branch starts at 0. After training: the layer does nothing.",
}


def diagnose(
    params: Any, batch_stats: Any, batch_moments: Any = None, *, epsilon: float = 1e-5, momentum: float | None = None
) -> Diagnosis:
    """Find faults in the running statistics of a model, layer by layer, each with advice.

        shift = |mean - batch mean| / sqrt(batch var + epsilon)
        var_ratio = (var + epsilon) / (batch var + epsilon)

    An error makes evaluation unreliable, a warning may harm it, and a note may be intended. Findings are sorted by
    severity, then by value / limit (a finding without a limit first), then by the share of features affected. The
    limits are constants of `bnjax.diagnosis.limits`.

    Args:
      params, batch_stats: a Linen model's collections, NNX states as `bnjax.nnx.functional` returns them, dictionaries
        of `BNParams` and of `BNState`, or `BNParams` and `BNState` of one layer.
      batch_moments: the collection that one batch in training returns, `model.apply({"params": params, "batch_stats":
        batch_stats}, x, train=True, mutable=["batch_stats", "batch_moments"])[1]["batch_moments"]`, or `bnjax.Moments`
        for each layer. The batch should come from the data on which evaluation fails. Features without moments are
        examined without a comparison.
      epsilon: epsilon of the layers, > 0.
      momentum: momentum of the layers, a number in [0, 1]. With the count of updates it gives the weight that the
        initial mean 0 and variance 1 still have.

    Returns:
      Diagnosis: `findings`, `layers` by name, `str()` for a table, `as_dict()` for JSON, `plot()`. Arrays are float64,
      or complex128 for a complex mean.

    Raises:
      TypeError, ValueError: for traced arrays, a momentum that is not a number in [0, 1], trees without a running mean
        and variance, or moments of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> x = jnp.arange(200.0).reshape(100, 2) / 50
      >>> params, state = bnjax.bn_init(2)
      >>> _, state = bnjax.bn_apply(params, state, x, train=True, momentum=0.0)
      >>> print(bnjax.diagnose(params, state, bnjax.batch_moments(x)))
      findings: 0; layers: 1, compared with a batch: 1 (of effectively 100); features: 2
      >>> print(bnjax.diagnose(params, state, bnjax.batch_moments(x + 5)))
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
            "diagnose(batch_stats=...): no layer in it has both a mean and a var. Pass variables['batch_stats'], "
            "nnx.state(model, nnx.BatchStat), or a BNState."
        )
    if batch_moments is not None and not jax.tree.leaves(batch_moments):
        raise ValueError(
            "diagnose(batch_moments=...): it holds no moments. Flax's own layers do not collect them: convert the "
            "model by bnjax.linen.convert or bnjax.nnx.convert, and run it in training with batch_moments mutable."
        )
    given = {name.strip("/"): arrays for name, arrays in trees.leaves(batch_moments).items()}
    reports, paired, ranked = {}, [], []
    with np.errstate(all="ignore"):  # values that are not finite become findings, not warnings
        for name, (own, state) in sorted(layers.items(), key=lambda item: _natural(item[0])):
            layer = name or "the model itself"
            moments = given.get(f"{name}/moments".strip("/"), given.get(name, {}))
            moments = {**moments, **given.get(f"{name}/support".strip("/"), {})}
            paired.append(moments)
            reports[layer] = _measured(layer, own, state, moments, epsilon)
            table = _checks(reports[layer], own, state, epsilon, momentum)
            ranked += [(check.rank(), check.finding(layer)) for check in table if check.affected.any()]
    if any("weight" in v for v in given.values()) and not any("weight" in v for v in paired):
        raise ValueError(
            f"diagnose(batch_moments=...): got moments of {sorted(given)}, but statistics of {sorted(layers)}. "
            'Pass the collection alone, updates["batch_moments"], of the same model.'
        )
    ranked.sort(key=lambda pair: pair[0])  # stable: equal ranks stay in the order of layers and checks
    return Diagnosis([finding for _, finding in ranked], reports, epsilon)


def _measured(layer: str, params: BNParams, state: BNState, moments: Mapping[str, Any], epsilon: float) -> LayerReport:
    """The report on a layer, compared with the batch's moments if there are any."""
    mean, var = _wide(state.mean), np.real(_wide(state.var))
    nonfinite = ~np.isfinite(mean) | ~np.isfinite(var) | (var < 0)
    dead = var < epsilon
    shift = ratio = size = None
    if "weight" in moments and (_wide(moments["weight"]) > 0).any():
        weight, batch_mean, batch_var = (_wide(moments[name]) for name in ("weight", "mean", "var"))
        if batch_mean.shape != mean.shape:
            raise ValueError(
                f"diagnose(batch_moments=...): the batch's mean of {layer} has shape {batch_mean.shape}, the running "
                f"mean {mean.shape}. Pass the moments that the same model collected, with all axes of its statistics."
            )
        seen = weight > 0
        size = np.where(seen, weight / _wide(moments.get("mean_weight", np.ones_like(weight))), np.nan)
        shift = np.where(seen, abs(mean - batch_mean) / np.sqrt(batch_var + epsilon), np.nan)
        ratio = np.where(seen, (var + epsilon) / (batch_var + epsilon), np.nan)
        nonfinite |= seen & ~(np.isfinite(batch_mean) & np.isfinite(batch_var))
        # Features without variance in this batch. A few do not count, because a feature may be active rarely.
        silent = seen & (batch_var < epsilon) & ~dead
        dead |= silent & (silent.sum() >= SHARE * silent.size)
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


class _Check(NamedTuple):
    """A row of the table of checks of one layer: a problem, and the features that have it.

    `value` is what a finding reports of the worst feature, and `times_limit` is how far a feature is beyond its limit,
    infinite where no value is tolerated. Both are arrays of the shape of `affected`, or one number for all features.
    """

    problem: str
    severity: str
    affected: np.ndarray
    value: Any = None
    times_limit: Any = math.inf

    def finding(self, layer: str) -> Finding:
        """The finding on this layer, with the value of the worst feature. At least one feature is affected."""
        number, of = int(self.affected.sum()), self.affected.size
        value = (
            None if self.value is None else float(np.broadcast_to(self.value, self.affected.shape).flat[self._worst])
        )
        advice = _ADVICE.get(f"{self.problem}, all" if number == of else self.problem, _ADVICE[self.problem])
        return Finding(self.severity, layer, self.problem, (number, of), value, advice)

    def rank(self) -> tuple[int, float, float]:
        """The sort key: severity, then value / limit of the worst feature, then the share of features affected."""
        times_limit = np.broadcast_to(self.times_limit, self.affected.shape).flat[self._worst]
        return SEVERITIES.index(self.severity), -float(times_limit), -float(self.affected.mean())

    @property
    def _worst(self) -> int:
        return int(np.where(self.affected, self.times_limit, -math.inf).argmax())


def _checks(
    report: LayerReport, params: BNParams, state: BNState, epsilon: float, momentum: float | None
) -> list[_Check]:
    """The table of checks of a layer, those without an affected feature included."""
    mean, var = report.mean, report.var
    finite, initial = np.isfinite(mean) & np.isfinite(var), (mean == 0) & (var == 1)
    negative = finite & (var < 0)
    settled = ~initial & ~report.nonfinite  # a feature with a known cause is not reported for its symptoms as well
    many_dead = 2 * report.dead.sum() > var.size
    checks = [
        _Check("non-finite statistics", "error", ~finite),
        _Check("negative variance", "error", negative, var.min(initial=0, where=finite)),
        _Check("never updated", "error" if initial.all() else "warning", initial),
        *(
            _Check(f"non-finite {name}", "error", ~np.isfinite(_wide(value)))
            for name, value in params._asdict().items()
            if value is not None
        ),
        _Check("dead features", "warning" if many_dead else "note", report.dead, times_limit=1),
    ]
    if report.zero_scale is not None:
        checks.append(_Check("zero scale", "note", report.zero_scale, times_limit=1))
    if state.count is not None:
        counts = np.broadcast_to(_wide(state.count), settled.shape)  # one count may serve all features
        checks += _count_checks(counts, settled, momentum)
    if report.batch_size is not None:
        checks.append(_Check("non-finite batch", "error", finite & ~negative & report.nonfinite))
        checks += _batch_checks(report, settled, epsilon)
    return checks


def _count_checks(count: np.ndarray, settled: np.ndarray, momentum: float | None) -> list[_Check]:
    """Checks of how many updates each feature absorbed."""
    counted, least = settled & (count > 0), UPDATES * count.max(initial=0)
    checks = [
        _Check("not counted", "note", settled & (count == 0), times_limit=1),
        _Check("few updates", "warning", counted & (count < least), count, least / count),
    ]
    if momentum is not None:
        left = np.where(counted, momentum**count, 0)  # the weight of the initial 0 and 1 in the running statistics
        severity = "error" if left.max(initial=0) > SEVERE_INITIAL else "warning"
        checks.append(_Check("initial values", severity, left > INITIAL, left, left / INITIAL))
    return checks


def _batch_checks(report: LayerReport, settled: np.ndarray, epsilon: float) -> list[_Check]:
    """Checks of the running statistics against the moments of a batch."""
    shift, ratio, size = report.shift, report.var_ratio, report.batch_size
    assert shift is not None
    assert ratio is not None
    assert size is not None
    shift_limit, ratio_limit = limits(size)
    compared = settled & (size > 0)
    # A batch may lack the few examples for which a feature is active, so that its variance is next to 0 and the shift
    # in its units is huge. In units of the larger variance the mean is still within a few 1 / sqrt(n).
    distance = shift / np.sqrt(np.maximum(ratio, 1))
    shifted = compared & (distance > shift_limit)
    # For the same reason variances are compared only where the batch's is epsilon or more.
    alive = compared & (report.var + epsilon >= 2 * epsilon * ratio)
    log_ratio, log_limit = abs(np.log(ratio)), np.log(ratio_limit)
    differs = alive & (log_ratio > log_limit)
    differs &= differs.sum() >= SHARE * differs.size

    def severity(distance, compared, severe):
        return "error" if compared.any() and np.median(distance[compared]) > severe else "warning"

    return [
        _Check("small batch", "warning", size < BATCH, size, BATCH / size),
        _Check("mean shifted", severity(distance, compared, SEVERE_SHIFT), shifted, shift, distance / shift_limit),
        _Check(
            "variance differs",
            severity(log_ratio, alive, math.log(SEVERE_RATIO)),
            differs,
            ratio,
            log_ratio / log_limit,
        ),
    ]


def _wide(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def _natural(name: str) -> list[Any]:
    """A sort key that puts layer 2 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
