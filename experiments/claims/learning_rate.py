"""Batch normalization allows higher learning rates and benefits from them (Ioffe & Szegedy, 2015, 4.2, figure 3).

Three networks are trained with and without batch normalization: three and five hidden layers of 100 sigmoid units, and
eight convolutions with ReLU. A rate trains a network if the mean training loss of the last evaluations is at most half
the loss of guessing, `TRAINED`. The highest such rate is found in two stages. The tuning seeds train at all rates of a
coarse grid. The other seeds then train at a fine grid, half a decade to each side of the median of the tuning seeds.
While the highest rate of a seed is not inside its fine grid, the grid becomes half a decade longer on that side, up to
the end of the coarse grid. If it still is not inside, it is not measured, so that the part is undecided.

A fine grid tells rates apart only up to one of its steps. Therefore each seed moves its grid by a random part of a step
(dithering). The logarithm of the highest rate on the grid is then lower than that of the seed's true one by a number
that is uniform over a step, whatever the true one is. On average that is half a step in both arms, so that it cancels
in the logarithm of the ratio, and its spread is a part of the spread over seeds, which the interval contains.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from experiments.claims import common
from experiments.claims.common import build
from experiments.harness import curves, headline, lab, plot, protocol, records, report, runs, study
from experiments.models import networks

ARMS = ("plain", "batch normalization")
NETWORKS = common.NETWORKS | {"deep sigmoid": "the deep sigmoid network"}
SWEPT = ("sigmoid", "convolutional")
"""The networks whose highest rate is measured. The deep sigmoid network without normalization trains at no rate."""
GRIDS = {
    "sigmoid": lab.half_decades(0.1, 316),
    "convolutional": lab.half_decades(0.01, 10),
    "deep sigmoid": lab.half_decades(0.1, 316),
}
FINE = {"sigmoid": 8, "convolutional": 4}
"""Rates per decade of the fine grids. A convolutional network costs fifty times as much."""
SIDE = 0.5
"""Decades of a fine grid to each side of the tuning seeds' highest rate, and of each of its extensions."""
MOVED_TAG = 2**32 - 3
"""Of the random generator of a seed that moves its fine grid."""
TRAINED = 0.5
"""The training loss at the end of a run that has trained, at most, as a part of the loss of guessing."""
HIGHER = {"highest rate": 1.0, "five times": 5.0}
"""The thresholds of the ratio of the highest rates, by the name of the part."""
CHANCE = 2.0
"""A network whose accuracy is at most this many times that of guessing has learned nothing."""


def _parts():
    sources = ("higher means higher", "the paper's BN-x5 trains at 5 times the rate of Inception")
    for (name, threshold), source in zip(HIGHER.items(), sources, strict=True):
        for network in SWEPT:
            yield protocol.Part(
                f"{network}, {name}",
                f"{NETWORKS[network]}: highest learning rate that trains, batch normalization / plain",
                threshold,
                source,
                paper="5 and 30 times the rate train (section 4.2.2)",
                margin=protocol.TENTH if threshold == 1 else None,
            )
    for network in SWEPT:
        yield protocol.Part(
            f"{network}, gain",
            f"{NETWORKS[network]} with batch normalization: steps to {curves.TARGETS['loss']}, at the plain network's "
            "best rate / at its own",
            1.0,
            "a gain means fewer steps; whether its own best rate is the higher one is in the table",
            paper="13.3 / 2.1 = 6.3, to an accuracy of 72.2%, with other changes besides the rate (figure 3)",
            margin=protocol.TENTH,
        )
    yield protocol.Part(
        "deep sigmoid, accuracy",
        "the deep sigmoid network: test accuracy at each one's own best rate, batch normalization - plain",
        0.0,
        "the paper's sigmoid network trains with batch normalization, and without it not at all",
        kind="difference",
        paper="69.8% and no better than chance (section 4.2.2)",
        margin=protocol.POINT,
    )


def fine(top: float, network: str, below: int = 1, above: int = 1) -> tuple[float, ...]:
    """The rates of a network's fine grid, in three digits: from `below` to `above` times `SIDE` around `top`."""
    per_decade = FINE[network]
    middle, side = round(per_decade * np.log10(top)), round(per_decade * SIDE)
    return tuple(
        float(f"{10 ** (i / per_decade):.3g}") for i in range(middle - below * side, middle + above * side + 1)
    )


def moved(rate: float, per_decade: int, seed: int) -> float:
    """A rate of a fine grid as a seed has it: higher by a random part of a step, the same for all rates and arms."""
    return rate * 10 ** (float(np.random.default_rng((seed, MOVED_TAG)).random()) / per_decade)


