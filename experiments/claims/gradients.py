"""Gradients neither vanish nor explode in deep batch-normalized networks (Ioffe & Szegedy, 2015, section 3.3).

ReLU networks of 50 hidden layers are trained: one with batch normalization, and two without it, with the initial
weights of LeCun et al. (1998; Flax's default) and of He et al. (2015; derived for ReLU). The experiment measures the
norm of the loss's gradient with respect to the output of each hidden layer, at the start and after training, and the
slope of its logarithm over the layers, by least squares. The slope is undefined if a norm underflows. The gradient with
respect to kernels would hide a vanishing gradient, because it is the product of activations and output gradients, and
one may be small where the other is large.

Yang et al. (2019, section 4) contradict the claim: in wide ReLU networks with large batches, gradients at the start
explode by sqrt(pi / (pi - 1)) = 1.21 per layer, which is 0.083 decades.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data, plot, records, study, train
from experiments.models import networks

LEVEL = 0.02
NETWORKS = {
    "plain, LeCun": (False, lambda fan_in: fan_in**-0.5),
    "plain, He": (False, networks.he),
    "batch normalization": (True, networks.he),
}


@dataclass(frozen=True)
class Gradients(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "gradients"
    CLAIM = "with batch normalization gradients neither vanish nor explode with depth"
    SOURCE = "Ioffe & Szegedy (2015), sections 1 and 3.3; against it Yang et al. (2019), section 4"
    THRESHOLD = (
        f"{study.CLEARLY}: the slope of the gradient's norm is less than {LEVEL} decades a layer up or down, a factor "
        "of ten over 50 layers, (a) at the start; (b) after training"
    )
    SMOKE = {"depth": 5, "width": 20, "steps": 50, "seeds": 2}
    FULL = {"steps": 10_000, "seeds": 20, "width": 256}

    depth: int = 50
    """hidden layers"""
    width: int = 64
    """ReLU units per hidden layer"""
    batch_size: int = 60
    """images per step"""
    steps: int = 1000
    """updates per run"""
    learning_rate: float = 0.01
    """learning rate of plain stochastic gradient descent"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 2:
            raise data.InputError(f"depth={self.depth}: expected 2 or more, for a slope.")

    def runs(self, dataset: data.Dataset) -> records.Runs:
        return {name: self._fit(dataset, *NETWORKS[name]) for name in NETWORKS}

    def _fit(self, dataset, batch_norm, weight_std):
        network = networks.mlp(dataset, [self.width] * self.depth, batch_norm, weight_std, activation=jax.nn.relu)
        images, labels = (jnp.asarray(x[:500]) for x in (data.flat(dataset.train_images), dataset.train_labels))

        def probe(params, state):
            def loss(added):
                each = iter(added)
                moved = partial(network.apply, activation=lambda x: jax.nn.relu(x) + next(each))
                return train.cross_entropy(moved, params, state, images, labels)

            gradient = jax.grad(loss)([jnp.zeros((len(images), self.width))] * self.depth)
            return {"gradient_norm": jnp.stack([jnp.linalg.norm(each) for each in gradient])}

        return self.fit(*network, dataset, probe=probe)

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        slopes = {name: _slopes(series["gradient_norm"]) for name, series in metrics.items()}
        start, end = np.moveaxis(slopes["batch normalization"], 1, 0)
        words = {
            name: [records.spread(slope, "+.3f", "underflow") for slope in np.moveaxis(each, 1, 0)]
            for name, each in slopes.items()
        }
        accuracy = {name: records.spread(series["test_accuracy"][:, -1], ".2f") for name, series in metrics.items()}
        described = "; ".join(
            f"{name}: {words[name][0]} at the start, {words[name][1]} after training to a test accuracy of "
            f"{accuracy[name]}"
            for name in metrics
        )
        way = "explode" if start.mean() < 0 else "vanish"
        return study.Finding(
            f"decades a layer towards the output: {described}",
            (study.clearly(LEVEL - abs(start)), study.clearly(LEVEL - abs(end))),
            f"With batch normalization gradients {way} towards the input at the start, by "
            f"{10 ** (self.depth * abs(start.mean())):.0e} over {self.depth} layers; after {self.steps} steps they "
            f"change by {10 ** (self.depth * abs(end.mean())):.0e}",
            [
                ["network", "start, decades a layer", "after training", "test accuracy"],
                *([name, *words[name], accuracy[name]] for name in metrics),
            ],
        )

    def draw(self, path, metrics, title):
        colours = dict(zip(NETWORKS, (plot.ORANGE, plot.VERMILION, plot.BLUE), strict=True))
        with plot.figure(path, title, panels=2, sharey=True) as panels:
            for i, (axes, when) in enumerate(zip(panels, ("at the start", f"after {self.steps} steps"), strict=True)):
                series = {
                    name: (1 + np.arange(values["gradient_norm"].shape[2]), values["gradient_norm"][:, i])
                    for name, values in metrics.items()
                }
                plot.curves(axes, series, colours, xlabel="layer, from the input")
                axes.set_yscale("log")
                axes.set_title(when, fontsize=10)
            panels[0].set_ylabel("norm of the gradient in a layer's output")
            plot.legend(panels[0], self.seeds)


def _slopes(norms: np.ndarray) -> np.ndarray:
    """The slope in decades per layer, of shape (seeds, evaluations), of norms of shape (seeds, evaluations, layers)."""
    layer = np.arange(norms.shape[2]) - (norms.shape[2] - 1) / 2
    return np.log10(np.where(norms > 0, norms, np.nan)) @ layer / (layer @ layer)
