"""Curves over training: smoothing, the step at which a target is reached, how many times as fast one run is, and
quantities at fixed losses."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.harness import runs

SMOOTHED = 3
"""The number of evaluations whose mean is one point of a smoothed curve."""
LOSS = 0.1
"""The target of the training loss, as a part of the loss of guessing, log(classes)."""
ACCURACY = 0.9
"""The target of the smoothed validation accuracy."""
TARGETS = {"loss": f"a training loss of {LOSS:g} log(classes)", "accuracy": f"a validation accuracy of {ACCURACY:g}"}
"""The targets that speed is measured to, by measure. They are the same for all data sets and arms, and for all claims
but `recurrent`, whose networks come down to another loss."""

LEVELS = (*np.linspace(0.75, 0.25, 11).round(2).tolist(),)
"""The losses, as parts of log(classes), at which quantities of arms of different speed are compared, from an early to a
late place of the descent from 1, guessing, to the target `LOSS`. Below it gradients are too small to measure."""


def log_spaced(steps: int, points: int) -> tuple[int, ...]:
    """About `points` steps from 1 to `steps` in equal ratios, so that runs of different speed are seen equally well."""
    return (*np.unique(np.geomspace(1, steps, points).round().astype(int)).tolist(),)


def at_losses(loss: np.ndarray, values: np.ndarray, levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """By run, the mean over levels of a quantity at a loss, of shape (runs,).

    A level is passed between the first evaluation whose loss is at or below it and the one before; between these two
    the quantity is interpolated linearly in the loss. If already the first loss is below the level, the quantity there
    counts. A run that never gets to the level, or with a quantity there that is not finite, has no value: nan.

    Args:
      loss: the losses, of shape (runs, evaluations).
      values: the quantity, of the same shape; the logarithm of what is compared as a ratio.
      levels: the losses.
    """
    rows, found = np.arange(len(loss)), []
    for level in levels:
        passed = loss <= level
        after = passed.argmax(1)
        before = np.maximum(after - 1, 0)
        high, low = loss[rows, before], loss[rows, after]
        share = np.where(high > low, (high - level) / np.where(high > low, high - low, 1), 1)
        value = (1 - share) * values[rows, before] + share * values[rows, after]
        found.append(np.where(passed.any(1), value, np.nan))
    return np.mean(found, 0)


def steps_to(series: runs.Series, classes: int, loss: float = LOSS) -> dict[str, np.ndarray]:
    """By measure, the steps of each seed to its target, interpolated between evaluations; nan if it is never reached.

    Steps that are not interpolated would be equal in many seeds, so that their spread could be zero where the arms
    differ. The interpolation is linear in the accuracy and in the logarithm of the loss. `loss` is the target of the
    loss, as a part of log(classes).
    """
    accuracy = smoothed(series["validation_accuracy"])
    steps = np.broadcast_to(series.steps.astype(float), accuracy.shape)
    return {
        "loss": at_target(np.log(np.maximum(series["loss"], 1e-30)), steps, np.log(loss * np.log(classes))),
        "accuracy": at_target(-accuracy, steps, -ACCURACY),
    }


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each evaluation and those before it, `SMOOTHED` in all, along the last axis.

    The first points are means of fewer evaluations. A mean with a nan, of a diverged network, is nan.
    """
    shifted = [np.roll(values, i, -1) for i in range(SMOOTHED)]
    for i, each in enumerate(shifted):
        each[..., :i] = 0
    number = np.minimum(1 + np.arange(values.shape[-1]), SMOOTHED)
    return np.sum(shifted, 0) / number


def reached(steps: np.ndarray, values: np.ndarray, target: float, side: str = "above") -> np.ndarray:
    """By run, the first step with a value of at least the target, or, for the side "below", of at most the target; nan
    if there is none.

    Args:
      steps: the steps of the evaluations.
      values: the values, of shape (runs, evaluations); nan does not reach a target.
      target: the target.
      side: the side of the target that counts.
    """
    hit = values >= target if side == "above" else values <= target
    return np.where(hit.any(1), np.asarray(steps, float)[hit.argmax(1)], np.nan)


def mean_error(series: runs.Series) -> np.ndarray:
    """By run, the mean of 1 - validation accuracy over all steps, by the trapezoidal rule.

    Unlike the steps to a target it exists for a run that never reaches one. A diverged network is always wrong.
    """
    error = 1 - np.nan_to_num(series["validation_accuracy"], nan=0.0)
    steps = np.asarray(series.steps, float)
    return np.trapezoid(error, steps, axis=1) / (steps[-1] - steps[0])


def times_as_fast(slow: np.ndarray, quick: np.ndarray, last: float) -> np.ndarray:
    """By run, slow / quick, two numbers of steps to a target.

    A run that never reaches the target counts as reaching it at the last step: the ratio is then a lower bound if the
    slow run is late, and an upper bound if the quick one is. Where neither reaches it the ratio is nan.
    """
    ratio = np.nan_to_num(slow, nan=last) / np.nan_to_num(quick, nan=last)
    return np.where(np.isnan(slow) & np.isnan(quick), np.nan, ratio)


def outcome(classes: int, curve: bool = False) -> runs.Summary:
    """A summary of a run for sweeps over many settings, whose curves would fill the file.

    It consists of `loss_step` and `accuracy_step`, the steps to the targets; `last_loss`, the mean training loss of the
    last evaluations, which is nan for a diverged network; the test metrics; and the last step.

    Args:
      classes: number of classes.
      curve: whether the curve of the validation accuracy is kept, which `lab.chosen` needs.
    """

    def summary(steps: list[int], values: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        curves = {name: np.asarray(values[name], float)[None] for name in ("loss", "validation_accuracy")}
        reached = steps_to(runs.Series((0,), np.array(steps), curves), classes)
        kept = {f"{name}_step": step[0] for name, step in reached.items()}
        kept["last_loss"] = smoothed(curves["loss"])[0, -1]
        kept |= {name: value for name, value in values.items() if name.startswith("test_")}
        return (
            (steps, kept | {"validation_accuracy": curves["validation_accuracy"][0]}) if curve else (steps[-1:], kept)
        )

    return summary


def trains(series: runs.Series, classes: int, loss: float = LOSS) -> np.ndarray:
    """By run, of which there is an `outcome`, whether its training loss is at a target or below it at the end.

    `loss` is the target, as a part of log(classes).
    """
    return series["last_loss"] <= loss * np.log(classes)


def at_target(falling: np.ndarray, values: np.ndarray, target: float) -> np.ndarray:
    """By run, the value when another, falling curve first reaches a target; nan if it never does.

    Both have the shape (runs, evaluations). Both curves are interpolated linearly between evaluations.
    """
    hit = falling <= target
    after = hit.argmax(1)[:, None]
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(falling, i, 1)[:, 0] for i in (before, after))
    first, last = (np.take_along_axis(values, i, 1)[:, 0] for i in (before, after))
    share = np.where(high > low, (high - target) / np.where(high > low, high - low, 1), 1.0)
    return np.where(hit.any(1), first + share * (last - first), np.nan)


def gap(series: runs.Series, classes: int, within: float = 1.0) -> np.ndarray:
    """By run, validation loss - training loss when the training loss reaches its target; nan if it does not do so
    within this share of the steps. The series has the metrics of `scores.probe_training`."""
    soon = series.steps <= within * series.steps[-1]
    trained, validated = series["train_loss"][:, soon], series["validation_loss"][:, soon]
    return at_target(trained, validated - trained, LOSS * np.log(classes))
