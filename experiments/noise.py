"""The noise of batch statistics is the regularizer (Ioffe & Szegedy, 2015, section 3.4; Luo et al., 2019).

ReLU networks on little data, trained in batches of several sizes: batch-normalized by the statistics of the batch; by
those of the population, for which the whole training set passes through the network beside each batch and alone enters
the statistics, differentiated through as the batch's are; and plain. All three have noise in the gradient, the first
alone has it in the statistics. Measured: the gap between the accuracies on the training set and on the test set.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, networks, plot, records, study, train

NETWORKS = ("batch statistics", "population statistics", "plain")
COLOURS = dict(zip(NETWORKS, (plot.BLUE, plot.GREEN, plot.VERMILION), strict=True))


@dataclass(frozen=True)
class Noise(study.Study):
    """One run of the experiment; the command line's flags are these fields."""

    NAME = "noise"
    CLAIM = "the noise of batch statistics is what regularizes"
    SOURCE = "Ioffe & Szegedy (2015), section 3.4; Luo et al. (2019), section 3"
    THRESHOLD = (
        "clearly over seeds (by two standard errors): (a) with batch statistics the gap is smaller in the smallest "
        "batches than in the largest; (b) in the smallest batches it is smaller with batch statistics than with the "
        "population's, where only the noise is missing"
    )
    SMOKE = {"hidden": (30,), "steps": 100, "seeds": 2, "batch_sizes": (10, 100)}
    FULL = {"steps": 10_000, "seeds": 40}

    images: int = 200
    """in the training set"""
    hidden: tuple[int, ...] = (256, 128)
    """ReLU units per hidden layer"""
    batch_sizes: tuple[int, ...] = (5, 20, 50, 200)
    """images per step"""
    steps: int = 1000
    """updates per run"""
    learning_rate: float = 0.1
    """of plain stochastic gradient descent"""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        dataset = dataset.subset(min(self.images, len(dataset.train_images)))
        population = data.flat(dataset.train_images)

        def fit(name, batch_size):
            init, apply = networks.mlp(dataset, self.hidden, name != "plain", activation=jax.nn.relu)
            return self.fit(
                init,
                partial(_with_population, apply, population) if name == "population statistics" else apply,
                dataset,
                batch_size=min(batch_size, len(population)),
                probe=train.probe_accuracy(apply, dataset),
            )

        return {f"{name}, {size}": fit(name, size) for name in NETWORKS for size in self.batch_sizes}

    def _gaps(self, metrics):
        """Of each network, of shape (seeds, batch sizes)."""
        runs = {name: [metrics[f"{name}, {size}"] for size in self.batch_sizes] for name in NETWORKS}
        return {
            name: np.stack([s["train_accuracy"][:, -1] - s["test_accuracy"][:, -1] for s in series], 1)
            for name, series in runs.items()
        }

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        gaps = self._gaps(metrics)
        batch, population = gaps["batch statistics"], gaps["population statistics"]
        small, large = (records.spread(batch[:, i], ".3f") for i in (0, -1))
        known = records.spread(population[:, 0], ".3f")
        return study.Finding(
            f"gap in batches of {self.batch_sizes[0]}: {small} with their statistics, {known} with the population's; "
            f"in batches of {self.batch_sizes[-1]}: {large}",
            (study.clearly(batch[:, -1] - batch[:, 0]), study.clearly(population[:, 0] - batch[:, 0])),
            f"In batches of {self.batch_sizes[0]} the gap is {small} with their statistics and {known} with the "
            f"population's; in batches of {self.batch_sizes[-1]} {large}",
            [
                ["batch size", *NETWORKS],
                *(
                    [str(size), *(records.spread(gaps[name][:, i], ".3f") for name in NETWORKS)]
                    for i, size in enumerate(self.batch_sizes)
                ),
            ],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title) as axes:
            gaps = {name: (self.batch_sizes, values) for name, values in self._gaps(metrics).items()}
            plot.curves(axes, gaps, COLOURS, markers=True, xlabel="images in a batch")
            axes.set(xscale="log", ylabel="training accuracy less test accuracy", ylim=(0, None))
            plot.ticks(axes, list(self.batch_sizes))
            plot.legend(axes, self.seeds)


def _with_population(apply, population, params, state, x, train, *, mask=None, axis_name=None):
    """The network on x; in training its statistics are those of the population, which passes through beside x."""
    if not train:
        return apply(params, state, x, False)
    every = jnp.concatenate([x, jnp.asarray(population)])
    mask = jnp.arange(len(every))[:, None] >= len(x)
    logits, state = apply(params, state, every, True, mask=mask, axis_name=axis_name)
    return logits[: len(x)], state
