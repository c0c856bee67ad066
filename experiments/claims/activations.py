"""Batch normalization steadies the distributions of a layer's inputs (Ioffe & Szegedy, 2015, figure 1b and c).

The networks are those of `convergence`. At every evaluation the test images pass through the network as one batch, in
training mode, and the 15th, 50th and 85th percentiles of the inputs of the last hidden layer's sigmoids are recorded.
The drift of a unit is the standard deviation of its median over training, divided by half the mean distance of the
outer percentiles, which is nearly the standard deviation of a normal distribution. The mean and the variance of a
normalized input are steady by definition, except for the learned scale and bias.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data, plot, records, study
from experiments.models import networks

STEADIER = 2
NETWORKS = ("plain", "batch normalization")


@dataclass(frozen=True)
class Activations(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "activations"
    CLAIM = "batch normalization steadies the distributions of a layer's inputs"
    SOURCE = "Ioffe & Szegedy (2015), section 4.1, figures 1b and 1c"
    THRESHOLD = (
        f"{study.CLEARLY}: the drift is at most 1/{STEADIER} of the plain network's: the paper's 'much more stable' "
        "should be seen by eye"
    )
    SMOKE = {"hidden": (30,), "steps": 400, "seeds": 2}
    FULL = {"steps": 50_000, "seeds": 20, "eval_every": 250}

    hidden: tuple[int, ...] = (100, 100, 100)
    """sigmoid units per hidden layer"""
    units: int = 10
    """units of the last hidden layer whose inputs are recorded"""
    batch_size: int = 60
    """images per step"""
    steps: int = 10_000
    """updates per run"""
    learning_rate: float = 1.0
    """learning rate of plain stochastic gradient descent"""
    weight_std: float = 0.1
    """standard deviation of the initial kernels"""
    eval_every: int = 100
    """steps between evaluations"""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        return {name: self._fit(dataset, batch_norm=name != "plain") for name in NETWORKS}

    def _fit(self, dataset, batch_norm):
        network = networks.mlp(dataset, self.hidden, batch_norm, self.weight_std)
        images = jnp.asarray(data.flat(dataset.test_images))

        def probe(params, state):
            seen = []

            def sigmoid(x):
                seen.append(x)
                return jax.nn.sigmoid(x)

            network.apply(params, state, images, True, activation=sigmoid)
            return {"percentiles": jnp.percentile(seen[-1][:, : self.units], jnp.array([15.0, 50.0, 85.0]), axis=0)}

        return self.fit(*network, dataset, probe=probe)

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        drift, spread = {}, {}
        for name in NETWORKS:
            low, median, high = np.moveaxis(metrics[name]["percentiles"], 2, 0)  # of shape (seeds, evaluations, units)
            half = (high - low).mean(1) / 2
            drift[name], spread[name] = (median.std(1) / half).mean(1), half.mean(1)
        plain, normalized = (records.spread(drift[name], ".2f") for name in NETWORKS)
        ratio = drift["batch normalization"] / drift["plain"]
        return study.Finding(
            f"drift {normalized} with batch normalization, {plain} without: {records.spread(ratio, '.2f')} of it",
            (study.clearly(1 / STEADIER - ratio),),
            f"Over training the median of a sigmoid's input moves by {normalized} standard deviations with batch "
            f"normalization, by {plain} without",
            [
                ["network", "drift", "half the distance of the percentiles"],
                *([name, records.spread(drift[name], ".3f"), records.spread(spread[name], ".2f")] for name in NETWORKS),
            ],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=2, sharey=True) as panels:
            for axes, name in zip(panels, NETWORKS, strict=True):
                percentiles = metrics[name]["percentiles"][..., 0]  # of the first unit
                names = ("15th percentile", "median", "85th percentile")
                series = {each: (metrics[name].steps, percentiles[:, :, i]) for i, each in enumerate(names)}
                plot.curves(axes, series, dict(zip(names, (plot.SKY, plot.BLACK, plot.ORANGE), strict=True)))
                axes.set_title(name, fontsize=10)
            panels[0].set_ylabel("input of one sigmoid in the last hidden layer")
            plot.legend(panels[0], self.seeds)
