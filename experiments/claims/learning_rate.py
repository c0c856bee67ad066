"""Batch normalization allows higher learning rates (Ioffe & Szegedy, 2015, section 4.2 and figure 3).

ReLU and sigmoid networks, with and without batch normalization, are trained at the learning rate of the plain ReLU
network and at 5, 30 and 100 times that rate, all rates of a network in one vmap. As in the paper's figure 3, the
experiment measures the steps to the best test accuracy of the plain ReLU network at its own rate, the best accuracy,
and whether a run diverges.
"""

from dataclasses import dataclass

import jax
import numpy as np
import optax

from experiments.harness import data, plot, records, study
from experiments.models import networks

HIGHER, FEWER = 5, 2
KINDS = ("plain", "BN")
ACTIVATIONS = {"ReLU": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
PAPER = {  # model, millions of steps to 72.2%, maximum accuracy
    "ReLU, plain, 1x": ("Inception", "31.0", "72.2%"),
    "ReLU, BN, 1x": ("BN-Baseline", "13.3", "72.7%"),
    "ReLU, BN, 5x": ("BN-x5", "2.1", "73.0%"),
    "ReLU, BN, 30x": ("BN-x30", "2.7", "74.8%"),
    "sigmoid, BN, 5x": ("BN-x5-Sigmoid", "never", "69.8%"),
}


@dataclass(frozen=True)
class LearningRate(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "learning-rate"
    CLAIM = "batch normalization allows higher learning rates"
    SOURCE = "Ioffe & Szegedy (2015), section 4.2, figure 3"
    THRESHOLD = (
        f"(a) the highest rate at which all runs reach the plain network's best accuracy is {HIGHER} times its rate or "
        f"more, and higher than without; {study.CLEARLY}: (b) at its best rate it takes at most 1/{FEWER} of the steps "
        "that the plain network takes at its best one (the paper: 2.1 of 31.0 million); (c) the sigmoid network's best "
        "accuracy is higher with batch normalization (the paper: 69.8%, and without no better than chance)"
    )
    SMOKE = {"hidden": (30,), "steps": 300, "seeds": 2, "multiples": (1.0, 30.0)}
    FULL = {"steps": 20_000, "seeds": 20, "multiples": (1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 300.0)}

    hidden: tuple[int, ...] = (100, 100, 100, 100, 100)
    """units per hidden layer"""
    batch_size: int = 60
    """images per step"""
    steps: int = 2000
    """updates per run"""
    learning_rate: float = 0.1
    """base learning rate of plain stochastic gradient descent"""
    multiples: tuple[float, ...] = (1.0, 5.0, 30.0, 100.0)
    """multiples of the base learning rate, beginning with 1"""
    eval_every: int = 20
    """steps between evaluations on the test set"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiples[:1] != (1,):
            raise data.InputError(f"multiples={self.multiples}: expected 1 as the first.")

    def runs(self, dataset: data.Dataset) -> records.Runs:
        def fit(activation, kind):
            network = networks.mlp(dataset, self.hidden, kind == "BN", activation=ACTIVATIONS[activation])
            return self.fit(
                lambda key, learning_rate: network.init(key),
                network.apply,
                dataset,
                optimizer=optax.sgd,
                settings=[{"learning_rate": multiple * self.learning_rate} for multiple in self.multiples],
            )

        return {self._names(activation, kind): fit(activation, kind) for activation in ACTIVATIONS for kind in KINDS}

    def _names(self, activation, kind):
        return tuple(f"{activation}, {kind}, {multiple:g}x" for multiple in self.multiples)

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        best = {name: np.fmax.reduce(series["test_accuracy"], axis=1) for name, series in metrics.items()}
        diverged = {name: np.isnan(series["test_accuracy"][:, -1]).sum() for name, series in metrics.items()}
        target = best["ReLU, plain, 1x"]
        reached = {name: study.first(s.steps, s["test_accuracy"], target) for name, s in metrics.items()}
        highest, fastest, sigmoid = {}, {}, {}
        for kind in KINDS:
            names = dict(zip(self.multiples, self._names("ReLU", kind), strict=True))
            highest[kind] = max((m for m, name in names.items() if not np.isnan(reached[name]).any()), default=0)
            fastest[kind] = min(
                (reached[name] for name in names.values()), key=lambda r: np.inf if np.isnan(r).any() else r.mean()
            )
            sigmoid[kind] = max((best[name] for name in self._names("sigmoid", kind)), key=np.nanmean)
        rows = [
            [
                name,
                records.spread(reached[name], ".0f", "never"),
                records.spread(best[name], ".4f"),
                f"{diverged[name]} of {self.seeds}",
                *PAPER.get(name, ("", "", "")),
            ]
            for name in metrics
        ]
        steps = {kind: records.spread(fastest[kind], ".0f", "never") for kind in fastest}
        return study.Finding(
            f"the highest rate at which all runs reach the target is {highest['BN']:g}x with batch normalization, "
            f"{highest['plain']:g}x without; at the best rate they take {steps['BN']} and {steps['plain']} steps; the "
            f"sigmoid network's best accuracy is {records.spread(sigmoid['BN'], '.3f')} and "
            f"{records.spread(sigmoid['plain'], '.3f')}",
            (
                highest["BN"] >= HIGHER and highest["BN"] > highest["plain"],
                study.fewer(fastest["BN"], fastest["plain"], self.steps, FEWER),
                study.clearly(sigmoid["BN"] - sigmoid["plain"]),
            ),
            f"The highest rate at which all ReLU networks reach the plain one's best accuracy: {highest['BN']:g} times "
            f"its own with batch normalization, {highest['plain']:g} without",
            [["network", "steps to target", "best accuracy", "diverged", "paper: model", "10^6 steps", "best"], *rows],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=2, sharey=True) as panels:
            for axes, activation in zip(panels, ACTIVATIONS, strict=True):
                series = {}
                for kind, name in zip(KINDS, plot.COLOURS, strict=True):
                    runs = [metrics[each]["test_accuracy"][:, -1] for each in self._names(activation, kind)]
                    series[name] = (self.multiples, np.stack(runs, 1))
                plot.curves(axes, series, markers=True, xlabel="learning rate, in multiples")
                axes.set(xscale="log", ylim=(0, 1.02))
                axes.set_title(f"{activation} network", fontsize=10)
                plot.ticks(axes, list(self.multiples))
            panels[0].set_ylabel("test accuracy at the end")
            plot.legend(panels[0], self.seeds, loc="center left")
