"""The noise of batch statistics is the regularizer (Ioffe & Szegedy, 2015, section 3.4; Luo et al., 2019).

ReLU networks are trained on little data in batches of several sizes. The first is normalized by batch statistics, the
second by population statistics, and the third has no batch normalization. For population statistics the whole training
set passes through the network together with each batch; only the training set enters the statistics, which are
differentiated like batch statistics. All three have noise in the gradient, but only the first has noise in the
statistics. The experiment measures the gap between the accuracies on the training set and on the test set.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data, plot, records, study, train
from experiments.models import networks

NETWORKS = ("batch statistics", "population statistics", "plain")
COLOURS = dict(zip(NETWORKS, (plot.BLUE, plot.GREEN, plot.VERMILION), strict=True))


@dataclass(frozen=True)
class Noise(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "noise"
    CLAIM = "the noise of batch statistics is what regularizes"
    SOURCE = "Ioffe & Szegedy (2015), section 3.4; Luo et al. (2019)"
    THRESHOLD = (
        f"{study.CLEARLY}: (a) from the largest batches to the smallest the gap falls with batch statistics, and by "
        "more than with the population's, which have the gradient's noise too; (b) in the smallest it is smaller with "
        "batch statistics than with the population's, where only their noise is missing"
    )
    SMOKE = {"hidden": (30,), "steps": 100, "seeds": 2, "batch_sizes": (10, 100)}
    FULL = {"steps": 10_000, "seeds": 40}

    images: int = 200
    """images in the training set"""
    hidden: tuple[int, ...] = (256, 128)
    """ReLU units per hidden layer"""
    batch_sizes: tuple[int, ...] = (5, 20, 50, 200)
    """images per step"""
    steps: int = 1000
    """updates per run"""
    learning_rate: float = 0.1
    """learning rate of plain stochastic gradient descent"""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        dataset = dataset.subset(min(self.images, len(dataset.train_images)))
        population = data.flat(dataset.train_images)

        def fit(name, batch_size):
            init, apply = networks.mlp(dataset, self.hidden, name != "plain", activation=jax.nn.relu)
            return self.fit(
                init,
                partial(_with_population, apply, population) if name == "population statistics" else apply,
                dataset,
                batch_size=batch_size,
                probe=train.probe_accuracy(apply, dataset),
            )

        sizes = [size for size in self.batch_sizes if size <= len(population)]
        return {f"{name}, {size}": fit(name, size) for name in NETWORKS for size in sizes}

    def _gaps(self, metrics):
        """The measured batch sizes in increasing order, and the gaps of each network, of shape (seeds, sizes)."""
        sizes = sorted(size for size in self.batch_sizes if f"plain, {size}" in metrics)
        runs = {name: [metrics[f"{name}, {size}"] for size in sizes] for name in NETWORKS}
        return sizes, {
            name: np.stack([s["train_accuracy"][:, -1] - s["test_accuracy"][:, -1] for s in series], 1)
            for name, series in runs.items()
        }

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        sizes, gaps = self._gaps(metrics)
        batch, population = gaps["batch statistics"], gaps["population statistics"]
        falls, known = batch[:, -1] - batch[:, 0], population[:, -1] - population[:, 0]
        words = {name: [records.spread(gap, ".3f") for gap in values.T] for name, values in gaps.items()}
        small, other = (words[name][0] for name in NETWORKS[:2])
        met = (
            study.clearly(falls) and study.clearly(falls - known),
            study.clearly(population[:, 0] - batch[:, 0]),
        )
        return study.Finding(
            f"gap in batches of {sizes[0]}: {small} with their statistics, {other} with the population's; in batches "
            f"of {sizes[-1]}: {words[NETWORKS[0]][-1]} and {words[NETWORKS[1]][-1]}",
            met,
            f"In batches of {sizes[0]} the noise of their statistics {'narrows' if met[1] else 'does not narrow'} the "
            f"gap: {small} with it, {other} with the population's statistics",
            [
                ["batch size", *NETWORKS],
                *([str(size), *(words[name][i] for name in NETWORKS)] for i, size in enumerate(sizes)),
            ],
        )

    def draw(self, path, metrics, title):
        sizes, gaps = self._gaps(metrics)
        with plot.figure(path, title) as axes:
            series = {name: (sizes, values) for name, values in gaps.items()}
            plot.curves(axes, series, COLOURS, markers=True, xlabel="images in a batch")
            axes.set(xscale="log", ylabel="training accuracy less test accuracy", ylim=(0, None))
            plot.ticks(axes, sizes)
            plot.legend(axes, self.seeds)


def _with_population(apply, population, params, state, x, train, *, mask=None, axis_name=None):
    """The network on x. In training the population passes through it as well, and gives the statistics."""
    if not train:
        return apply(params, state, x, False)
    every = jnp.concatenate([x, jnp.asarray(population)])
    mask = jnp.arange(len(every))[:, None] >= len(x)
    logits, state = apply(params, state, every, True, mask=mask, axis_name=axis_name)
    return logits[: len(x)], state
