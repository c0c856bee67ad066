"""What the claims train with: networks at several learning rates, the choice of a rate, and the record of all runs.

Every arm of a claim is tuned once, on the validation images of seeds that are used for nothing else. Its rate is the
best of a grid of half decades.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from jax import Array

from experiments.harness import curves, data, runs, train

TUNING_SEEDS = (900, 901, 902)
"""The seeds that learning rates are chosen with."""
GAPS = ("gap", "steady gap")
"""The choices of a rate by the gap between validation and training loss, which need a probe."""


def half_decades(low: float, high: float) -> tuple[float, ...]:
    """The powers of the square root of 10 from about `low` to about `high`, in three significant digits."""
    first, last = round(2 * np.log10(low)), round(2 * np.log10(high))
    return tuple(float(f"{10 ** (i / 2):.3g}") for i in range(first, last + 1))


class Network(NamedTuple):
    """`init`, from a key to (params, state), and `apply`, as `train.fit` expects them."""

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Array, Any]]


class Chosen(NamedTuple):
    """The learning rate of an arm."""

    rate: float
    edge: str
    """why the grid does not contain the best rate; empty if the best rate is inside"""


def at(arm: str, rate: float) -> str:
    """The name of an arm's runs at a rate."""
    return f"{arm}@{rate:g}"


def tuning(arm: str, rate: float) -> str:
    """The name of an arm's runs by which rates are compared."""
    return f"tuning {at(arm, rate)}"


def chosen(metrics: runs.Metrics, arm: str, by: str = "curve") -> Chosen:
    """The rate of an arm with the highest validation accuracy, or another best score, on average over the tuning seeds.

    Args:
      metrics: all metrics of the claim.
      arm: name of the arm.
      by: "curve" for the mean of the smoothed accuracy over the whole of training, which favours fast training, "end"
        for its last value, "loss" for the last value of the smoothed loss, "training" for that of the training loss,
        "steps" for the fewest steps to the target of the training loss, of which every tuning seed has a
        `curves.outcome`, "gap" for the lowest `curves.gap`, or "steady gap" for the lowest rate whose gap is within one
        standard error of the lowest gap (the rule of Breiman et al., 1984, for equally good models), because training
        is noisier at higher rates. For "steps" and the gaps a rate counts only if every tuning seed reaches the target.
        For the gaps they have three quarters of the steps for it, so that other seeds reach it within all steps. For
        "steps" the lowest training loss at the end decides if no rate counts. A diverged network has the accuracy 0 and
        an infinite loss. Of equally good rates the lowest is chosen.
    """
    tried = {}
    for name, series in metrics.items():
        found, _, rate = name.rpartition("@")
        if found == f"tuning {arm}":
            tried[float(rate)] = series
    scores = {rate: _score(series, metrics.classes, by) for rate, series in tried.items()}
    rates = sorted(scores)
    best = least = max(rates, key=lambda rate: scores[rate])  # the first of equals
    if by == "steady gap" and np.isfinite(scores[best][0]):
        gaps = _gaps(tried[least], metrics.classes)
        error = gaps.std(ddof=1) / np.sqrt(gaps.size) if gaps.size > 1 else 0.0
        best = next(rate for rate in rates if scores[rate][0] >= scores[least][0] - error)
    edge = ""
    if by in GAPS and not np.isfinite(scores[best][0]):
        edge = f"{arm} reaches the target of the training loss at no learning rate of its grid"
    elif len(rates) > 1 and (ends := [rate for rate in (least, best) if rate in (rates[0], rates[-1])]):
        edge = f"the best learning rate of {arm}, {ends[0]:g}, is at the edge of its grid"
    return Chosen(best, edge)


