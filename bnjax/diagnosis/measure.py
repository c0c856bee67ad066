"""A diagnosis of running statistics, for when evaluation disagrees with training.

The running mean and var of each feature are compared with the moments of one batch, of effective size n (Kish, 1965):

    shift = |mean - batch mean| / sqrt(batch var + epsilon)        var_ratio = (var + epsilon) / (batch var + epsilon)
    n = (sum of weights)^2 / sum of squared weights

By sampling, the shift is about 1 / sqrt(n) and the logarithm of the ratio about sqrt(2 / n). The limits contain these
terms, so a larger batch reveals smaller faults. The severity of a fault follows from its effect on the output: see
`bnjax.diagnosis.damage`. The computation runs on the host, in float64. Three things stay hidden from it. The pixels of
a convolution count as independent values, although neighbouring pixels are correlated, so n is too large. A few
features whose running variance is too large are not reported, because a feature whose active examples are missing from
this batch looks the same; evaluation shrinks such features, by less than their own standard deviation. And in a layer
after ReLU, for a feature whose mean is near 0, a running variance that is too small may look like rare activity.
"""

import re
from typing import Any

import numpy as np

from bnjax.core import checks
from bnjax.diagnosis.arguments import Layer, read, wide
from bnjax.diagnosis.damage import damage, relative, rows
from bnjax.diagnosis.findings import checks as checked
from bnjax.diagnosis.limits import SCALE, SHARE
from bnjax.diagnosis.report import Diagnosis, LayerReport


def diagnose(
    params: Any, batch_stats: Any, batch_moments: Any = None, *, epsilon: float = 1e-5, momentum: float | None = None
) -> Diagnosis:
    """Find faults in the running statistics of a model, layer by layer, each with advice.

        shift = |mean - batch mean| / sqrt(batch var + epsilon)
        var_ratio = (var + epsilon) / (batch var + epsilon)
        damage = rms(y in evaluation - y in training) / max(|scale|, rms of the layer's scales)

    where rms is the root mean square, and y the output of a feature for the batch, by its running statistics and by its
    own. A damage of 1 is a change by the standard deviation that the output has in training. For a feature whose scale
    is much smaller than the others of its layer, the damage is proportionally smaller.

    An error makes evaluation unreliable, a warning may harm it, and a note may be intended. Findings are sorted by
    severity, then by the damage of the worst feature, or value / limit where a problem has no damage (a finding without
    a limit comes first), then by the share of features affected. They name their features, worst first. The limits are
    constants of `bnjax.diagnosis.limits`.

    Args:
      params, batch_stats: a Linen model's collections, NNX states as `bnjax.nnx.functional` returns them, dictionaries
        of `BNParams` and of `BNState`, or `BNParams` and `BNState` of one layer.
      batch_moments: the collection that one batch in training returns, `model.apply({"params": params, "batch_stats":
        batch_stats}, x, train=True, mutable=["batch_stats", "batch_moments"])[1]["batch_moments"]`, or `bnjax.Moments`
        for each layer. The batch should come from the data on which evaluation fails. Features without moments are
        examined without a comparison, and layers without moments are named.
      epsilon: epsilon of the layers, > 0.
      momentum: momentum of the layers, a number in [0, 1]. With the count of updates it gives the weight that the
        initial mean 0 and variance 1 still have. Without it, 0.99 is assumed for statistics in half precision.

    Returns:
      Diagnosis: `findings`, `layers` by name, `str()` for a table, `as_dict()` for JSON, `plot()`, and `beyond` for
      what another diagnosis lacks. Arrays are float64, or complex128 for a complex mean.

    Raises:
      TypeError, ValueError: for traced arrays, a momentum that is not a number in [0, 1], a model, a TrainState or all
        variables in place of one collection, arguments in another order, trees without a running mean and variance, and
        parameters or moments of another model.

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
      severity  layer             problem       features  value     damage
      error     the model itself  mean shifted  2 of 2    4.33 std  4.33 std
          features 0, 1
          Is preprocessing that of training? If so, the statistics lag: bnjax.recalibrate, or a lower momentum.
    """
    epsilon = checks.positive("diagnose", "epsilon", epsilon)
    if callable(momentum):
        raise TypeError("diagnose(momentum=...): expected a number. Leave out a function of the count: it is debiased.")
    if momentum is not None:
        momentum = float(checks.momentum("diagnose", momentum))
    layers = sorted(read(params, batch_stats, batch_moments), key=lambda layer: _natural(layer.name))
    reports, ranked = {}, []
    with np.errstate(all="ignore"):  # values that are not finite become findings, not warnings
        for layer in layers:
            name = layer.name or "the model itself"
            reports[name] = _measured(layer, epsilon)
            table = checked(layer, reports[name], epsilon, momentum)
            ranked += [(check.rank(), check.finding(name)) for check in table if check.affected.any()]
    ranked.sort(key=lambda pair: pair[0])  # stable: equal ranks stay in the order of layers and checks
    return Diagnosis([finding for _, finding in ranked], reports, epsilon)


def _measured(layer: Layer, epsilon: float) -> LayerReport:
    """The report on a layer, compared with the batch's moments if there are any."""
    scale, state, moments = layer.params.scale, layer.state, layer.moments
    mean, var = wide(state.mean), np.real(wide(state.var))
    nonfinite = ~np.isfinite(mean) | ~np.isfinite(var) | (var < 0)
    dead = var < epsilon
    shift = ratio = size = harm = None
    if moments and (wide(moments["weight"]) > 0).any():
        weight, batch_mean, batch_var = (wide(moments[name]) for name in ("weight", "mean", "var"))
        if batch_mean.shape != mean.shape:
            raise ValueError(
                f"diagnose(batch_moments=...): the batch's mean of {layer.name or 'the model itself'} has shape "
                f"{batch_mean.shape}, the running mean {mean.shape}. Pass the moments that the same model collected, "
                "with all axes of its statistics."
            )
        seen = weight > 0
        size = np.where(seen, weight / wide(moments.get("mean_weight", np.ones_like(weight))), np.nan)
        shift = np.where(seen, abs(mean - batch_mean) / np.sqrt(batch_var + epsilon), np.nan)
        ratio = np.where(seen, (var + epsilon) / (batch_var + epsilon), np.nan)
        harm = np.where(seen, relative(layer.scale()) * damage(mean, var, batch_mean, batch_var, epsilon), np.nan)
        nonfinite |= seen & ~(np.isfinite(batch_mean) & np.isfinite(batch_var))
        # Features without variance in this batch. A few do not count, because a feature may be active rarely.
        silent = seen & (batch_var < epsilon)
        many = rows(silent & ~dead).mean(-1, keepdims=True) >= SHARE
        dead = np.where(seen, silent & (dead | (rows(silent) & many).reshape(dead.shape)), dead)
    return LayerReport(
        var.size,
        mean,
        var,
        None if state.count is None or not var.size else (int(np.min(state.count)), int(np.max(state.count))),
        nonfinite,
        dead & ~nonfinite,
        None if scale is None else abs(wide(scale)) < SCALE,
        shift,
        ratio,
        size,
        None if size is None else float(np.nanmin(size)),
        harm,
    )


def _natural(name: str) -> list[Any]:
    """A sort key that puts layer 2 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
