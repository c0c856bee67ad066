"""Synchronized statistics equal one big batch.

A ReLU network is trained on 1 device, and on 4 devices that share each batch, with statistics of the whole batch and
with separate statistics for each device. The training losses of every step are compared with those on one device.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from experiments.harness import data, plot, records, runtime, study
from experiments.models import networks

EQUAL, TIMES = 1e-3, 10
NETWORKS = ("1 device", "4 devices, synchronized", "4 devices, each its own")
COLOURS = dict(zip(NETWORKS, (plot.BLACK, plot.BLUE, plot.VERMILION), strict=True))


@dataclass(frozen=True)
class Devices(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "devices"
    CLAIM = "statistics synchronized over devices equal those of one big batch"
    SOURCE = "the definition of batch normalization; Peng et al. (2018) on many devices"
    THRESHOLD = (
        f"(a) no loss with synchronized statistics is further than {EQUAL:g} of it from one device's: float32 rounds "
        f"by 6e-8, and training enlarges that; (b) without synchronization the largest distance is at least {TIMES} "
        "times as large in every run, or there would be nothing to synchronize"
    )
    SMOKE = {"hidden": (30,), "steps": 20, "seeds": 2}
    FULL = {"steps": 1000, "seeds": 20}

    hidden: tuple[int, ...] = (100, 100)
    """ReLU units per hidden layer"""
    batch_size: int = 16
    """images per step, of all devices together"""
    steps: int = 100
    """updates per run"""
    learning_rate: float = 0.1
    """learning rate of plain stochastic gradient descent"""

    def prepare(self) -> None:
        runtime.provide_devices()

    def runs(self, dataset: data.Dataset) -> records.Runs:
        init, apply = networks.mlp(dataset, self.hidden, True, activation=jax.nn.relu)

        def fit(name):
            return self.fit(
                init,
                partial(_own_statistics, apply) if name == NETWORKS[2] else apply,
                dataset,
                eval_every=1,
                runtime=runtime.Runtime(devices=1) if name == NETWORKS[0] else runtime.several("shard_map"),
            )

        return {name: fit(name) for name in NETWORKS}

    def _distances(self, metrics):
        """The training losses of each network, of shape (seeds, steps)."""
        losses = {name: metrics[name]["loss"][:, 1:] for name in NETWORKS}
        return {name: np.abs(losses[name] / losses[NETWORKS[0]] - 1) for name in NETWORKS[1:]}

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        synchronized, own = (distance.max(1) for distance in self._distances(metrics).values())
        return study.Finding(
            f"the largest distance of a loss from one device's, as a part of it: {synchronized.max():.1e} with "
            f"synchronized statistics, {own.min():.1g} or more with each device's own",
            (bool(synchronized.max() <= EQUAL), bool((own >= TIMES * synchronized).all())),
            f"Losses on 4 devices with synchronized statistics are within {synchronized.max():.0e} of one device's; "
            f"with statistics of their own they come to be off by {own.min():.1g} times the loss or more",
            [
                ["devices", "loss at the end", "largest distance, as a part of the loss", "final test accuracy"],
                *(
                    [
                        name,
                        records.spread(metrics[name]["loss"][:, -1], ".4f"),
                        "" if name == NETWORKS[0] else f"{self._distances(metrics)[name].max():.1e}",
                        records.spread(metrics[name]["test_accuracy"][:, -1], ".4f"),
                    ]
                    for name in NETWORKS
                ),
            ],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=2) as (left, right):
            steps = metrics[NETWORKS[0]].steps[1:]
            plot.curves(left, {name: (steps, metrics[name]["loss"][:, 1:]) for name in NETWORKS}, COLOURS)
            left.lines[1].set_linestyle("--")  # dashed, because it covers the first line
            left.set(ylabel="training loss of a step, nats", yscale="log")
            plot.legend(left, self.seeds)
            distances = {name: (steps, np.maximum(d, 1e-9)) for name, d in self._distances(metrics).items()}
            plot.curves(right, distances, COLOURS)
            right.set(ylabel="distance from one device's loss, as a part of it", yscale="log")
            right.axhline(EQUAL, color="0.4", linewidth=1, linestyle="--")


def _own_statistics(apply, params, state, x, train, *, mask=None, axis_name=None):
    """The network with separate statistics for each device in training. Running statistics are means over devices."""
    logits, state = apply(params, state, x, train, mask=mask)
    if axis_name is not None:
        state = [
            each._replace(mean=m, var=v, count=jax.lax.pmax(each.count, axis_name))
            for each in state
            for m, v in [jax.lax.pmean((each.mean, each.var), axis_name)]
        ]
    return logits, state
