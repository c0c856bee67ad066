"""Curves over training: smoothing, the step at which a target is reached, and how many times as fast one run is."""

import numpy as np

from experiments.harness import runs

SMOOTHED = 3
"""The number of evaluations whose mean is one point of a smoothed curve."""
LOSS = 0.1
"""The target of the training loss, as a part of the loss of guessing, log(classes)."""
ACCURACY = 0.9
"""The target of the smoothed validation accuracy."""
TARGETS = {"loss": f"a training loss of {LOSS:g} log(classes)", "accuracy": f"a validation accuracy of {ACCURACY:g}"}
"""The targets that speed is measured to, by measure. They are the same for all claims, data sets and arms."""


def steps_to(series: runs.Series, classes: int) -> dict[str, np.ndarray]:
    """By measure, the steps of each seed to its target; nan if it is never reached."""
    accuracy = smoothed(series["validation_accuracy"])
    return {
        "loss": reached(series.steps, series["loss"], LOSS * np.log(classes), "below"),
        "accuracy": reached(series.steps, accuracy, ACCURACY),
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


def times_as_fast(slow: np.ndarray, quick: np.ndarray, last: float) -> np.ndarray:
    """By run, slow / quick, two numbers of steps to a target.

    A run that never reaches the target counts as reaching it at the last step: the ratio is then a lower bound if the
    slow run is late, and an upper bound if the quick one is. Where neither reaches it the ratio is nan.
    """
    ratio = np.nan_to_num(slow, nan=last) / np.nan_to_num(quick, nan=last)
    return np.where(np.isnan(slow) & np.isnan(quick), np.nan, ratio)


def at_target(falling: np.ndarray, values: np.ndarray, target: float) -> np.ndarray:
    """By run, the value when another, falling curve first reaches a target; nan if it never does.

    Both have the shape (runs, evaluations). Between two evaluations both curves are taken as straight.
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
    within this share of the steps. The series has the metrics of `train.probe_training`."""
    soon = series.steps <= within * series.steps[-1]
    trained, validated = series["train_loss"][:, soon], series["validation_loss"][:, soon]
    return at_target(trained, validated - trained, LOSS * np.log(classes))
