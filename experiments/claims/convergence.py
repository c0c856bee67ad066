"""A batch-normalized network trains faster (Ioffe & Szegedy, 2015, section 4.1 and figure 1a).

The network is the paper's, with three hidden layers of 100 sigmoid units, trained in batches of 60, with and without
batch normalization before each nonlinearity; everything else is equal. The experiment measures the steps that each
network takes to the plain network's best test accuracy, and the accuracy at the end. The threshold follows the paper,
where Inception with batch normalization needs 13.3 million steps and without it 31.0 million, at the same learning rate
(figure 3). The plain network reaches its best accuracy on a plateau, so the steps to it vary, and grow with the length
of the run.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import optax

from experiments.harness import checkpoints, data, plot, records, study
from experiments.harness.runtime import Runtime
from experiments.models import flax_networks, networks

FEWER = 2
NETWORKS = ("plain", "batch normalization")


@dataclass(frozen=True)
class Convergence(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "convergence"
    CLAIM = "batch-normalized networks converge faster"
    SOURCE = "Ioffe & Szegedy (2015), section 4.1, figures 1a and 3"
    THRESHOLD = (
        f"{study.CLEARLY}: (a) at most 1/{FEWER} of the plain network's steps to its best test accuracy, since in the "
        "paper Inception needs 13.3 of 31.0 million; (b) a higher accuracy at the end"
    )
    SMOKE = {"hidden": (30,), "steps": 400, "seeds": 2}
    FULL = {"steps": 50_000, "seeds": 20}

    network: Literal["sigmoid"] | flax_networks.Name = "sigmoid"
    """the paper's network in pure functions; 784-256-128-10 with ReLU in Linen or NNX; or a small ResNet"""
    hidden: tuple[int, ...] = (100, 100, 100)
    """sigmoid units per hidden layer"""
    batch_size: int = 60
    """images per step"""
    steps: int = 10_000
    """updates per run"""
    learning_rate: float | None = None
    """learning rate of plain stochastic gradient descent. The default is 1 for the sigmoid network, the best of 0.1,
    0.3, 1 and 3 without batch normalization, and 0.1 for the other networks"""
    weight_std: float = 0.1
    """standard deviation of the sigmoid network's initial kernels"""
    momentum: float = 0.9
    """weight of the old value in the running statistics"""
    eval_every: int = 50
    """steps between evaluations on the test set"""
    runtime: Runtime = field(default_factory=Runtime)

    def _network(self, dataset: data.Dataset, batch_norm: bool) -> networks.Network:
        if self.network != "sigmoid":
            shape = dataset.train_images.shape[1:]
            return flax_networks.build(self.network, shape, dataset.classes, batch_norm, momentum=self.momentum)
        return networks.mlp(dataset, self.hidden, batch_norm, self.weight_std, momentum=self.momentum)

    def prepare(self) -> None:
        self.runtime.start()

    def runs(self, dataset: data.Dataset) -> records.Runs:
        saved = checkpoints.claim(self, self.NAME, dataset)
        learning_rate = self.learning_rate or (1.0 if self.network == "sigmoid" else 0.1)
        return {
            name: self.fit(
                *self._network(dataset, batch_norm=name != "plain"),
                dataset,
                optimizer=partial(optax.sgd, learning_rate),
                runtime=self.runtime,
                checkpoints=saved and saved / name.replace(" ", "-"),
            )
            for name in NETWORKS
        }

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        accuracy = {name: metrics[name]["test_accuracy"] for name in NETWORKS}
        best = np.fmax.reduce(accuracy["plain"], axis=1)  # nan only if all evaluations are nan
        reached = {name: study.first(metrics[name].steps, accuracy[name], best) for name in NETWORKS}
        plain, normalized = reached.values()
        last = {name: accuracy[name][:, -1] for name in NETWORKS}
        if np.isnan(normalized).any():
            title = f"{np.isnan(normalized).sum()} of {best.size} normalized networks never reach the plain one's best"
        else:
            title = (
                "The plain network's best accuracy: reached with batch normalization after "
                f"{normalized.mean():.0f} steps, without after {plain.mean():.0f}"
            )
        steps = {name: records.spread(reached[name], ".0f", "never") for name in NETWORKS}
        final = {name: records.spread(last[name], ".4f") for name in NETWORKS}
        return study.Finding(
            f"{steps['batch normalization']} steps to the plain network's best test accuracy "
            f"({records.spread(best, '.4f')}) with batch normalization, {steps['plain']} without; "
            f"at the end {final['batch normalization']} and {final['plain']}",
            (
                study.fewer(normalized, plain, self.steps, FEWER),
                study.clearly(last["batch normalization"] - study.lower(last["plain"])),
            ),
            title,
            [
                ["network", "steps to the plain best", "final test accuracy"],
                *([name, steps[name], final[name]] for name in NETWORKS),
            ],
        )

    def draw(self, path, metrics, title):
        best = np.fmax.reduce(metrics["plain"]["test_accuracy"], axis=1).mean()
        with plot.figure(path, title) as axes:
            plot.curves(axes, {name: (metrics[name].steps, metrics[name]["test_accuracy"]) for name in NETWORKS})
            axes.axhline(best, color="0.4", linewidth=1, linestyle="--", label="best of the plain network")
            axes.set(ylabel="test accuracy", ylim=(0, 1.02))
            plot.legend(axes, self.seeds)
