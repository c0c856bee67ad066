"""Claim: a batch-normalized network trains faster (Ioffe & Szegedy, 2015, section 4.1 and figure 1a).

The paper's network, three hidden layers of 100 sigmoid units trained in batches of 60, with and without batch
normalization before each nonlinearity; everything else is equal. Measured: the steps that each network takes to the
plain network's best test accuracy, and the accuracy at the end.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import optax

from experiments import checkpoints, data, networks, plot, records, train
from experiments.runtime import Runtime, is_primary


@dataclass(frozen=True)
class Convergence:
    """One run of the experiment; the command line's flags are these fields."""

    hidden: tuple[int, ...] = (100, 100, 100)
    """sigmoid units per hidden layer"""
    batch_size: int = 60
    """images per step"""
    steps: int = 10_000
    """updates per run"""
    learning_rate: float = 1.0
    """of plain stochastic gradient descent, the same for both networks: the best of 0.1, 0.3, 1, 3 for the plain one"""
    weight_std: float = 0.1
    """standard deviation of the initial kernels, the same for both networks"""
    momentum: float = 0.99
    """weight of the old value in the running statistics"""
    seeds: int = 5
    """runs per network, trained together"""
    eval_every: int = 50
    """steps between evaluations on the test set"""
    data_dir: Path | None = None
    """folder of the four IDX files of MNIST or Fashion-MNIST; by default scikit-learn's digits"""
    out: Path = Path("results")
    """folder for config.json, metrics.jsonl and the figure, in a folder of their own"""
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        records.check_positive(
            self, "hidden", "batch_size", "steps", "learning_rate", "weight_std", "seeds", "eval_every"
        )
        if not 0 <= self.momentum <= 1:
            raise data.InputError(f"momentum={self.momentum}: expected a number in [0, 1].")


def run(config: Convergence) -> None:
    """Training with and without batch normalization: steps to the plain network's best test accuracy."""
    dataset = data.load(config.data_dir)
    config.runtime.start()
    saved = checkpoints.claim(config, "convergence", dataset)
    sizes = (dataset.train_images[0].size, *config.hidden, dataset.classes)
    runs = {
        network: train.fit(
            partial(networks.mlp_init, sizes=sizes, weight_std=config.weight_std, batch_norm=network != "plain"),
            partial(networks.mlp_apply, momentum=config.momentum),
            optax.sgd(config.learning_rate),
            dataset,
            seeds=config.seeds,
            steps=config.steps,
            batch_size=config.batch_size,
            eval_every=config.eval_every,
            runtime=config.runtime,
            checkpoints=saved and saved / network.replace(" ", "-"),
        )
        for network in plot.COLOURS
    }
    folder = config.out / "convergence"
    records.write_run(folder, config, dataset, runs, config.steps)
    if is_primary():
        print(report(folder))


def report(folder: Path) -> str:
    """The table of a finished run, whose figure is drawn beside it."""
    curves = records.read_curves(folder)
    best = np.fmax.reduce(curves["plain"][1], axis=1)  # nan only where all evaluations are
    reached = {network: _first(steps, accuracy, best) for network, (steps, accuracy) in curves.items()}
    plain, normalized = reached.values()
    if np.isnan(normalized).any():
        title = f"{np.isnan(normalized).sum()} of {best.size} normalized networks never reach the plain network's best"
    else:
        title = (
            "The plain network's best accuracy: reached with batch normalization after "
            f"{normalized.mean():.0f} steps, without after {plain.mean():.0f}"
        )
    path = folder / "convergence.png"
    plot.curves(path, curves, title=title, ylabel="test accuracy", target=float(best.mean()))
    rows = [
        f"{name:22}{records.spread(reached[name], '.0f', 'never'):>26}{records.spread(accuracy[:, -1], '.4f'):>24}"
        for name, (_, accuracy) in curves.items()
    ]
    return "\n".join(
        [
            f"{'network':22}{'steps to the plain best':>26}{'final test accuracy':>24}",
            *rows,
            f"seeds: {best.size}, mean ± standard deviation; "
            f"the plain network's best test accuracy, each seed's own, is {records.spread(best, '.4f')}",
            f"figure: {path}",
        ]
    )


def _first(steps: np.ndarray, accuracy: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Per seed the first step with an accuracy of the target or more, nan where there is none."""
    hit = accuracy >= target[:, None]
    return np.where(hit.any(1), steps[hit.argmax(1)], np.nan)
