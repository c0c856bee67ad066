"""Batch normalization regularizes, and less dropout is needed (Ioffe & Szegedy, 2015, sections 3.4 and 4.2.1).

ReLU networks with and without batch normalization are trained on little data: without a regularizer, with dropout, with
an L1 penalty, with an L2 penalty, and with dropout and L2, all five of a network in one vmap. The experiment measures
the accuracy on the training set and on the test set, and the gap between them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import data, plot, records, study, train
from experiments.models import networks

ALIKE = 0.003
NETWORKS = ("plain", "BN")
REGULARIZERS = ("nothing", "dropout", "L1", "L2", "dropout + L2")


def l1_and_l2(learning_rate: float, l1: jax.Array, l2: jax.Array) -> optax.GradientTransformation:
    """Gradient descent on the loss with l1 |w| + l2 w^2 / 2 for every weight of a kernel."""

    def penalize(path, gradient, weight):
        return gradient + l1 * jnp.sign(weight) + l2 * weight if "kernel" in str(path[-1]) else gradient

    penalty = optax.stateless(lambda updates, params: jax.tree.map_with_path(penalize, updates, params))
    return optax.chain(penalty, optax.sgd(learning_rate))


@dataclass(frozen=True)
class Regularization(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "regularization"
    CLAIM = "batch normalization regularizes, so that less dropout is needed"
    SOURCE = "Ioffe & Szegedy (2015), sections 3.4 and 4.2.1"
    THRESHOLD = (
        f"on little data, {study.CLEARLY}: (a) without a regularizer the gap is smaller with batch normalization; "
        "(b) dropout adds less test accuracy with batch normalization than without; (c) batch normalization alone "
        f"tests as well as the plain network with dropout, to {ALIKE} (an image of the digits' 360)"
    )
    SMOKE = {"hidden": (30,), "steps": 200, "seeds": 2}
    FULL = {"steps": 10_000, "seeds": 40}

    images: int = 200
    """images in the training set"""
    hidden: tuple[int, ...] = (256, 128)
    """ReLU units per hidden layer"""
    batch_size: int = 50
    """images per step"""
    steps: int = 1500
    """updates per run"""
    learning_rate: float = 0.1
    """learning rate of plain stochastic gradient descent"""
    dropout: float = 0.5
    """fraction of the hidden units that is dropped"""
    l1: float = 3e-4
    """weight of the sum of absolute weights"""
    l2: float = 3e-3
    """weight of half the sum of squared weights"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout >= 1:
            raise data.InputError(f"dropout={self.dropout}: expected a number in (0, 1).")

    def _names(self, network):
        return tuple(f"{network}, {regularizer}" for regularizer in REGULARIZERS)

    def runs(self, dataset: data.Dataset) -> records.Runs:
        dataset = dataset.subset(min(self.images, len(dataset.train_images)))
        settings = [
            {
                "dropout": self.dropout * ("dropout" in regularizer),
                "l1": self.l1 * (regularizer == "L1"),
                "l2": self.l2 * ("L2" in regularizer),
            }
            for regularizer in REGULARIZERS
        ]
        return {self._names(name): self._fit(dataset, name == "BN", settings) for name in NETWORKS}

    def _fit(self, dataset, batch_norm, settings):
        network = networks.mlp(dataset, self.hidden, batch_norm)

        def init(key, dropout, l1, l2):
            params, state = network.init(key)
            return params, (state, jax.random.fold_in(key, 100), jnp.float32(dropout))

        def apply(params, state, x, train, **options):
            bn_state, key, rate = state
            keys = iter(jax.random.split(key, 1 + len(params)))

            def activation(x):
                x = jax.nn.relu(x)
                return jnp.where(jax.random.uniform(next(keys), x.shape) < rate, 0, x / (1 - rate)) if train else x

            key = next(keys)
            logits, bn_state = network.apply(params, bn_state, x, train, activation=activation, **options)
            return logits, (bn_state, key, rate)

        return self.fit(
            init,
            apply,
            dataset,
            optimizer=lambda dropout, l1, l2: l1_and_l2(self.learning_rate, l1, l2),
            settings=settings,
            probe=train.probe_accuracy(apply, dataset),
        )

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        trained = {name: series["train_accuracy"][:, -1] for name, series in metrics.items()}
        tested = {name: series["test_accuracy"][:, -1] for name, series in metrics.items()}
        gap = {name: trained[name] - tested[name] for name in metrics}
        gain = {network: tested[f"{network}, dropout"] - tested[f"{network}, nothing"] for network in NETWORKS}
        rows = [[name, *(records.spread(each[name], ".3f") for each in (trained, tested, gap))] for name in metrics]
        gaps = [records.spread(gap[f"{network}, nothing"], ".3f") for network in NETWORKS]
        gains = [records.spread(gain[network], "+.3f") for network in NETWORKS]
        lead = tested["BN, nothing"] - study.lower(tested["plain, dropout"])
        met = (
            study.clearly(gap["plain, nothing"] - gap["BN, nothing"]),
            study.clearly(gain["plain"] - gain["BN"]),
            study.clearly(lead, -ALIKE),
        )
        return study.Finding(
            f"gap {gaps[1]} with batch normalization alone, {gaps[0]} plain; dropout adds {gains[1]} to the test "
            f"accuracy with batch normalization, {gains[0]} without; batch normalization alone is "
            f"{records.spread(lead, '+.3f')} from plain with dropout",
            met,
            f"On {self.images} images batch normalization {'narrows' if met[0] else 'does not narrow'} the gap "
            f"({gaps[1]}, plain {gaps[0]}), and {'makes dropout' if met[1] else 'does not make dropout'} less needed",
            [["network", "training accuracy", "test accuracy", "gap"], *rows],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title) as axes:
            for offset, network, colour in zip((-0.12, 0.12), NETWORKS, (plot.VERMILION, plot.BLUE), strict=True):
                label = "batch normalization" if network == "BN" else network
                for key, marker in (("train_accuracy", "^"), ("test_accuracy", "o")):
                    values = np.stack([metrics[name][key][:, -1] for name in self._names(network)], 1)
                    places = np.arange(len(REGULARIZERS)) + offset
                    axes.vlines(places, values.min(0), values.max(0), color=colour, alpha=0.4, linewidth=4)
                    what = "training" if key == "train_accuracy" else "test"
                    face = "white" if key == "train_accuracy" else colour
                    axes.plot(
                        places, values.mean(0), marker, color=colour, markerfacecolor=face, label=f"{label}: {what}"
                    )
            axes.set_xticks(range(len(REGULARIZERS)), REGULARIZERS)
            axes.set_ylabel("accuracy")
            plot.legend(axes, self.seeds, loc="upper left", bbox_to_anchor=(1, 1))
