"""With batch normalization training depends less on the initial weights (Ioffe & Szegedy, 2015, section 3.3).

BN((a W) u) = BN(W u), and the gradient with respect to a W is 1 / a times that with respect to W, so the scale of the
weights should matter little. ReLU networks are trained from kernels with the standard deviation of He et al. times
scales over five decades, all in one vmap. The experiment measures the final accuracy, and the width in decades of the
longest range of consecutive scales with which networks train. Large weights need more steps with batch normalization,
because the angle by which a step turns them falls with the square of their size.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import optax

from experiments.harness import data, plot, records, study
from experiments.models import networks

TRAINS, WIDER = 0.9, 1.0
NETWORKS = ("plain", "batch normalization")


@dataclass(frozen=True)
class Initialization(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "initialization"
    CLAIM = "with batch normalization the initialization matters less"
    SOURCE = "Ioffe & Szegedy (2015), section 3.3"
    THRESHOLD = (
        f"(a) {study.CLEARLY}, the range of scales that train, to a test accuracy of {TRAINS} or more, which the plain "
        f"network has at its best scale, is wider by {WIDER:g} decade or more, so that a scale wrong by ten no longer "
        "matters; (b) it is all five decades in every run"
    )
    SMOKE = {"hidden": (30,), "steps": 300, "seeds": 2, "scales": 6}
    FULL = {"steps": 20_000, "seeds": 20, "scales": 21}

    hidden: tuple[int, ...] = (100, 100, 100, 100, 100)
    """ReLU units per hidden layer"""
    scales: int = 11
    """number of scales of the initial weights, from 10^-3 to 10^2 times the standard deviation of He et al."""
    batch_size: int = 60
    """images per step"""
    steps: int = 1200
    """updates per run"""
    learning_rate: float = 0.1
    """learning rate of plain stochastic gradient descent"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales < 2:
            raise data.InputError(f"scales={self.scales}: expected 2 or more, for a range.")

    @property
    def decades(self) -> np.ndarray:
        """The logarithms of the scales."""
        return np.linspace(-3, 2, self.scales)

    def _names(self, network):
        return tuple(f"{network}, 10^{decade:g}" for decade in self.decades)

    def runs(self, dataset: data.Dataset) -> records.Runs:
        def init(key, scale, batch_norm):
            return networks.mlp(dataset, self.hidden, batch_norm, lambda n: scale * networks.he(n)).init(key)

        return {
            self._names(name): self.fit(
                partial(init, batch_norm=name != "plain"),
                networks.mlp(dataset, self.hidden, name != "plain", activation=jax.nn.relu).apply,
                dataset,
                optimizer=lambda scale: optax.sgd(self.learning_rate),
                settings=[{"scale": 10.0**decade} for decade in self.decades],
            )
            for name in NETWORKS
        }

    def _final(self, metrics, network):
        return np.stack([metrics[name]["test_accuracy"][:, -1] for name in self._names(network)], 1)

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        final = {name: self._final(metrics, name) for name in NETWORKS}
        width = {name: np.array([self._width(run) for run in runs]) for name, runs in final.items()}
        words = {name: records.spread(width[name], ".1f") for name in NETWORKS}
        return study.Finding(
            f"{words['batch normalization']} decades train in {self.steps} steps with batch normalization, "
            f"{words['plain']} without, 0 being one scale alone",
            (
                study.clearly(width["batch normalization"] - width["plain"], WIDER - 1e-6),
                bool((width["batch normalization"] > 5 - 1e-6).all()),
            ),
            f"Initial weights over {words['batch normalization']} decades train with batch normalization, without "
            f"over {words['plain']} (0: one scale alone)",
            [
                ["scale of the initial weights", *NETWORKS],
                *(
                    [f"10^{decade:g}", *(records.spread(final[name][:, i], ".3f") for name in NETWORKS)]
                    for i, decade in enumerate(self.decades)
                ),
            ],
        )

    def _width(self, accuracy):
        """The width in decades of the longest range of consecutive scales that train; one scale alone has width 0."""
        longest = now = 0
        for trains in accuracy >= TRAINS:
            now = now + 1 if trains else 0
            longest = max(longest, now)
        return max(longest - 1, 0) * 5 / (self.scales - 1)

    def draw(self, path, metrics, title):
        with plot.figure(path, title) as axes:
            series = {name: (10**self.decades, self._final(metrics, name)) for name in NETWORKS}
            plot.curves(axes, series, markers=True, xlabel="standard deviation of the initial weights, in He et al.'s")
            axes.axhline(TRAINS, color="0.4", linewidth=1, linestyle="--", label="trains")
            axes.set(xscale="log", ylabel="test accuracy at the end", ylim=(0, 1.02))
            plot.legend(axes, self.seeds, loc="center left")
