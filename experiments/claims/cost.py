"""Batch normalization costs memory, time and parameters.

The network has twelve blocks of convolution, normalization or a bias, and ReLU. It is run with and without batch
normalization, and with the policy `save_statistics`, with which the backward pass recomputes the normalization from
saved statistics. The experiment measures the residuals of the forward pass, from its jaxpr; the time of loss and
gradient; the numbers of parameters and running statistics; and the time of an evaluation, also with batch normalization
folded. Times are medians of interleaved calls, with one repetition for each seed. The ratios of times differ between
machines. On CPUs, XLA merges part of the recomputation with the forward pass unless the blocks are under a scan.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from experiments.benchmark import footprint
from experiments.harness import data, plot, records, study, train

MORE = 0.05
WAYS = ("never had it", "batch normalization", "save_statistics", "folded")
COLOURS = dict(zip(WAYS, (plot.VERMILION, plot.BLUE, plot.GREEN, plot.SKY), strict=True))
MEASURES = {
    "training": "time of loss and gradient, ms",
    "saved": "saved for the backward, MB",
    "evaluation": "time of an evaluation, ms",
    "parameters": "parameters",
    "statistics": "running statistics",
}
FORMS = {"training": ".1f", "saved": ".2f", "evaluation": ".2f", "parameters": ".0f", "statistics": ".0f"}


def _numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Cost(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "cost"
    CLAIM = "batch normalization costs memory, time and parameters"
    SOURCE = "common knowledge; Rota Bulò et al. (2018) on memory, Jacob et al. (2018) on folding"
    THRESHOLD = (
        f"more by {MORE:.0%} or more than the network without it, from where one notices: (a) the time of loss and "
        "gradient; (b) what is saved for the backward; (c) parameters and running statistics; (d) the time of an "
        f"evaluation, even when folded. Times {study.CLEARLY.replace('seeds', 'repetitions')}"
    )
    SMOKE = {"batch_size": 2, "side": 4, "features": 8, "rounds": 2, "seeds": 2}
    FULL = {"batch_size": 128, "rounds": 51, "seeds": 10}

    batch_size: int = 8
    """images per step"""
    side: int = 32
    """height and width of the activations"""
    features: int = 32
    """features of each block"""
    rounds: int = 7
    """timings of each network for each seed"""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        return {WAYS: self._measure()}

    def _measure(self) -> Iterator[train.Evaluation]:
        x = jax.random.normal(jax.random.key(0), (self.batch_size, self.side, self.side, self.features))
        # The norm, and whether the policy is used. A folded network is not trained.
        training = {"never had it": ("never had it", False), WAYS[1]: ("bnjax", False), WAYS[2]: ("bnjax", True)}
        networks = {name: footprint.gradient(*way, x) for name, way in training.items()}
        steps = {name: partial(jax.jit(gradient), *held, x) for name, (gradient, held) in networks.items()}
        saved = {name: footprint.residuals(*way, x) / 1e6 for name, way in training.items()}
        evaluations = footprint.serving(x)
        held = {name: [_numbers(tree) for tree in each] for name, (_, each) in networks.items()}
        held["folded"] = held["never had it"]  # the same kernels and biases
        values = {name: np.full((len(WAYS), self.seeds), np.nan) for name in MEASURES}
        for seed in range(self.seeds):
            step = footprint.times(steps, self.rounds)
            evaluation = footprint.times(evaluations, self.rounds)
            for i, name in enumerate(WAYS):
                values["training"][i, seed] = 1e3 * step.get(name, np.nan)
                values["saved"][i, seed] = saved.get(name, np.nan)
                values["evaluation"][i, seed] = 1e3 * evaluation.get(name, np.nan)
                values["parameters"][i, seed], values["statistics"][i, seed] = held[name]
        flat = {name: value.ravel() for name, value in values.items()}
        yield train.Evaluation(0, 1.0, np.full(len(WAYS) * self.seeds, np.nan), flat)

    def _ratios(self, metrics):
        """By measure and network, the ratio to the network without batch normalization, of shape (seeds,). Statistics
        are added to the parameters, because the ratio of statistics alone would divide by 0."""
        values = {way: {name: metrics[way][name][:, 0] for name in MEASURES} for way in WAYS}
        for each in values.values():
            each["held"] = each.pop("parameters") + each.pop("statistics")
        return {name: {way: values[way][name] / values[WAYS[0]][name] for way in WAYS} for name in values[WAYS[0]]}

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        ratios = self._ratios(metrics)
        words = {
            measure: {w: records.spread(r, ".2f", "") for w, r in each.items()} for measure, each in ratios.items()
        }
        normalized = {measure: each[WAYS[1]] for measure, each in words.items()}
        return study.Finding(
            f"in multiples of the network without: loss and gradient {normalized['training']}, saved for the backward "
            f"{normalized['saved']} ({words['saved']['save_statistics']} with save_statistics, which takes "
            f"{words['training']['save_statistics']} of the time), parameters and statistics {normalized['held']}, "
            f"evaluation {normalized['evaluation']}, folded {words['evaluation']['folded']}",
            (
                study.clearly(ratios["training"][WAYS[1]], 1 + MORE),
                bool((ratios["saved"][WAYS[1]] >= 1 + MORE).all()),
                bool((ratios["held"][WAYS[1]] >= 1 + MORE).all()),
                study.clearly(ratios["evaluation"]["folded"], 1 + MORE),
            ),
            f"Loss and gradient take {normalized['training']} times as long and save {normalized['saved']} times as "
            f"much; folded, an evaluation takes {words['evaluation']['folded']} times as long",
            [
                ["", *MEASURES.values()],
                *(
                    [way, *(records.spread(metrics[way][name][:, 0], form, "") for name, form in FORMS.items())]
                    for way in WAYS
                ),
            ],
        )

    def draw(self, path, metrics, title):
        ratios = self._ratios(metrics)
        with plot.figure(path, title) as axes:
            for i, way in enumerate(WAYS[1:]):
                values = np.stack([each[way] for each in ratios.values()], 1)
                places = np.arange(len(ratios)) + 0.25 * (i - 1)
                axes.bar(places, np.nan_to_num(values.mean(0)), 0.22, color=COLOURS[way], label=way)
                axes.vlines(places, values.min(0), values.max(0), color="0.2")
            axes.axhline(1, color=COLOURS[WAYS[0]], linestyle="--", label=WAYS[0])
            labels = [MEASURES.get(name, "parameters and statistics").split(",")[0] for name in ratios]
            axes.set_xticks(range(len(ratios)), labels, fontsize=8)
            axes.set_ylabel("multiples of the network without it")
            plot.legend(axes, self.seeds)
