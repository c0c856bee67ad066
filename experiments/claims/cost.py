"""Batch normalization costs time, memory and parameters.

The network has twelve blocks of convolution, normalization or a bias, and ReLU. It is trained with and without batch
normalization, and with the policy `save_statistics`, with which the backward pass recomputes the normalization from
saved statistics. The experiment measures the time of loss and gradient, the residuals of the forward pass, from its
jaxpr, and the numbers of parameters and running statistics.

A seed is a round of timing: it draws the variables, the batch and the order of the arms, whose calls are interleaved.
The time of an arm is the least of its calls, because other programs on a machine only add to a time. The interval then
covers repetitions on one machine, and the ratios of times differ between machines. Residuals and parameters are counts,
which are the same in every seed. On CPUs, XLA merges part of the recomputation with the forward pass unless the blocks
are under a scan.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments.benchmark import footprint
from experiments.harness import headline, lab, plot, protocol, records, report, runs, study

PLAIN, NORMALIZED, SAVING = "plain", "batch normalization", "save_statistics"
ARMS = {PLAIN: ("never had it", False), NORMALIZED: ("bnjax", False), SAVING: ("bnjax", True)}
"""By name, the layer, and whether the loss is under jax.checkpoint with the policy."""
COLOURS = plot.COLOURS | {SAVING: plot.GREEN}
NOTICED = 1.05
COUNTED = "the same in every seed"
PARTS = (
    protocol.Part(
        "time",
        "time of loss and gradient, batch normalization / plain",
        NOTICED,
        "a twentieth more, from where one notices",
    ),
    protocol.Part(
        "memory",
        f"bytes saved for the backward pass, batch normalization / plain; a count, {COUNTED}",
        NOTICED,
        "a twentieth more, from where one notices",
        paper="up to 2: in-place normalization, without the added buffers, saves up to 50% (Rota Bulò et al., 2018)",
    ),
    protocol.Part(
        "parameters",
        f"parameters and running statistics, batch normalization / plain; a count, {COUNTED}",
        NOTICED,
        "a twentieth more, from where one notices",
    ),
)
UNITS = {"time": "ms", "memory": "MB", "parameters": "numbers"}
FORMS = {"time": ".1f", "memory": ".2f", "parameters": ".0f"}


@dataclass(frozen=True)
class Cost(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "cost"
    CLAIM = "batch normalization costs time, memory and parameters"
    # What a user notices first.
    HEADLINE = headline.Headline(
        "time", "{} time for loss and gradient with batch normalization", "batch normalization", "amount"
    )
    QUESTION = "How many times as much of each does a network need with batch normalization?"
    SOURCE = "common knowledge; Gitman & Ginsburg (2017) on time, Rota Bulò et al. (2018) on memory"
    PROTOCOL = (
        "A network of twelve blocks of convolution, batch normalization or a bias, and ReLU is timed on a batch of "
        "random normal numbers, not on a data set. A seed is a round of timing with its own variables, batch and order "
        "of the arms. In each round the calls of the arms are interleaved, and the minimum time of each counts."
    )
    WOULD_CHANGE = (
        "Times are from one machine. A device whose memory is slow in comparison with its arithmetic, or a network "
        "with cheaper layers between the normalizations, makes the share of the normalization larger. A compiler that "
        "fuses the normalization with its neighbours makes it smaller."
    )
    PARTS = PARTS
    CHANGES = (
        report.Change(
            "2026-11-27",
            "The time of an evaluation, even when folded, is no longer a part, because nobody claims it. The spread "
            "was over repetitions of one timing; now each has its own variables, batch and order. The thresholds are "
            "the same.",
            "1000 to 1009",
        ),
        study.again(),
    )
    SMOKE = {"batch_size": 2, "pixels": 4, "features": 8, "rounds": 2, "seeds": 2}
    FULL = {"batch_size": 128, "rounds": 51, "seeds": 20}

    batch_size: int = 8
    """images per step"""
    pixels: int = 32
    """height and width of the activations"""
    features: int = 32
    """features of each block"""
    rounds: int = 9
    """calls of each arm for each seed"""

    def measure(self, lab: lab.Lab) -> None:
        shape = (self.batch_size, self.pixels, self.pixels, self.features)
        steps, saved = {}, {}
        for seed in lab.record.missing(ARMS, lab.seeds):
            x = jax.random.normal(jax.random.key(seed), shape)
            made = {arm: footprint.gradient(*way, x, seed) for arm, way in ARMS.items()}
            # Compiled and traced once: they are the same for all seeds.
            steps = steps or {arm: jax.jit(gradient) for arm, (gradient, _) in made.items()}
            saved = saved or {arm: footprint.residuals(*way, x) / 1e6 for arm, way in ARMS.items()}
            order = np.random.default_rng(seed).permutation([*ARMS])
            calls = {arm: partial(steps[arm], *made[arm][1], x) for arm in order}
            seconds = footprint.times(calls, self.rounds)
            for arm in ARMS:
                held = sum(leaf.size for leaf in jax.tree.leaves(made[arm][1]))
                lab.record.add(arm, seed, [0], {"time": 1e3 * seconds[arm], "memory": saved[arm], "parameters": held})
            lab.tell(f"round {seed}")

    def judge(self, metrics: runs.Metrics) -> study.Finding:
        ratios = _ratios(metrics)
        effects = {part.name: ratios[part.name][NORMALIZED] for part in PARTS}
        words = {name: {arm: records.spread(r, ".2f") for arm, r in each.items()} for name, each in ratios.items()}
        normalized, saving = ({name: each[arm] for name, each in words.items()} for arm in (NORMALIZED, SAVING))
        return study.Finding(
            effects,
            f"In multiples of the plain network: loss and gradient take {normalized['time']} of the time and save "
            f"{normalized['memory']} of the bytes ({saving['memory']} with save_statistics, which takes "
            f"{saving['time']} of the time); parameters and statistics are {normalized['parameters']}. "
            f"Times are the minimum of {self.rounds} calls, in {len(metrics[PLAIN].seeds)} rounds.",
            f"Loss and gradient take {ratios['time'][NORMALIZED].mean():.2f} times as long as without, and save "
            f"{ratios['memory'][NORMALIZED].mean():.2f} times as much",
            [
                ["arm", *(f"{name}, {unit}" for name, unit in UNITS.items())],
                *([arm, *(records.spread(metrics[arm][name], form) for name, form in FORMS.items())] for arm in ARMS),
            ],
        )

    def draw(self, path: Path, metrics: runs.Metrics, title: str) -> None:
        ratios = _ratios(metrics)
        with plot.figure(path, title) as axes:
            for i, arm in enumerate((NORMALIZED, SAVING)):
                values = np.stack([each[arm] for each in ratios.values()], 1)
                places = np.arange(len(ratios)) + 0.3 * (i - 0.5)
                axes.bar(places, values.mean(0), 0.28, color=COLOURS[arm], label=arm)
                axes.vlines(places, values.min(0), values.max(0), color="0.2")
            axes.axhline(1, color=COLOURS[PLAIN], linestyle="--", label=PLAIN)
            labels = ("time of loss and gradient", "saved for the backward", "parameters and statistics")
            axes.set_xticks(range(len(ratios)), labels)
            axes.set_ylabel("multiples of the plain network")
            plot.legend(axes, self.seeds)


def _ratios(metrics: runs.Metrics) -> dict[str, dict[str, np.ndarray]]:
    """By measure and arm, the ratio to the plain network in each seed."""
    return {name: {arm: metrics[arm][name] / metrics[PLAIN][name] for arm in (NORMALIZED, SAVING)} for name in UNITS}
