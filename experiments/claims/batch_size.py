"""Small batches hurt batch normalization (Ioffe, 2017; Wu & He, 2018), and some remedies help.

ReLU networks are trained in batches of 2 to 256 on the same number of images, at learning rates in proportion to the
images of a step. The methods are batch normalization; batch renormalization (Ioffe, 2017); ghost batches of 16 (Hoffer
et al., 2017), for larger batches; statistics synchronized over 4 devices, each with a batch of the given size; and
recalibration, which replaces the running statistics by the moments of the training set. The test error is measured.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnjax
from experiments.harness import data, plot, records, runtime, study, train
from experiments.models import networks

WORSE, SMALL, USUAL, GHOST = 1.4, 2, 32, 16
METHODS = ("batch normalization", "renormalization", "ghost", "synchronized", "recalibrated")
REMEDIES = ("renormalization", "synchronized", "recalibrated")


def renormalize(steps: int):
    """Batch renormalization whose bounds open during the first quarter of training, as in the paper's schedule."""
    opening = {"start": steps // 20, "stop": steps // 4 + 1}
    return partial(
        bnjax.renorm_bn_apply, r_max=bnjax.linear_ramp(1, 3, **opening), d_max=bnjax.linear_ramp(0, 5, **opening)
    )


@dataclass(frozen=True)
class BatchSize(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "batch-size"
    CLAIM = "small batches hurt batch normalization, and there are remedies"
    SOURCE = "Ioffe (2017), section 4; Wu & He (2018), figure 1 and table 2"
    THRESHOLD = (
        f"{study.CLEARLY}: (a) the test error in batches of {SMALL} is at least {WORSE} times that in batches of "
        f"{USUAL}: in Wu & He's table it is 34.7% after 23.6%, 1.47 times; in batches of {SMALL} it is lower with "
        "(b) renormalization, (c) synchronized statistics, (d) recalibration"
    )
    SMOKE = {"hidden": (30,), "images": 1437, "seeds": 2, "batch_sizes": (2, 32)}
    FULL = {"images": 143_700, "seeds": 20}

    hidden: tuple[int, ...] = (100, 100)
    """ReLU units per hidden layer"""
    batch_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    """images in a batch of one device; 2 and 32 are judged"""
    images: int = 28_740
    """images that each network is trained on, repetitions included; by default 20 times the digits"""
    learning_rate: float = 0.1
    """learning rate of plain stochastic gradient descent for steps of 32 images; it is proportional to the images"""
    momentum: float = 0.9
    """weight of the old value in the running statistics for steps of 32 images. For n images it is momentum^(n / 32),
    so that the statistics remember the same number of images for every batch size"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {SMALL, USUAL} <= {*self.batch_sizes}:
            raise data.InputError(f"batch_sizes={self.batch_sizes}: expected {SMALL} and {USUAL} among them.")

    def prepare(self) -> None:
        runtime.provide_devices()

    def runs(self, dataset: data.Dataset) -> records.Runs:
        return {
            f"{method}, {size}": self._fit(dataset, method, size)
            for method in METHODS[:-1]
            for size in self.batch_sizes
            if size <= len(dataset.train_images) and not (method == "ghost" and size <= GHOST)
        }

    def _fit(self, dataset, method, size):
        images, tests = (jnp.asarray(data.flat(x)) for x in (dataset.train_images, dataset.test_images))
        synchronized = method == "synchronized"
        batch_size = min(size * runtime.SEVERAL if synchronized else size, len(images))
        steps = -(-self.images // batch_size)
        normalize = {"renormalization": renormalize(steps), "ghost": partial(bnjax.ghost_bn_apply, ghost_size=GHOST)}
        options: dict[str, Any] = {"activation": jax.nn.relu, "normalize": normalize.get(method, bnjax.bn_apply)}
        momentum = self.momentum ** (batch_size / USUAL)
        init, apply = networks.mlp(dataset, self.hidden, True, momentum=momentum, **options)

        def recalibrated(params, state):
            # This is bnjax.recalibrate with one batch: with momentum 0 the batch statistics replace the running ones.
            _, state = networks.mlp_apply(params, state, images, True, momentum=0.0, **options)
            tested = train.accuracy(apply, params, state, tests, jnp.asarray(dataset.test_labels))
            return {"recalibrated_accuracy": tested}

        return self.fit(
            init,
            apply,
            dataset,
            optimizer=partial(optax.sgd, self.learning_rate * batch_size / USUAL),
            steps=steps,
            batch_size=batch_size,
            probe=recalibrated if method == "batch normalization" else None,
            runtime=runtime.several("shard_map") if synchronized else runtime.Runtime(devices=1),
        )

    def _errors(self, metrics):
        """By method, the batch sizes, and the errors of shape (seeds, batch sizes)."""
        errors = {}
        for method in METHODS:
            recalibrated = method == "recalibrated"
            name, key = (METHODS[0], "recalibrated_accuracy") if recalibrated else (method, "test_accuracy")
            sizes = [size for size in self.batch_sizes if f"{name}, {size}" in metrics]
            errors[method] = (
                np.array(sizes),
                np.array([1 - metrics[f"{name}, {size}"][key][:, -1] for size in sizes]).reshape(len(sizes), -1).T,
            )
        return errors

    def judge(self, metrics: dict[str, records.Series]) -> study.Finding:
        error = {
            (method, size): values[:, i]
            for method, (sizes, values) in self._errors(metrics).items()
            for i, size in enumerate(sizes)
        }
        words = {key: records.spread(values, ".3f") for key, values in error.items()}
        small, usual = error[METHODS[0], SMALL], error[METHODS[0], USUAL]
        helps = [method for method in REMEDIES if study.clearly(small - error[method, SMALL])]
        remedies = ", ".join(f"{words[method, SMALL]} {method}" for method in REMEDIES)
        return study.Finding(
            f"test error {words[METHODS[0], SMALL]} in batches of {SMALL}, {words[METHODS[0], USUAL]} in batches of "
            f"{USUAL}; in batches of {SMALL} {remedies}",
            (study.clearly(small - WORSE * usual), *(method in helps for method in REMEDIES)),
            f"Batches of {SMALL} have {np.mean(small) / np.mean(usual):.1f} times the error of batches of {USUAL}; "
            f"{', '.join(helps) or 'nothing'} help{'s' if len(helps) < 2 else ''}",
            [
                ["batch size", *METHODS],
                *([str(size), *(words.get((method, size), "") for method in METHODS)] for size in self.batch_sizes),
            ],
        )

    def draw(self, path, metrics, title):
        with plot.figure(path, title) as axes:
            plot.curves(
                axes,
                self._errors(metrics),
                dict(zip(METHODS, plot.PALETTE, strict=False)),
                markers=True,
                xlabel="images in a batch (of each device, if synchronized)",
            )
            axes.set(xscale="log", yscale="log", ylabel="test error")
            plot.ticks(axes, list(self.batch_sizes))
            plot.legend(axes, self.seeds)
