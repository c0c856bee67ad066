"""Claim: averaged weights need their own statistics (Izmailov et al., 2018, section 3.2; Wu & Johnson, 2021).

A deep network is trained at a constant learning rate, and `optax.ema` averages its weights. The running statistics come
from the weights during training; the averaged weights were never run in training mode. The experiment measures accuracy
and cross-entropy on the test set for the last weights, the averaged weights with the running statistics, and the
averaged weights after `bnjax.recalibrate`.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax import Array
from tqdm import trange

import bnjax
import bnjax.linen
from bnjax.training import TrainState, train_step
from experiments.harness import data, records


@dataclass(frozen=True)
class Averaging:
    """The configuration of the experiment. Its fields are the flags of the command line."""

    depth: int = 10
    """hidden layers"""
    width: int = 100
    """units per hidden layer"""
    batch_size: int = 60
    """images per step, and per batch of the recalibration"""
    steps: int = 1000
    """updates per run"""
    learning_rate: float = 1.0
    """learning rate of plain stochastic gradient descent"""
    decay: float = 0.999
    """weight of the old value in the debiased average of the weights"""
    momentum: float = 0.9
    """weight of the old value in the running statistics"""
    seeds: int = 5
    """number of runs"""
    data_dir: Path | None = None
    """folder of the four IDX files of MNIST or Fashion-MNIST; by default scikit-learn's digits"""
    out: Path = Path("results")
    """folder for config.json and evaluations.json, in a folder of their own"""

    def __post_init__(self) -> None:
        records.check_positive(self, "depth", "width", "batch_size", "steps", "learning_rate", "seeds")


class Network(nn.Module):
    """Dense layers with batch normalization and ReLU."""

    depth: int
    width: int
    classes: int
    momentum: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for _ in range(self.depth):
            x = nn.Dense(self.width, use_bias=False)(x)
            x = nn.relu(bnjax.linen.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
        return nn.Dense(self.classes)(x)


def run(config: Averaging) -> None:
    """Averaged weights with running statistics, and with recalibrated ones."""
    dataset = data.load(data_dir=config.data_dir)
    network = Network(config.depth, config.width, dataset.classes, config.momentum)
    runs = [_evaluations(config, network, dataset, seed) for seed in trange(config.seeds, unit="seed")]
    folder = config.out / "averaging"
    records.write_config(folder, config, dataset=dataset.name)
    (folder / "evaluations.json").write_text(json.dumps(runs, indent=1) + "\n")
    print(f"{'weights':44}{'test accuracy':>20}{'test cross-entropy':>22}")
    for way in runs[0]:
        accuracy, loss = (np.array([evaluations[way][i] for evaluations in runs]) for i in (0, 1))
        print(f"{way:44}{records.spread(accuracy, '.4f'):>20}{records.spread(loss, '.4f'):>22}")
    print(f"seeds: {config.seeds}, mean ± standard deviation")


def _evaluations(config: Averaging, network: Network, dataset: data.Dataset, seed: int) -> dict[str, list[float]]:
    """Accuracy and cross-entropy on the test set, by weights and statistics."""
    images, test = map(data.flat, (dataset.train_images, dataset.test_images))
    variables = network.init(jax.random.key(seed), images[:1], False)
    state = TrainState.create(apply_fn=network.apply, tx=optax.sgd(config.learning_rate), **variables)
    ema = optax.ema(config.decay)
    averaged, memory = state.params, ema.init(state.params)
    step, average = train_step(_loss), jax.jit(ema.update)
    indices, _ = data.batches(len(images), config.batch_size, seed, 0, config.steps, config.batch_size)
    for batch in indices:
        state, _ = step(state, {"x": images[batch], "label": dataset.train_labels[batch]})
        averaged, memory = average(state.params, memory)

    last = {"params": state.params, "batch_stats": state.batch_stats}
    stale = {**last, "params": averaged}
    cuts = range(config.batch_size, len(images), config.batch_size)
    fresh = bnjax.recalibrate(partial(network.apply, train=True), stale, np.split(images, cuts))

    def evaluate(variables: Any) -> list[float]:
        logits: Any = network.apply(variables, test, False)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, dataset.test_labels)
        return [float(np.mean(logits.argmax(-1) == dataset.test_labels)), float(loss.mean())]

    ways = {"last": last, "averaged, running statistics": stale, "averaged, recalibrated statistics": fresh}
    return {way: evaluate(variables) for way, variables in ways.items()}


def _loss(model, batch, train):
    logits = model(batch["x"], train)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
