"""The networks that several claims are measured on, and the grids of their learning rates.

One is the paper's: fully connected, 100 sigmoid units in each of three hidden layers, normal kernels of one standard
deviation (Ioffe & Szegedy, 2015, section 4.1). The other is plain, without shortcuts: eight convolutions with ReLU and
He's kernels. A network without normalization has a bias in its place.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from experiments.harness import data, lab, study
from experiments.models import networks

NETWORKS = {"sigmoid": "the sigmoid network", "convolutional": "the convolutional network"}
"""The networks in words, by name."""
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "convolutional": jax.nn.relu}
GRIDS = {"sigmoid": lab.half_decades(0.03, 100), "convolutional": lab.half_decades(0.003, 3)}
"""The learning rates among which each arm's rate is chosen: from rates that hardly train to rates that diverge."""


def build(
    dataset: data.Dataset,
    network: str,
    batch_norm: bool,
    weight_std: float,
    depth: int = 3,
    channels: tuple[int, ...] = networks.CONVOLUTIONS,
) -> networks.Network:
    """A network for a data set.

    Args:
      dataset: the data set.
      network: "sigmoid" or "convolutional".
      batch_norm: whether each hidden layer is normalized before its activation.
      weight_std: standard deviation of the sigmoid network's initial kernels.
      depth: hidden layers of the sigmoid network.
      channels: channels per layer of the convolutional network.
    """
    if network == "convolutional":
        return networks.convolutional(dataset, batch_norm, channels=channels)
    weights = networks.constant(weight_std)
    return networks.mlp(dataset, (100,) * depth, batch_norm, weights, activation=jax.nn.sigmoid)


@dataclass(frozen=True)
class Observed(study.Study):
    """A claim about what happens inside the two networks while they train."""

    SMOKE: ClassVar[dict[str, Any]] = {"networks": ("sigmoid",), "steps": 50, "seeds": 2, "points": 8}
    FULL: ClassVar[dict[str, Any]] = {"steps": 20_000, "convolutional_steps": 5000, "seeds": 20, "side": 32}

    networks: tuple[str, ...] = (*NETWORKS,)
    """the networks that are measured; parts on others are undecided"""
    steps: int = 4000
    """updates per run of the sigmoid network"""
    convolutional_steps: int = 400
    """updates per run of the convolutional network"""
    batch_size: int = 60
    """images per step, and of each batch that is followed"""
    weight_std: float = 0.1
    """standard deviation of the sigmoid network's initial kernels"""
    points: int = 60
    """evaluations per run of the sigmoid network, about, in equal ratios of steps"""
    convolutional_points: int = 30
    """the same of the convolutional network"""

    def budget(self, network: str) -> tuple[int, int]:
        """The updates and the evaluations of a network's runs."""
        if network == "convolutional":
            return self.convolutional_steps, self.convolutional_points
        return self.steps, self.points
