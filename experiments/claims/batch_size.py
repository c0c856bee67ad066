"""Small batches hurt batch normalization, and there are remedies (Ioffe, 2017; Wu & He, 2018; Hoffer et al., 2017).

A network of four convolutions sees the same number of images in batches of 2 to 128. Without statistics over the batch,
small batches only mean noisier gradients: group normalization (Wu & He, 2018) is the arm that shows how much that
changes. The remedies are renormalization (Ioffe, 2017), ghost batches of 16 in larger ones (Hoffer et al., 2017), and
statistics synchronized over 4 devices, each with a batch of the given size. Recalibration, which replaces the running
statistics of the trained network by the moments of 500 training images, is reported besides.

The training images are shifted, rotated and scaled at random in every step, and so are the test images, twice
each. Like the papers' networks on ImageNet, those here do not memorize their images; otherwise the noise of small
batches would prevent overfitting, and would help.

The test error of a run is (wrong + 1/2) / (images + 1), so that ratios exist for a run without a mistake. A diverged
network answers with the first class.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import data, headline, lab, plot, protocol, records, report, runs, scores, stream, study
from experiments.models import networks, normalizers

SMALL, USUAL, LARGE, GHOST, DEVICES = 2, 32, 128, 16, 4
COPIES = 2
"""The number of times that each test image is moved."""
ARMS = {
    "plain": normalizers.identity,
    "group normalization": normalizers.group,
    "batch normalization": normalizers.batch,
    "renormalized": normalizers.renormalized,
    "synchronized": partial(normalizers.synchronized, devices=DEVICES),
    "ghost": partial(normalizers.ghost, ghost_size=GHOST),
}
BN, GN = "batch normalization", "group normalization"
RULES = {"scaled": "the linearly scaled rate", "tuned": "its own best rate"}
LAYERS = ((8, 1), (16, 2), (32, 2), (32, 1))
"""Channels and strides of the convolutions."""
WU = "34.7% / 23.6% = 1.47 (Wu & He, table 2)"
REMEDIES = {
    GN: "34.7% / 24.1% = 1.44 (Wu & He, table 2)",
    "renormalized": "27.3% / 26.3% = 1.04 at 4 images (Wu & He, section 4.1, after Ioffe, 2017)",
    "synchronized": "",
}


def _parts():
    for rule, words in RULES.items():
        error = f"test error in batches of {SMALL} / in batches of {USUAL}"
        yield protocol.Part(
            f"small batches, {rule}",
            f"{error}, batch normalization, at {words}",
            1.0,
            "small batches hurt if their error is higher",
            paper=WU if rule == "scaled" else "",
            margin=protocol.TENTH,
        )
        yield protocol.Part(
            f"more than group normalization, {rule}",
            f"{error}, of batch normalization over that of group normalization, at {words}",
            1.0,
            "what hurts group normalization as well is not the batch's statistics",
            paper="1.47 / (24.1% / 24.1%) = 1.47 (Wu & He, table 2)" if rule == "scaled" else "",
            margin=protocol.TENTH,
        )
    for arm, paper in REMEDIES.items():
        yield protocol.Part(
            f"remedy, {arm}",
            f"test error in batches of {SMALL}, batch normalization / {arm}, each at its own best rate",
            1.0,
            "a remedy has a lower error",
            paper=paper,
            margin=protocol.TENTH,
        )
    yield protocol.Part(
        "remedy for large batches, ghost",
        f"test error in batches of {LARGE}, batch normalization / ghost batches of {GHOST}, each at its own best rate",
        1.0,
        "a remedy has a lower error",
        margin=protocol.TENTH,
    )


def grid(size: int) -> tuple[float, ...]:
    """The learning rates for steps of a size: from 0.01 to 3.16 for 2 images, and half a decade higher for four times
    the images."""
    low = 10 ** (-2 + np.log(size / SMALL) / np.log(16))
    return lab.half_decades(low, 10**2.5 * low)


@dataclass(frozen=True)
class BatchSize(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "batch-size"
    CLAIM = "small batches hurt batch normalization, and there are remedies"
    # Each batch size at its own best rate, so that the rate is not the reason.
    HEADLINE = headline.Headline(
        "small batches, tuned", "{} test error in batches of 2 than in batches of 32", "in batches of 2", "height"
    )
    QUESTION = (
        "Is the test error in batches of 2 higher than in batches of 32, more so than with group normalization, and do "
        "renormalization, synchronized statistics and ghost batches lower it?"
    )
    SOURCE = "Ioffe (2017), section 4; Wu & He (2018), figure 1 and table 2; Hoffer et al. (2017), table 1"
    PROTOCOL = (
        "A network of four convolutions with ReLU sees the same number of images, shifted, rotated and scaled at "
        "random, in batches of different sizes, and is tested on images that are moved in the same way. The learning "
        "rate falls linearly to 0. Each "
        "normalization's learning rate is chosen for each size by the validation accuracy; the linearly scaled rate is "
        "the best one for batches of 32, in proportion to the images of a step. The running statistics remember the "
        "same number of images for every size. Synchronized statistics cover 4 devices, each with a batch of "
        "the given size; ghost batches are groups of 16 in a larger batch. The ratio of test errors is taken within "
        "each seed."
    )
    WOULD_CHANGE = (
        "Larger images in the last layers give each channel more values in a small batch, though correlated ones. "
        "Group normalization has a higher error in batches of 32 than of 2, perhaps because batches of 32 make fewer "
        "steps of the same number of images. Longer training would then bring the ratio to group normalization nearer "
        "to the ratio of batch normalization by itself. On images that do not move, the noise of small batches "
        "prevents overfitting, and hurts less. Recalibrated running statistics remove the part of the error that the "
        "average over noisy batches causes."
    )
    PARTS = (*_parts(),)
    CHANGES = (
        report.Change(
            "2026-11-27",
            "A fully connected network, in which a batch of 2 leaves each unit nothing but a sign, was replaced by a "
            "convolutional one; plain and group-normalized arms were added, so that the noise of small batches is not "
            "taken for a fault of the normalization; each size has its own tuned rate besides the scaled one; no batch "
            "of one is left over; and the threshold of 1.4, set after a first result, is 1. After pilots of 3 seeds "
            "the rate falls to 0, and the images move. Still images gave equal errors at 2 and at 32 images, on the "
            "digits and on MNIST (0.017 and 0.016, 0.06 and 0.066): the noise of small batches makes up there for what "
            "it costs, by preventing overfitting, which the networks of the papers did not do.",
            "1000 to 1009",
        ),
        study.again(
            "The grids of learning rates reach half a decade higher and begin half a decade higher, because the best "
            "rates for 2 images were at their upper edge. Networks see twice as many images, because the error with "
            "group normalization was higher in batches of 32 than of 2: the 384 steps in batches of 32 may be too few. "
            "It is still higher."
        ),
    )
    SMOKE = {
        "images": 512,
        "seeds": 2,
        "train_images": 256,
        "sizes": (SMALL, USUAL, LARGE),
        "layers": 1,
        "together": True,
    }
    FULL = {"seeds": 20, "images": 327_680, "train_images": None, "together": True}

    sizes: tuple[int, ...] = (2, 8, 32, 128)
    """images in a batch of one device; 2, 32 and 128 are judged"""
    layers: int = len(LAYERS)
    """convolutions of the network"""
    images: int = 24_576
    """images that each network is trained on, repetitions included"""
    train_images: int | None = 1024
    """training images of a seed, of which the largest batch is a divisor, so that all batches are full; None
    takes as many as there are"""
    momentum: float = 0.9
    """weight of the old value in the running statistics for steps of 32 images. For n images it is momentum^(n / 32),
    so that the statistics remember the same number of images for every batch size"""
    together: bool = False
    """train the normalizations of a size in one program, which suits a device that many small kernels leave idle"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {SMALL, USUAL, LARGE} <= {*self.sizes}:
            raise data.InputError(f"sizes={self.sizes}: expected {SMALL}, {USUAL} and {LARGE} among them.")
        steps = {size for sizes in self._methods().values() for size in sizes.values()}
        if any(number % size for number in (self.images, self.train_images or 0) for size in steps):
            raise data.InputError(
                f"images={self.images}, train_images={self.train_images}: expected multiples of all batch sizes "
                f"{sorted(steps)}, because a smaller batch at the end would have other statistics."
            )

    def _methods(self) -> dict[str, dict[int, int]]:
        """By arm, the sizes of its batches, and of its steps."""
        sizes = {arm: {size: size for size in self.sizes} for arm in ARMS}
        sizes["synchronized"] = {size: DEVICES * size for size in self.sizes if DEVICES * size <= max(self.sizes)}
        sizes["renormalized"] = {size: size for size in self.sizes if size <= USUAL}  # a remedy for small batches
        sizes["ghost"] = {size: size for size in self.sizes if size > USUAL}  # and one for large ones
        return sizes

    def measure(self, lab: lab.Lab) -> None:
        methods = self._methods()
        every = [(arm, size) for arm, sizes in methods.items() for size in sizes]
        groups = [(step, [pair for pair in every if methods[pair[0]][pair[1]] == step]) for step in self._steps()]
        if not self.together:
            groups = [(step, [pair]) for step, pairs in groups for pair in pairs]
        for step, pairs in groups:
            self._fit(lab, step, {name(*pair): (pair[0], grid(step)) for pair in pairs}, tuning=True)
        for step, pairs in groups:
            metrics = lab.metrics()
            rates = {name(*pair): (pair[0], [*self._rates(metrics, *pair).values()]) for pair in pairs}
            self._fit(lab, step, rates, tuning=False)

    def training(self, dataset: data.Dataset) -> int:
        """The number of training images of a seed."""
        return self.train_images or data.filling(dataset, max(self._steps()))

    def _steps(self):
        return sorted({step for sizes in self._methods().values() for step in sizes.values()})

    def _fit(self, laboratory, step, rates, tuning):
        """Train runs with steps of a size; `rates` has arm and learning rates by name."""
        arms = {arm: ARMS[arm] for arm, _ in rates.values()}
        total = self.images // step
        arms["renormalized"] = partial(normalizers.renormalized, steps=total)
        arms = {arm: arms[arm] for arm, _ in rates.values()}
        hidden = [networks.Layer(*layer) for layer in LAYERS[: self.layers]]
        momentum = self.momentum ** (step / USUAL)
        plain = networks.network(
            laboratory.dataset, hidden, True, normalize=normalizers.chosen(arms), momentum=momentum
        )
        network = networks.Network(normalizers.with_arms(plain.init, [*arms]), plain.apply)

        shape = laboratory.dataset.train_images.shape[1:]

        def probe(params, state, view):
            tests = stream.copies(view.test_images, shape, COPIES), jnp.tile(view.test_labels, COPIES)
            # bnjax.recalibrate with one batch: with momentum 0 its moments replace the running statistics.
            _, recalibrated = network.apply(params, state, stream.copies(view.images, shape, 1), True, momentum=0.0)
            return {
                "test_error": scores.error(network.apply, params, state, *tests),
                "test_recalibrated_error": scores.error(network.apply, params, recalibrated, *tests),
            }

        named = lab.tuning if tuning else lab.at
        pairs = [(each, arm, rate) for each, (arm, used) in rates.items() for rate in dict.fromkeys(used)]
        laboratory.fit(
            [named(each, rate) for each, _, rate in pairs],
            network,
            optimizer=lambda rate, **_: optax.sgd(optax.linear_schedule(rate, 0.0, total)),
            settings=[{"rate": rate, "arm": [*arms].index(arm)} for _, arm, rate in pairs],
            seeds=laboratory.tuning_seeds if tuning else None,
            splits={"train": self.training(laboratory.dataset)},
            steps=total,
            batch_size=step,
            eval_every=total,  # a rate that falls to 0 makes only the end of interest
            probe=None if tuning else probe,
            moving=True,
        )

    def _rates(self, metrics, arm, size):
        """By rule, the rate of an arm and a size."""
        usual = lab.chosen(metrics, name(BN if arm == "ghost" else arm, USUAL), "end").rate  # ghosts are BN's there
        return {
            "scaled": float(f"{usual * size / USUAL:.3g}"),
            "tuned": lab.chosen(metrics, name(arm, size), "end").rate,
        }

    def _errors(self, metrics, key="test_error"):
        """By arm, size and rule, the errors of the seeds."""
        return {
            (arm, size, rule): metrics[lab.at(name(arm, size), rate)][key]
            for arm, sizes in self._methods().items()
            for size in sizes
            for rule, rate in self._rates(metrics, arm, size).items()
        }

    def judge(self, metrics: runs.Metrics) -> study.Finding:
        found, recalibrated = self._errors(metrics), self._errors(metrics, "test_recalibrated_error")
        effects, remarks = {}, {}

        def edges(*pairs):
            return "; ".join(filter(None, (lab.chosen(metrics, name(*pair), "end").edge for pair in pairs)))

        for rule in RULES:
            ratio = {arm: found[arm, SMALL, rule] / found[arm, USUAL, rule] for arm in (BN, GN)}
            effects[f"small batches, {rule}"] = ratio[BN]
            effects[f"more than group normalization, {rule}"] = ratio[BN] / ratio[GN]
            sizes = (USUAL,) if rule == "scaled" else (SMALL, USUAL)
            remarks[f"small batches, {rule}"] = edges(*((BN, size) for size in sizes))
            remarks[f"more than group normalization, {rule}"] = edges(*((arm, s) for arm in (BN, GN) for s in sizes))
        for part, arm, size in (
            *((f"remedy, {arm}", arm, SMALL) for arm in REMEDIES),
            ("remedy for large batches, ghost", "ghost", LARGE),
        ):
            effects[part] = found[BN, size, "tuned"] / found[arm, size, "tuned"]
            remarks[part] = edges((BN, size), (arm, size))
        words = {key: records.spread(values, ".4f") for key, values in found.items()}
        rows = [["images in a batch", "arm", *(f"test error at {rule}" for rule in RULES.values()), "recalibrated"]]
        for arm, sizes in self._methods().items():
            for size in sizes:
                again = "" if arm in ("plain", GN) else records.spread(recalibrated[arm, size, "tuned"], ".4f")
                rates = self._rates(metrics, arm, size)
                each = [f"{words[arm, size, rule]} at {rates[rule]:g}" for rule in RULES]
                rows.append([str(size), arm, *each, again])
        return study.Finding(
            effects,
            f"test error in batches of {SMALL} and of {USUAL} at {RULES['tuned']}: {words[BN, SMALL, 'tuned']} and "
            f"{words[BN, USUAL, 'tuned']} with batch normalization, {words[GN, SMALL, 'tuned']} and "
            f"{words[GN, USUAL, 'tuned']} with group normalization; in batches of {SMALL} "
            + ", ".join(f"{words[arm, SMALL, 'tuned']} {arm}" for arm in [*REMEDIES][1:])
            + f"; in batches of {LARGE} {words[BN, LARGE, 'tuned']} with batch normalization and "
            f"{words['ghost', LARGE, 'tuned']} ghost.",
            "Test error against the size of the batches, at the linearly scaled and at each one's own best rate",
            rows,
            remarks,
        )

    def draw(self, path, metrics, title):
        found = self._errors(metrics)
        with plot.figure(path, title, panels=2, sharey=True) as panels:
            for axes, (rule, words) in zip(panels, RULES.items(), strict=True):
                series = {
                    arm: (np.array([*sizes]), np.array([found[arm, size, rule] for size in sizes]).T)
                    for arm, sizes in self._methods().items()
                }
                plot.curves(axes, series, dict(zip(ARMS, plot.PALETTE, strict=False)), markers=True)
                axes.set(xscale="log", yscale="log", xlabel="images in a batch (of each device, if synchronized)")
                axes.set_title(f"at {words}", fontsize=10)
                plot.ticks(axes, [*self.sizes])
            panels[0].set_ylabel("test error")
            plot.legend(panels[1], self.seeds)


def name(arm: str, size: int) -> str:
    """The name of the runs of an arm in batches of a size."""
    return f"{arm}, {size}"
