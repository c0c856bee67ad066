"""Batch normalization belongs before the activation (Ioffe & Szegedy, 2015, section 3.2), or after it?

The paper and PyTorch's usual network, 784-256-128-10 with batch normalization after each hidden linear layer, place it
before the activation. Keras's usual example, a Dense(64, relu) followed by batch normalization, places it after the
activation. Both networks are trained with both placements and without batch normalization; everything else is equal.
The experiment measures the steps to the plain network's best test accuracy, and the accuracy at the end.
"""

from dataclasses import dataclass

import jax
import numpy as np

from experiments.harness import data, plot, records, study
from experiments.models import networks

PLACES = ("before", "after", "plain")
COLOURS = dict(zip(PLACES, (plot.BLUE, plot.GREEN, plot.VERMILION), strict=True))
NETWORKS = {"256-128": (256, 128), "64": (64,)}


@dataclass(frozen=True)
class Placement(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "placement"
    CLAIM = "batch normalization belongs before the activation, not after it"
    SOURCE = "Ioffe & Szegedy (2015), section 3.2, and PyTorch's usual network; against them Keras's usual example"
    THRESHOLD = (
        f"{study.CLEARLY}, before the activation (a) the accuracy at the end is higher in the network 256-128, (b) the "
        "plain network's best is reached in fewer steps; (c), (d) likewise in the network 64. Any clear difference "
        "would do: nobody states one"
    )
    SMOKE = {"steps": 100, "seeds": 2}
    FULL = {"steps": 20_000, "seeds": 40, "eval_every": 100}

    batch_size: int = 60
    """images per step"""
    steps: int = 2000
    """updates per run"""
    learning_rate: float = 0.1
    """learning rate of plain stochastic gradient descent"""
    eval_every: int = 10
    """steps between evaluations on the test set"""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        def fit(hidden, place):
            batch_norm = {} if place == "plain" else {"placement": place}
            network = networks.mlp(dataset, hidden, bool(batch_norm), activation=jax.nn.relu, **batch_norm)
            return self.fit(*network, dataset)

        return {f"{name}, {place}": fit(hidden, place) for name, hidden in NETWORKS.items() for place in PLACES}

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        final = {name: series["test_accuracy"][:, -1] for name, series in metrics.items()}
        target = {name: np.fmax.reduce(metrics[f"{name}, plain"]["test_accuracy"], axis=1) for name in NETWORKS}
        reached = {
            f"{name}, {place}": study.first(series.steps, series["test_accuracy"], target[name])
            for name in NETWORKS
            for place in PLACES
            for series in [metrics[f"{name}, {place}"]]
        }
        accuracies = {name: records.spread(values, ".4f") for name, values in final.items()}
        steps = {name: records.spread(values, ".0f", "never") for name, values in reached.items()}

        def better(place, other):
            """For each network: whether the accuracy is clearly higher, and whether the steps are clearly fewer."""
            return {
                name: (
                    study.clearly(final[f"{name}, {place}"] - study.lower(final[f"{name}, {other}"])),
                    study.fewer(reached[f"{name}, {place}"], reached[f"{name}, {other}"], self.steps),
                )
                for name in NETWORKS
            }

        before, after = better("before", "after"), better("after", "before")
        found = [
            f"in {name} {'before' if any(before[name]) else 'after' if any(after[name]) else 'neither'} is better"
            for name in NETWORKS
        ]
        described = "; ".join(
            f"network {name}: accuracy {accuracies[f'{name}, before']} before, {accuracies[f'{name}, after']} after, "
            f"{steps[f'{name}, before']} and {steps[f'{name}, after']} steps"
            for name in NETWORKS
        )
        return study.Finding(
            described,
            tuple(part for name in NETWORKS for part in before[name]),
            f"Batch normalization before or after the activation: {', '.join(found)}",
            [
                ["network, place", "steps to the plain best", "final test accuracy"],
                *([name, steps[name], accuracies[name]] for name in metrics),
            ],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=2, sharey=True) as panels:
            for axes, name in zip(panels, NETWORKS, strict=True):
                series = {place: metrics[f"{name}, {place}"] for place in PLACES}
                plot.curves(axes, {place: (s.steps, s["test_accuracy"]) for place, s in series.items()}, COLOURS)
                axes.set_title(f"network {name}", fontsize=10)
                axes.set_ylim(min(s["test_accuracy"][:, -1].min() for s in series.values()) - 0.1, 1)
            panels[0].set_ylabel("test accuracy")
            plot.legend(panels[1], self.seeds, loc="lower right")
