"""Effects of made-up seeds."""

from collections.abc import Mapping

import numpy as np

from experiments.harness import protocol


def repeated(effects: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The effects of a few seeds, over and over, in as many seeds as a verdict needs."""
    return {name: np.resize(values, protocol.LEAST_SEEDS) for name, values in effects.items()}
