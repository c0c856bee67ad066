"""Batch-normalized networks converge faster (Ioffe & Szegedy, 2015, section 4.1, figures 1a and 3).

Two networks are trained with and without batch normalization before each nonlinearity: the paper's, with three hidden
layers of 100 sigmoid units and normal kernels, and a plain network of eight convolutions with ReLU. Speed is the number
of steps to a fixed training loss and to a fixed validation accuracy.
"""

from dataclasses import dataclass
from itertools import product

import jax
import numpy as np

from experiments.harness import curves, lab, plot, protocol, records, runs, study
from experiments.models import networks

LOSS = 0.1
"""The target of the training loss, as a part of the loss of guessing, log(classes)."""
ACCURACY = 0.9
"""The target of the smoothed validation accuracy."""
ARMS = ("plain", "batch normalization")
RATES = ("same rate", "own best rate")
MEASURES = {"loss": f"a training loss of {LOSS:g} log(classes)", "accuracy": f"a validation accuracy of {ACCURACY:g}"}
NETWORKS = {"sigmoid": "the sigmoid network", "convolutional": "the convolutional network"}
GRIDS = {"sigmoid": lab.half_decades(0.03, 100), "convolutional": lab.half_decades(0.003, 3)}


def steps_to(series: runs.Series, classes: int) -> dict[str, np.ndarray]:
    """By measure, the steps of each seed to its target; nan if it is never reached."""
    accuracy = curves.smoothed(series["validation_accuracy"])
    return {
        "loss": curves.reached(series.steps, series["loss"], LOSS * np.log(classes), "below"),
        "accuracy": curves.reached(series.steps, accuracy, ACCURACY),
    }


def _parts():
    for network, rate, measure in product(NETWORKS, RATES, MEASURES):
        paper = "31.0 / 13.3 = 2.3 at the same rate, 31.0 / 2.1 = 15 at the best (figure 3, Inception)"
        yield protocol.Part(
            f"{network}, {rate}, {measure}",
            f"{NETWORKS[network]}: steps to {MEASURES[measure]}, plain / batch normalization, at "
            + ("the plain network's best rate" if rate == RATES[0] else "each one's own best rate"),
            1.0,
            "faster means fewer steps",
            paper=paper if network == "convolutional" and measure == "accuracy" else "",
        )


@dataclass(frozen=True)
class Convergence(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "convergence"
    CLAIM = "batch-normalized networks converge faster"
    QUESTION = "Does a network with batch normalization need fewer steps, at the same learning rate and at its own best?"
    SOURCE = "Ioffe & Szegedy (2015), section 4.1, figures 1a and 3"
    PROTOCOL = (
        "The paper's network of three hidden layers of 100 sigmoid units, with initial weights of standard deviation "
        "0.1, and a plain network of eight convolutions with ReLU and He's initial weights are trained by gradient "
        "descent, with a bias or with batch normalization before each nonlinearity. Each arm's learning rate is chosen "
        "by the mean validation accuracy over the curve. At the same rate, which is the best for the plain network, "
        "and at each one's own best rate, the steps to two fixed targets are compared."
    )
    WOULD_CHANGE = (
        "An optimizer with a step size for each weight, such as Adam, takes over a part of what the normalization does. "
        "A budget that is counted in time and not in steps favours the plain network, whose steps are cheaper."
    )
    PARTS = (*_parts(),)
    SMOKE = {"steps": 60, "seeds": 2, "eval_every": 20}
    FULL = {"steps": 20_000, "convolutional_steps": 5000, "seeds": 20, "side": 32}

    steps: int = 4000
    """updates per run of the sigmoid network"""
    convolutional_steps: int = 800
    """updates per run of the convolutional network"""
    batch_size: int = 60
    """images per step"""
    weight_std: float = 0.1
    """standard deviation of the sigmoid network's initial kernels"""
    eval_every: int = 20
    """steps between evaluations"""

    def _network(self, dataset, network, arm):
        batch_norm = arm != "plain"
        if network == "convolutional":
            return networks.convolutional(dataset, batch_norm)
        std = networks.constant(self.weight_std)
        return networks.mlp(dataset, (100, 100, 100), batch_norm, std, activation=jax.nn.sigmoid)

    def measure(self, lab: lab.Lab) -> None:
        for network in NETWORKS:
            steps = self.steps if network == "sigmoid" else min(self.steps, self.convolutional_steps)
            every = {"steps": steps, "batch_size": self.batch_size, "eval_every": self.eval_every}
            each = {arm: self._network(lab.dataset, network, arm) for arm in ARMS}
            rate = {
                arm: lab.tune(f"{network}, {arm}", each[arm], GRIDS[network], **every).rate for arm in ARMS
            }
            for arm in ARMS:
                lab.train(f"{network}, {arm}", each[arm], (rate["plain"], rate[arm]), **every)

    def judge(self, metrics: runs.Metrics) -> study.Finding:
        raise NotImplementedError
