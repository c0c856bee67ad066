"""The limits beyond which `diagnose` reports a problem."""

from typing import Any

import numpy as np

# The limits are SHIFT + NOISE / sqrt(n) for the shift, and RATIO e^(NOISE sqrt(2 / (n - 1))) for the ratio. They were
# chosen on networks trained on digits (fully connected and residual, batch normalization before and after the
# nonlinearity, batches of 32 to 128, momentum 0.9 and 0.99): networks whose learning rate and number of steps let the
# running statistics keep up stay within the limits.
NOISE = 3.0
SHIFT, RATIO = 0.5, 3.0  # tolerance for weights that still change, and for the correlated pixels of a convolution
SHARE = 0.25  # minimum share of a layer's features: a few rarely active ones may have any variance in one batch
SEVERE_SHIFT, SEVERE_RATIO = 1.0, 4.0  # if half of the features are off by this much, every output changes
SEVERE_DAMAGE = 5.0  # in training few values are further than this from the mean, so the next layer has not seen them
# A single feature is reported from SEVERE_RATIO on, unless `rarely_active` explains it.
ALIKE = 8.0  # the largest ratio of the typical active values of the batch and of the running statistics
ACTIVE = 12, 0.1  # at most this many active values in the batch, which beyond 12 vary little, or this share of it
INITIAL = 0.1  # weight of the initial mean 0 and variance 1, and about the relative error of the statistics
SEVERE_INITIAL = 0.5
UPDATES = 0.5  # share of the largest count of the layer
BATCH = 16  # below it the error of a batch's mean exceeds a quarter of a standard deviation, of its variance a third
SCALE = 1e-4  # scales trained from 0 (residual branches) are below 1e-3 by chance, so the limit is lower


def limits(size: Any) -> tuple[Any, Any]:
    """The limits of shift and var_ratio for an effective batch size."""
    return SHIFT + NOISE / np.sqrt(size), RATIO * np.exp(NOISE * np.sqrt(2 / np.maximum(size - 1, 0)))


def single_limit(size: Any) -> Any:
    """The limit of batch var / var of a single feature, for an effective batch size."""
    return limits(size)[1] * SEVERE_RATIO / RATIO
