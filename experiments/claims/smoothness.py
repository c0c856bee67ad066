"""Batch normalization makes the loss smoother (Santurkar et al., 2018, sections 2.2 and 3.1, figures 2 and 4).

The networks are those of `convergence`, and a third with noise AFTER each batch normalization, whose mean and variance
change at every step (the paper's algorithm 1 in appendix A), so that no layer's inputs have a steady distribution. At
every evaluation the gradient g of a fixed batch is followed over 0.5 to 4 times the learning rate. The experiment
measures the range of the loss along this step; the largest distance of the gradient there from g, as in the paper and
relative to |g|; and how fast each network trains.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnjax
from experiments.harness import data, plot, records, study, train
from experiments.models import networks

SMOOTHER = 2
NETWORKS = ("plain", "batch normalization", "noise after it")
COLOURS = dict(zip(NETWORKS, (plot.VERMILION, plot.BLUE, plot.GREEN), strict=True))
MEASURES = {
    "loss_range": "range of the loss along a step, nats",
    "gradient_distance": "distance of gradients along a step",
    "relative_distance": "distance of gradients along a step, |g|",
}
LENGTHS = (0.5, 1.0, 2.0, 4.0)  # in learning rates, as in the paper's section 3.1


def noisy_init(key, init):
    """The variables of a network, with a key in each state of batch normalization."""
    params, state = init(key)
    return params, [(each, jax.random.fold_in(key, 100 + i)) for i, each in enumerate(state)]


def noisy_bn_apply(params, state, x, train, **options):
    """Batch normalization, then s x + m for each example and unit. The mean of m, in [-0.5, 0.5], and the deviation of
    s, in [1, 1.25], are drawn again at every step."""
    y, bn_state = bnjax.bn_apply(params, state[0], x, train, **options)
    key, mean_key, deviation_key, m_key, s_key = jax.random.split(state[1], 5)
    if train:
        features = (1, x.shape[-1])
        mean = jax.random.uniform(mean_key, features, minval=-0.5, maxval=0.5)
        deviation = jax.random.uniform(deviation_key, features, minval=1.0, maxval=1.25)
        y = y * (deviation + 0.1 * jax.random.normal(s_key, y.shape))
        y = y + mean + jax.random.uniform(m_key, y.shape, minval=-0.1, maxval=0.1)
    return y, (bn_state, key)


@dataclass(frozen=True)
class Smoothness(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "smoothness"
    CLAIM = "batch normalization makes the loss smoother, and helps without steady distributions"
    SOURCE = "Santurkar et al. (2018), sections 2.2 and 3.1, figures 2 and 4"
    THRESHOLD = (
        f"{study.CLEARLY}: along the gradient, on average over training, (a) the loss varies at most 1/{SMOOTHER} as "
        "much as in the plain network, (b) so does the gradient, (c) so does the gradient in units of its own norm, "
        "which a network does not gain by a small loss alone; (d) with noise after batch normalization a network still "
        f"needs at most 1/{SMOOTHER} of the plain network's steps to its best accuracy. A factor of {SMOOTHER} since "
        "the paper states no number, and less could hardly be seen in its figures"
    )
    SMOKE = {"hidden": (30,), "steps": 400, "seeds": 2}
    FULL = {"steps": 50_000, "seeds": 20, "eval_every": 250}

    hidden: tuple[int, ...] = (100, 100, 100)
    """sigmoid units per hidden layer"""
    batch_size: int = 60
    """images per step"""
    steps: int = 6000
    """updates per run"""
    learning_rate: float = 1.0
    """learning rate of plain stochastic gradient descent"""
    weight_std: float = 0.1
    """standard deviation of the initial kernels"""
    eval_every: int = 50
    """steps between evaluations"""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        return {name: self._fit(dataset, name) for name in NETWORKS}

    def _fit(self, dataset, name):
        init, apply = networks.mlp(dataset, self.hidden, name != "plain", self.weight_std)
        if name == NETWORKS[2]:
            init, apply = partial(noisy_init, init=init), partial(apply, normalize=noisy_bn_apply)
        batch = [jnp.asarray(x[: self.batch_size]) for x in (data.flat(dataset.train_images), dataset.train_labels)]

        def probe(params, state):
            def loss(params):
                return train.cross_entropy(apply, params, state, *batch)

            def at(length):
                there = jax.tree.map(lambda p, g: p - length * self.learning_rate * g, params, gradient)
                value, moved = jax.value_and_grad(loss)(there)
                return value, optax.global_norm(jax.tree.map(jnp.subtract, moved, gradient))

            gradient = jax.grad(loss)(params)
            losses, distances = jax.lax.map(at, jnp.array(LENGTHS))
            return {
                "loss_range": losses.max() - losses.min(),
                "gradient_distance": distances.max(),
                "relative_distance": distances.max() / optax.global_norm(gradient),
            }

        return self.fit(init, apply, dataset, probe=probe)

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        best = np.fmax.reduce(metrics["plain"]["test_accuracy"], axis=1)
        reached = {name: study.first(s.steps, s["test_accuracy"], best) for name, s in metrics.items()}
        mean = {name: {key: metrics[name][key].mean(1) for key in MEASURES} for name in NETWORKS}
        plain, normalized, noisy = NETWORKS
        rows = [
            [
                name,
                *(records.spread(mean[name][key], ".3g") for key in MEASURES),
                records.spread(reached[name], ".0f", "never"),
                records.spread(metrics[name]["test_accuracy"][:, -1], ".4f"),
            ]
            for name in NETWORKS
        ]
        times = [
            records.spread(mean[plain][key].mean(keepdims=True) / mean[normalized][key].mean(), ".2g")
            for key in MEASURES
        ]
        return study.Finding(
            f"along a step the plain network's loss varies {times[0]} times as much as the normalized one's, its "
            f"gradient {times[1]} times, in units of its norm {times[2]} times; steps to the plain network's best "
            f"{rows[1][4]} with batch normalization, {rows[2][4]} with noise after it, {rows[0][4]} without",
            (
                *(study.clearly(mean[plain][key] / SMOOTHER - mean[normalized][key]) for key in MEASURES),
                study.fewer(reached[noisy], reached[plain], self.steps, SMOOTHER),
            ),
            f"Along a step the plain network's loss varies {times[0]}, its gradient {times[1]} times as much as the "
            f"normalized one's; the plain one's best takes {rows[0][4]} steps, with noisy normalization {rows[2][4]}",
            [["network", *MEASURES.values(), "steps to target", "final accuracy"], *rows],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=3) as panels:
            for axes, key in zip(panels, ("loss_range", "relative_distance", "test_accuracy"), strict=True):
                plot.curves(axes, {name: (metrics[name].steps, metrics[name][key]) for name in NETWORKS}, COLOURS)
                axes.set_ylabel(MEASURES.get(key, "test accuracy"))
                if key in MEASURES:
                    axes.set_yscale("log")
            plot.legend(panels[2], self.seeds)
