"""The distributions of a layer's inputs over training, as Ioffe & Szegedy (2015, figures 1b and c) show them.

The images of a fixed batch pass through the network in training mode, and the 15th, 50th and 85th percentiles of the
inputs of the last hidden layer's activations are taken, in a convolution over images and pixels. Half the distance of
the outer ones is the standard deviation of a normal distribution, nearly.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

PERCENTILES = (15.0, 50.0, 85.0)


def last_inputs(
    apply: Callable[..., Any], activation: Callable[[Array], Array], params: Any, state: Any, images: Array
) -> tuple[Array, Any]:
    """The inputs of the last hidden layer's activations, of shape (values, units), and the new state."""
    seen = []

    def recorded(x):
        seen.append(x)
        return activation(x)

    _, state = apply(params, state, images, True, activation=recorded)
    return seen[-1].reshape(-1, seen[-1].shape[-1]), state


def summary(inputs: Array) -> dict[str, Array]:
    """By unit, the median, and half the distance of the outer percentiles as `spread`."""
    low, median, high = jnp.percentile(inputs, jnp.array(PERCENTILES), axis=0)
    return {"median": median, "spread": (high - low) / 2}


def drift(steps: np.ndarray, median: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """By run, how far the medians move over training: the standard deviation of a unit's median over all steps, divided
    by the mean over all steps of its `spread`; then the mean over units.

    Between evaluations both are taken as linear, so evaluations need not be equally far apart.

    Args:
      steps: the steps of the evaluations.
      median, spread: the summaries, of shape (runs, evaluations, units).
    """
    mean = mean_over_steps(steps, median)[:, None]
    deviation = np.sqrt(mean_over_steps(steps, (median - mean) ** 2))
    return (deviation / mean_over_steps(steps, spread)).mean(1)


def mean_over_steps(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """By run, the mean over all steps of values of shape (runs, evaluations, ...), linear between evaluations."""
    gaps = np.diff(np.asarray(steps, float))
    weights = np.concatenate([gaps, [0]]) + np.concatenate([[0], gaps])
    return np.tensordot(values, weights / weights.sum(), ((1,), (0,)))
