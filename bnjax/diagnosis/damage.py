"""What the running statistics of a feature do to the output in evaluation.

In training the output of a layer is y = scale (x - batch mean) / sqrt(batch var + epsilon) + bias; in evaluation the
running mean and var replace the batch's. Over the batch, the root mean square of the difference is

    |scale| sqrt(offset^2 + (gain - 1)^2 batch var / (batch var + epsilon))
    offset = |batch mean - mean| / sqrt(var + epsilon)        gain = sqrt((batch var + epsilon) / (var + epsilon))

because the mean of x - batch mean is 0. |scale| is the standard deviation of the output in training. The gain of a
variance that is too small is unbounded; a variance that is too large costs at most that standard deviation.
"""

from typing import Any

import numpy as np

from bnjax.diagnosis.limits import ACTIVE, ALIKE, SHARE


def rows(values: np.ndarray) -> np.ndarray:
    """Features as (rows, features of a row): along the first axis of statistics that have more, as nn.scan stacks them.

    If rows are too short for a share of their features to mean anything, all features are one row.
    """
    stacked = values.ndim > 1 and values[:1].size * SHARE >= 1
    return values.reshape(len(values) if stacked else 1, -1)


def relative(scale: np.ndarray) -> np.ndarray:
    """|scale| / the root mean square of its row, at most 1: a feature of small scale does less than the others."""
    finite = np.where(np.isfinite(rows(scale)), rows(scale), 0)
    usual = np.sqrt(np.mean(finite**2, -1, keepdims=True))
    return np.where(usual > 0, np.minimum(rows(scale) / usual, 1), 0).reshape(scale.shape)


def damage(mean: Any, var: Any, batch_mean: Any, batch_var: Any, epsilon: float) -> np.ndarray:
    """The root mean square of y in evaluation minus y in training, in units of |scale|."""
    offset = abs(batch_mean - mean) / np.sqrt(var + epsilon)
    gain = np.sqrt((batch_var + epsilon) / (var + epsilon))
    return np.sqrt(offset**2 + (gain - 1) ** 2 * batch_var / (batch_var + epsilon))


def rarely_active(mean: Any, var: Any, batch_mean: Any, batch_var: Any, size: Any) -> np.ndarray:
    """Whether the input explains that the variances differ: it is 0 but for a few examples, as after ReLU.

    If k of n values are a > 0 and the others 0, then E[x^2] = k/n a^2 and E[x] = k/n a. Hence

        k = n E[x]^2 / E[x^2] >= 1        a = E[x^2] / E[x]

    The running statistics average k and keep a, even if no recent batch had an active example: both decay alike. If
    only the running variance is wrong, a differs. The means of most features of such a layer are not negative.
    """
    batch_square, square = abs(batch_mean) ** 2 + batch_var, abs(mean) ** 2 + var
    active, usually = (size * abs(m) ** 2 / s for m, s in ((batch_mean, batch_square), (mean, square)))
    times = batch_square / batch_mean.real * mean.real / square
    number, share = ACTIVE
    most = np.maximum(np.minimum(number, size / 3), share * size)
    rare = (active > 0.9) & (active <= most) & (usually <= most)
    rare &= (batch_mean.real > 0) & (times < ALIKE) & (times > 1 / ALIKE)
    positive = rows(np.where(size > 0, batch_mean.real, 0) >= 0).mean(-1, keepdims=True) >= 1 - SHARE
    return (rows(rare) & positive).reshape(rare.shape)