def at_fine(arm: str, rate: float) -> str:
    """The name of an arm's runs at a rate of the fine grid, which each seed moves."""
    return lab.at(f"fine {arm}", rate)


def by(network: str) -> str:
    """What a network's best rate is chosen by: what its part measures (see `lab.chosen`)."""
    return "steps" if network in SWEPT else "curve"


def _trained(metrics: runs.Metrics, names: list[str]) -> np.ndarray:
    """Whether the runs of some names have trained, of shape (seeds, names)."""
    return np.stack([curves.trains(metrics[name], metrics.classes, TRAINED) for name in names], 1)


def highest(trained: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """By run, the highest rate that trains; nan if it is not inside the grid.

    Args:
      trained: whether a rate trains, of shape (runs, rates).
      rates: the rates, in rising order.
    """
    last = trained.shape[1] - 1 - trained[:, ::-1].argmax(1)
    return np.where(trained.any(1) & ~trained[:, -1], rates[last], np.nan)


@dataclass(frozen=True)
class LearningRate(study.Study):
    """The configuration of the experiment. Its fields are the flags of the command line."""

    NAME = "learning-rate"
    CLAIM = "batch normalization allows higher learning rates, and benefits from them"
    # The paper's network, by the threshold that needs no publication.
    HEADLINE = headline.Headline(
        "sigmoid, highest rate",
        "{} learning rates still train with batch normalization",
        "batch normalization",
        "height",
    )
    QUESTION = (
        "How much higher is the highest learning rate that trains, and does a network with batch normalization train "
        "faster at its own best rate than at that of the plain network?"
    )
    SOURCE = "Ioffe & Szegedy (2015), section 4.2, figure 3"
    PROTOCOL = (
        "Networks of three and five hidden layers of 100 sigmoid units, with initial weights of standard deviation "
        "0.1, and a plain network of eight convolutions with ReLU are trained by gradient descent, with a bias or "
        "with batch normalization before each nonlinearity. A rate trains a network if its training loss at the end "
        "is at most half the loss of guessing. The highest such rate is found for each seed on a fine grid, half a "
        "decade to each side of the median of the tuning seeds, which is extended while the seed's rate is not inside. "
        "Each seed moves its grid by a random part of a step, so that the interval includes the resolution. For the "
        "gain, the best rate takes the fewest steps to the training loss, or, if a network reaches it at no rate, has "
        "the lowest final training loss; for the accuracy, it has the highest mean validation accuracy over the curve."
    )
    WOULD_CHANGE = (
        "The ratio is bounded by the last layer, which is not normalized. With a longer budget lower rates train as "
        "well, and the deep plain network may leave its plateau. With small initial weights, or a warm-up, the plain "
        "network's highest rate is higher."
    )
    PARTS = (*_parts(),)
    CHANGES = (
        report.Change(
            "2026-11-27",
            "The highest rate was looked for among four multiples of one rate, by the noisy maximum of the test "
            "accuracy, and in the ReLU network. It is now measured for each seed on a fine grid, by the training loss, "
            "in the paper's sigmoid network and a convolutional one, and best rates are tuned. The speed at the best "
            "rates is a part only of `convergence`. After pilots two things changed. With 2 seeds the ratios were "
            "about 5, near the threshold of five times, which stays; the claim's own word, higher, became a part with "
            "the threshold 1. And a rate trained if the loss was a tenth of guessing at the end, which the plain "
            "convolutional network did not reach in time on 8,000 digits of MNIST at any rate; it is a half now. The "
            "fine grid of the sigmoid network reaches a decade to each side: a half left one seed of ten unmeasured.",
            "1000 to 1009",
        ),
        study.again(
            "The gain is about steps to a training loss, and its rates are now chosen by these steps. They were chosen "
            "by the validation accuracy, where 0.0015 between two rates decided for one at which the training loss of "
            "the sigmoid network with batch normalization falls more slowly. The sigmoid network's fine grid had been "
            "widened after a result of the seeds 1000 to 1009, which then judged it."
        ),
        report.Change(
            "2026-11-27",
            "On 8,000 digits of MNIST the plain convolutional network left three parts undecided. Its highest rate was "
            "at the end of the fine grid in 9 of 10 seeds. Fine grids now start with half a decade to each side, also "
            "in the sigmoid network, which had a whole one, and become longer while that is so. And the plain network "
            "reached the training loss in time at no rate, for which the lowest rate of its grid was taken for the "
            "best; it is the one with the lowest training loss at the end now.",
            "3000 to 3009",
        ),
        report.Change(
            "2026-11-29",
            "Three ratios of highest rates were within one step of the rates from five times, which left them "
            "undecided for any number of seeds. The grid of each seed is now moved by a random part of a step, so that "
            "the ratio is right on average and the interval contains the resolution. The grid of a seed becomes longer "
            "only while its own rate is not inside.",
            "4000 to 4009",
        ),
    )
    SMOKE = {"channels": (8,), "steps": 40, "seeds": 2}
    FULL = {"steps": 20_000, "convolutional_steps": 5000, "seeds": 20, "side": 32}

    first_seed: int = 4000
    """the first of the seeds"""
    channels: tuple[int, ...] = networks.CONVOLUTIONS
    """channels per layer of the convolutional network"""
    steps: int = 1500
    """updates per run of the sigmoid networks"""
    convolutional_steps: int = 500
    """updates per run of the convolutional network"""
    batch_size: int = 60
    """images per step"""
    weight_std: float = 0.1
    """standard deviation of the sigmoid networks' initial kernels"""
    eval_every: int = 10
    """steps between evaluations; the convolutional network is evaluated half as often"""

    def _network(self, dataset, network, arm):
        kind, depth = network.removeprefix("deep "), 5 if network.startswith("deep") else 3
        return build(dataset, kind, arm != "plain", self.weight_std, depth, self.channels)

    def _search(self, metrics, network, arm):
        """The rates of the fine grids of all seeds, as long as the recorded runs ask for, and by seed the place in its
        grid of the highest rate that trains: nan if it is not inside, or if runs are missing. The grid of a seed does
        not depend on the other seeds."""
        name, grid = f"{network}, {arm}", np.array(GRIDS[network])
        trained = _trained(metrics, [lab.tuning(name, rate) for rate in grid])
        places = [np.flatnonzero(each)[-1] for each in trained if each.any()]
        top = grid[int(np.median(places))] if places else grid[0]
        wanted, found, known = set(), [], {}
        for seed in range(self.seeds):
            below = above = 1
            while True:
                rates = fine(top, network, below, above)
                wanted.update(rates)
                names = [at_fine(name, rate) for rate in rates]
                if not all(self._complete(metrics, each) for each in names):
                    found.append(np.nan)
                    break
                known |= {each: _trained(metrics, [each])[:, 0] for each in names if each not in known}
                own = np.array([[known[each][seed] for each in names]])
                lower = rates[0] > grid[0] and not bool(own.any())
                higher = rates[-1] < grid[-1] and bool(own[0, -1])
                if not (lower or higher):
                    found.append(highest(own, np.array(rates))[0])
                    break
                below, above = below + lower, above + higher
        return sorted(wanted), np.array(found)

    def measure(self, lab: lab.Lab) -> None:
        classes = lab.dataset.classes
        for network in NETWORKS:
            steps, eval_every = self.steps, self.eval_every
            if network == "convolutional":
                steps, eval_every = min(steps, self.convolutional_steps), 2 * eval_every
            every: dict[str, Any] = {"steps": steps, "batch_size": self.batch_size, "eval_every": eval_every}
            each = {arm: self._network(lab.dataset, network, arm) for arm in ARMS}
            tuned: dict[str, Any] = {"summary": curves.outcome(classes, curve=True), **every}
            best = {
                arm: lab.tune(f"{network}, {arm}", each[arm], GRIDS[network], by(network), **tuned).rate for arm in ARMS
            }
            for arm in ARMS:
                name = f"{network}, {arm}"
                lab.train(name, each[arm], (best["plain"], best[arm]), summary=curves.outcome(classes), **every)
                while network in SWEPT and (rates := self._untrained(lab.metrics(), network, arm)):
                    lab.fit(
                        [at_fine(name, rate) for rate in rates],
                        each[arm],
                        settings=[{"rate": partial(moved, rate, FINE[network])} for rate in rates],
                        summary=curves.outcome(classes),
                        **every,
                    )

    def _untrained(self, metrics, network, arm):
        """The rates of an arm's fine grids at which seeds are missing."""
        rates, _ = self._search(metrics, network, arm)
        return [rate for rate in rates if not self._complete(metrics, at_fine(f"{network}, {arm}", rate))]

    def _complete(self, metrics, name):
        """Whether there is a run of every seed."""
        return name in metrics and len(metrics[name].seeds) == self.seeds

    def _highest(self, metrics, network, arm):
        """By seed, the highest rate that trains."""
        _, found = self._search(metrics, network, arm)
        return np.array([moved(top, FINE[network], seed) for top, seed in zip(found, self.seed_numbers, strict=True)])

    def judge(self, metrics: runs.Metrics) -> study.Finding:
        effects, remarks = {}, {}
        rows = [["network", "arm", "highest rate that trains", "best rate", "steps to the training loss", "accuracy"]]
        tops, said = {}, []
        for network, arm in product(NETWORKS, ARMS):
            best = lab.chosen(metrics, f"{network}, {arm}", by(network)).rate
            series = metrics[lab.at(f"{network}, {arm}", best)]
            if network in SWEPT:
                tops[network, arm] = self._highest(metrics, network, arm)
            words = records.spread(tops[network, arm], ".3g", "not measured") if network in SWEPT else ""
            steps = records.spread(series["loss_step"], ".0f", "never")
            rows.append([network, arm, words, f"{best:g}", steps, records.spread(series["test_accuracy"], ".4f")])
        for network in SWEPT:
            ratio = tops[network, ARMS[1]] / tops[network, ARMS[0]]
            effects |= {f"{network}, {name}": ratio for name in HIGHER}
            best = [lab.chosen(metrics, f"{network}, {arm}", by(network)).rate for arm in ARMS]
            said.append(
                f"{NETWORKS[network]} trains at rates {records.spread(ratio, '.2f', 'not measured')} times as high, "
                f"and its best rate is {best[1]:g} against {best[0]:g}"
            )
        for network in SWEPT:
            plain, own = (lab.chosen(metrics, f"{network}, {arm}", by(network)) for arm in ARMS)
            at_plain, at_own = (metrics[lab.at(f"{network}, {ARMS[1]}", best.rate)] for best in (plain, own))
            last = float(at_own.steps[-1])
            effects[f"{network}, gain"] = curves.times_as_fast(at_plain["loss_step"], at_own["loss_step"], last)
            remarks[f"{network}, gain"] = "; ".join(filter(None, (plain.edge, own.edge)))
        deep = [lab.chosen(metrics, f"deep sigmoid, {arm}") for arm in ARMS]
        plain, normalized = (
            metrics[lab.at(f"deep sigmoid, {arm}", best.rate)]["test_accuracy"]
            for arm, best in zip(ARMS, deep, strict=True)
        )
        # A diverged network is no better than chance, which is one of the classes.
        plain, normalized = (np.nan_to_num(each, nan=1 / metrics.classes) for each in (plain, normalized))
        effects["deep sigmoid, accuracy"] = normalized - plain
        learns = self._learns(metrics)
        edges = [best.edge for best, used in zip(deep, learns, strict=True) if used]
        remarks["deep sigmoid, accuracy"] = "; ".join(filter(None, edges))
        said.append(f"the deep sigmoid network has a test accuracy of {records.spread(normalized, '.3f')} with it and")
        return study.Finding(
            effects,
            f"With batch normalization {said[0]}, and {said[1]}; {said[2]} {records.spread(plain, '.3f')} without.",
            "Training loss at the end, by learning rate, of the seeds that choose the rates; upright bands: the "
            "highest rates that train the others",
            rows,
            remarks,
        )

    def _learns(self, metrics):
        """By arm, whether the deep sigmoid network learns anything at any rate. If not, the choice of its rate does not
        matter, whether at the edge of the grid or not."""
        for arm in ARMS:
            each = [metrics[lab.tuning(f"deep sigmoid, {arm}", rate)] for rate in GRIDS["deep sigmoid"]]
            ends = [np.nan_to_num(series["validation_accuracy"][:, -1]).max() for series in each]
            yield max(ends) > CHANCE / metrics.classes

    def draw(self, path, metrics, title):
        with plot.figure(path, title, panels=3, sharey=True) as panels:
            for axes, network in zip(panels, NETWORKS, strict=True):
                series = {}
                for arm in ARMS:
                    name = f"{network}, {arm}"
                    each = [metrics[lab.tuning(name, rate)]["last_loss"] for rate in GRIDS[network]]
                    series[arm] = (GRIDS[network], np.stack(each, 1))
                    if network in SWEPT:
                        top = self._highest(metrics, network, arm)
                        if np.isfinite(top).any():
                            axes.axvspan(
                                np.nanmin(top) / 1.05, np.nanmax(top) * 1.05, color=plot.COLOURS[arm], alpha=0.3
                            )
                plot.curves(axes, series, markers=True, xlabel="learning rate")
                axes.axhline(TRAINED * np.log(metrics.classes), color="0.4", linewidth=1, linestyle="--")
                axes.set(xscale="log", yscale="log")
                axes.set_title(network, fontsize=10)
            panels[0].set_ylabel("training loss at the end")
            plot.legend(panels[2], len(metrics[lab.tuning("sigmoid, plain", GRIDS["sigmoid"][0])].seeds))