def _score(series: runs.Series, classes: int, by: str) -> tuple[float, float]:
    """What `chosen` rates by, the higher the better, and what decides between equals."""

    def least(values: np.ndarray) -> float:
        return -float(np.nan_to_num(values, nan=np.inf).mean())

    if by in GAPS:
        return least(_gaps(series, classes)), 0.0
    if by == "steps":
        return least(series["loss_step"]), least(series["last_loss"])
    if by in ("loss", "training"):
        return least(curves.smoothed(series["validation_loss" if by == "loss" else "loss"])[:, -1]), 0.0
    first = 0 if by == "curve" else 1  # the end is only of trained networks, however few evaluations
    accuracy = np.nan_to_num(curves.smoothed(series["validation_accuracy"][:, first:]), nan=0.0)
    return float((accuracy[:, 1:] if by == "curve" else accuracy[:, -1:]).mean()), 0.0


def _gaps(series: runs.Series, classes: int) -> np.ndarray:
    """By tuning seed, the gap at the target, if it is reached early enough that other seeds can be expected to."""
    return curves.gap(series, classes, 0.75)


class TimeIsUpError(Exception):
    """The measurement ends before the next training, because its time is up. What is recorded stays."""


class Lab:
    """Trains the networks of a claim, unless their runs are recorded already, and records them."""

    def __init__(
        self,
        dataset: data.Dataset,
        record: runs.Record,
        seeds: Sequence[int],
        tuning_seeds: Sequence[int] = TUNING_SEEDS,
        moving: bool = False,
        tell: Callable[[str], None] = lambda remark: None,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self.dataset, self.record, self.seeds, self.tuning_seeds = dataset, record, seeds, tuning_seeds
        self.moving, self.tell, self.may_go_on = moving, tell, may_go_on

    def fit(
        self,
        names: Sequence[str],
        network: Network,
        *,
        settings: Sequence[train.Setting],
        seeds: Sequence[int] | None = None,
        optimizer: Callable[..., optax.GradientTransformation] | None = None,
        splits: Mapping[str, Any] = {},
        summary: runs.Summary = lambda steps, values: (steps, values),
        **options: Any,
    ) -> None:
        """Train a network in several settings, all in one program, from the seeds whose runs are missing.

        Args:
          names: names of the runs, one for each setting.
          network: the network. Its `init` gets the setting without `rate`.
          settings: by name, the numbers, or functions of the seed, that init and optimizer are called with.
          seeds: the seeds; by default those that the verdict is based on.
          optimizer: function from a setting as keywords; by default gradient descent with the learning rate `rate`.
          splits: options of `data.splits`.
          summary: what is recorded of a run; by default everything.
          options: options of `train.fit`.

        Raises:
          TimeIsUpError: if runs are missing and the laboratory may not go on.
        """
        missing = self.record.missing(names, self.seeds if seeds is None else seeds)
        if not missing:
            return
        if not self.may_go_on():
            raise TimeIsUpError
        evaluations: list[train.Evaluation] = []
        options = {"moving": self.moving, **options}
        each = train.fit(
            lambda key, rate=0.0, **setting: network.init(key, **setting),
            network.apply,
            optimizer or (lambda rate, **_: optax.sgd(rate)),
            data.splits(self.dataset, missing, **splits),
            seeds=missing,
            settings=settings,
            **options,
        )
        for evaluation in each:
            evaluations.append(evaluation)
            self.tell(f"{names[0]}, step {evaluation.step}")
        self.record.add_all(names, missing, evaluations, summary)

    def metrics(self) -> runs.Metrics:
        """All that is recorded so far."""
        return self.record.metrics([*self.tuning_seeds, *self.seeds], self.dataset.classes)

    def train(self, arm: str, network: Network, rates: Sequence[float], **options: Any) -> None:
        """Train an arm at some rates. The runs are named by `at`."""
        rates = [*dict.fromkeys(rates)]
        self.fit([at(arm, rate) for rate in rates], network, settings=[{"rate": rate} for rate in rates], **options)

    def tune(self, arm: str, network: Network, rates: Sequence[float], by: str = "curve", **options: Any) -> Chosen:
        """Choose the rate of an arm from a grid, by training with the tuning seeds, which need a probe for a gap."""
        names = [tuning(arm, rate) for rate in rates]
        options = {"tests": False, **(options if by in GAPS else {**options, "probe": None})}
        self.fit(names, network, settings=[{"rate": rate} for rate in rates], seeds=self.tuning_seeds, **options)
        return chosen(self.metrics(), arm, by)
