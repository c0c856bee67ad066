"""Training with and without batch normalization: a demonstration, on any number of devices and processes.

The default network is that of Ioffe & Szegedy (2015, section 4.1), with hidden layers of 100 sigmoid units, batches of
60, and batch normalization before each nonlinearity. Whether batch-normalized networks converge faster is a claim,
which `experiments.claims.convergence` judges; this demonstration shows the curves of one setting.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import optax
from tqdm import tqdm

from experiments.harness import checkpoints, curves, data, plot, records, runs, runtime, study, train
from experiments.harness.runtime import Runtime
from experiments.models import flax_networks, networks

NAME = "train"
NETWORKS = ("plain", "batch normalization")


@dataclass(frozen=True)
class Training:
    """The configuration of the experiment. Its fields are the flags of the command line."""

    network: Literal["sigmoid"] | flax_networks.Name = "sigmoid"
    """the paper's network in pure functions; 784-256-128-10 with ReLU in Linen or NNX; or a small ResNet"""
    hidden: tuple[int, ...] = (100, 100, 100)
    """sigmoid units per hidden layer"""
    batch_size: int = 60
    """images per step"""
    steps: int = 10_000
    """updates per run"""
    learning_rate: float | None = None
    """learning rate of plain stochastic gradient descent; by default 1 for the sigmoid network, and 0.1 for others"""
    weight_std: float = 0.1
    """standard deviation of the sigmoid network's initial kernels"""
    momentum: float = 0.9
    """weight of the old value in the running statistics"""
    eval_every: int = 50
    """steps between evaluations on the test set"""
    seeds: int = 5
    """number of runs of each network"""
    dataset: data.Name = "digits"
    """digits of scikit-learn, or a data set that is downloaded from its publisher"""
    data_dir: Path | None = None
    """folder of the four IDX files of (Fashion-)MNIST or of the binary files of CIFAR-10, instead of a download"""
    out: Path = Path("results")
    """folder for config.json, metrics.jsonl and the figure, in a folder of their own"""
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        records.check_positive(self, "hidden", "batch_size", "steps", "weight_std", "eval_every", "seeds")
        if self.learning_rate is not None:
            records.check_positive(self, "learning_rate")
        if not 0 <= self.momentum <= 1:
            raise data.InputError(f"momentum={self.momentum}: expected a number in [0, 1].")


def run(config: Training) -> None:
    """Train with and without batch normalization, on any number of devices and processes."""
    dataset = data.load(config.dataset, config.data_dir)
    config.runtime.start()
    begun, folder, facts = time.perf_counter(), config.out / NAME, {"dataset": dataset.name}
    fits = _fits(config, dataset)  # invalid input raises here, before anything is printed or written
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1, bar_format=form, mininterval=0.5, disable=not runtime.is_primary()) as bar:

        def tell(progress: float, remark: str) -> None:
            bar.update(progress)
            bar.set_postfix_str(remark, refresh=False)

        records.write_run(folder, config, dataset, fits, tell)
    if runtime.is_primary():
        facts |= {"dataset_sha256": dataset.sha256()}
        records.write_config(folder, config, **facts, seconds=round(time.perf_counter() - begun, 1))
        metrics = records.read_metrics(folder)
        print(study.table(rows(metrics)))
        print(f"figure: {draw(folder / f'{NAME}.png', metrics, config.seeds)}")


def _fits(config: Training, dataset: data.Dataset) -> records.Runs:
    """The evaluations of both networks."""
    saved = checkpoints.claim(config, NAME, dataset)
    learning_rate = config.learning_rate or (1.0 if config.network == "sigmoid" else 0.1)
    return {
        name: train.fit(
            *_network(config, dataset, batch_norm=name != "plain"),
            partial(optax.sgd, learning_rate),
            dataset,
            seeds=config.seeds,
            steps=config.steps,
            batch_size=config.batch_size,
            eval_every=config.eval_every,
            runtime=config.runtime,
            checkpoints=saved and saved / name.replace(" ", "-"),
        )
        for name in NETWORKS
    }


def _network(config: Training, dataset: data.Dataset, batch_norm: bool) -> networks.Network:
    if config.network != "sigmoid":
        shape = dataset.train_images.shape[1:]
        return flax_networks.build(config.network, shape, dataset.classes, batch_norm, momentum=config.momentum)
    weights, options = networks.constant(config.weight_std), {"momentum": config.momentum}
    return networks.mlp(dataset, config.hidden, batch_norm, weights, activation=jax.nn.sigmoid, **options)


def rows(metrics: dict[str, runs.Series]) -> list[list[str]]:
    """The table of the results, with its header."""
    found = [["network", f"steps to a test accuracy of {curves.ACCURACY:g}", "loss at the end", "final test accuracy"]]
    for name in NETWORKS:
        series = metrics[name]
        steps = curves.reached(series.steps, curves.smoothed(series["test_accuracy"]), curves.ACCURACY)
        last = [records.spread(series[value][:, -1], ".4f") for value in ("loss", "test_accuracy")]
        found.append([name, records.spread(steps, ".0f", "never"), *last])
    return found


def draw(path: Path, metrics: dict[str, runs.Series], seeds: int) -> Path:
    """Draw the curves of training loss and test accuracy."""
    with plot.figure(path, "Training loss and test accuracy, with and without batch normalization", 2) as panels:
        for axes, name, label in zip(
            panels, ("loss", "test_accuracy"), ("training loss", "test accuracy"), strict=True
        ):
            # There is no training loss before the first step.
            plot.curves(axes, {each: (metrics[each].steps[1:], metrics[each][name][:, 1:]) for each in NETWORKS})
            axes.set_ylabel(label)
        panels[0].set_yscale("log")
        panels[1].set_ylim(0, 1.02)
        plot.legend(panels[0], seeds)
    return path
