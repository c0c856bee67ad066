"""The highest rate that trains, what it gains, and the outcome of a run that both are judged by."""

from itertools import product

import numpy as np
import optax
import pytest

from experiments.claims import learning_rate
from experiments.harness import curves, data, lab, protocol, runs, train
from experiments.models import networks
from tests.support.effects import repeated

CLASSES = 10
TARGET = 0.1 * np.log(CLASSES)
SEEDS = (0, 1, 2)


def test_fine_rates_are_evenly_spaced_and_have_the_top_in_their_middle():
    rates = learning_rate.fine(10.0, "convolutional")
    np.testing.assert_allclose(rates, 10.0 ** np.array([0.5, 0.75, 1, 1.25, 1.5]), rtol=5e-3)
    longer = learning_rate.fine(31.6, "sigmoid", below=2, above=3)
    assert longer[::4] == (3.16, 10.0, 31.6, 100.0, 316.0, 1000.0)  # the names of the coarse grid


def test_highest_rate_is_measured_only_inside_the_grid():
    trained = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    found = learning_rate.highest(trained, np.array([1.0, 2.0, 4.0, 8.0]))
    np.testing.assert_array_equal(found, [2, 4, np.nan, np.nan])


def test_outcome_keeps_what_a_run_reached():
    values = {
        "loss": np.array([np.nan, 2.0, 0.2, 0.1, 0.3, 0.5]),
        "validation_accuracy": np.array([0.1, 0.5, 0.9, 0.9, 0.9, 0.2]),
        "validation_loss": np.ones(6),
        "test_accuracy": 0.8,
    }
    steps, kept = curves.outcome(CLASSES)([0, 10, 20, 30, 40, 50], values)
    assert steps == [50]
    # The logarithm of the loss falls from 2 to 0.2 between the steps 10 and 20, and crosses the target in between.
    arrives = 10 + 10 * np.log(0.1 * np.log(CLASSES) / 2) / np.log(0.2 / 2)
    assert kept == {
        "loss_step": pytest.approx(arrives),
        "accuracy_step": pytest.approx(40),
        "last_loss": pytest.approx(0.3),
        "test_accuracy": 0.8,
    }
    steps, kept = curves.outcome(CLASSES, curve=True)([0, 10, 20, 30, 40, 50], values)
    assert steps == [0, 10, 20, 30, 40, 50]
    np.testing.assert_array_equal(kept["validation_accuracy"], values["validation_accuracy"])


def test_a_network_whose_loss_rises_again_or_diverges_does_not_train():
    for last, trains in (([0.1, 0.2, 0.3], True), ([0.1, 0.2, 0.5], False), ([0.1, 0.1, np.nan], False)):
        values = {"loss": np.array([np.nan, 0.1, *last]), "validation_accuracy": np.zeros(5)}
        _, kept = curves.outcome(CLASSES)([0, 1, 2, 3, 4], values)
        series = runs.Series((0,), np.array([4]), {"last_loss": np.array([kept["last_loss"]])})
        assert curves.trains(series, CLASSES) == [trains]


def made(tmp_path, top, best, steps, accuracy):
    """Metrics as they would be if, by network and arm, the rates up to `top` trained, `best` had the best curve, and at
    that rate the target took `steps`, twice as many at every other."""
    record = runs.Record(tmp_path / "metrics.jsonl")
    for network, grid in learning_rate.GRIDS.items():
        for arm in learning_rate.ARMS:
            key = network, arm
            fine = learning_rate.fine(top[key], network) if network in learning_rate.SWEPT else ()
            for rate in {*grid, *fine, best[network, "plain"], best[key]}:
                found = {
                    "loss_step": steps[key] * (1 if rate == best[key] else 2),
                    "accuracy_step": np.nan,
                    "last_loss": np.log(CLASSES) * (0.4 if rate <= top[key] else 0.6),
                    "test_accuracy": accuracy[key],
                }
                score = accuracy[key] * (1 if rate == best[key] else 0.5)
                for seed in SEEDS:
                    record.add(lab.at(f"{network}, {arm}", rate), seed, [1000], found)
                    record.add(learning_rate.at_fine(f"{network}, {arm}", rate), seed, [1000], found)
                for seed in lab.TUNING_SEEDS if rate in grid else ():
                    tuned = found | {"validation_accuracy": [0.1, score]}
                    record.add(lab.tuning(f"{network}, {arm}", rate), seed, [0, 1000], tuned)
    return record.metrics([*SEEDS, *lab.TUNING_SEEDS], CLASSES)


def both(plain, normalized, deep=None):
    """Values by network and arm, the same for all networks but the deep one."""
    pairs = dict.fromkeys(learning_rate.SWEPT, (plain, normalized)) | {"deep sigmoid": deep or (plain, normalized)}
    return {(network, arm): x for network in pairs for arm, x in zip(learning_rate.ARMS, pairs[network], strict=True)}


def test_judge_divides_highest_rates_and_steps(tmp_path):
    metrics = made(tmp_path, both(0.316, 10.0), both(0.1, 1.0), both(400, 50), both(0.8, 0.9, (0.1, 0.9)))
    finding = learning_rate.LearningRate(seeds=3, first_seed=0).judge(metrics)
    for network in learning_rate.SWEPT:
        np.testing.assert_allclose(finding.effects[f"{network}, highest rate"], [31.6] * 3, rtol=5e-3)
        np.testing.assert_allclose(finding.effects[f"{network}, gain"], [2.0] * 3)
    np.testing.assert_allclose(finding.effects["deep sigmoid, accuracy"], [0.8] * 3)
    # The best rate of the plain sigmoid networks is at the edge of the grid. It matters unless nothing is learned.
    assert "edge" in finding.remarks["sigmoid, gain"]
    assert not finding.remarks["convolutional, gain"]
    assert not finding.remarks["deep sigmoid, accuracy"]
    decided = protocol.decide(learning_rate.LearningRate.PARTS, repeated(finding.effects), finding.remarks)
    assert [part.verdict for part in decided] == [*["holds"] * 4, "undecided", "holds", "holds"]


def test_the_grid_of_a_seed_makes_the_ratio_right_on_average():
    """Highest rates whose ratio is 5, which is no power of a step: on grids that do not move it is wrong."""
    step, rng, seeds = 10**0.25, np.random.default_rng(0), range(4000, 6000)
    truth = np.exp(rng.normal(0, 0.05, (len(seeds), 1))) * [1.1, 5.5]  # all within a step
    rates = 10 ** (np.arange(-8, 9) / 4)

    def ratio(moves):
        grids = rates * moves[:, None]
        tops = [learning_rate.highest(grids <= top[:, None], rates) for top in truth.T]
        return np.log(tops[1] / tops[0])

    moves = np.array([learning_rate.moved(1.0, 4, seed) for seed in seeds])
    assert ((moves >= 1) & (moves < step)).all()
    found = ratio(moves)
    assert abs(found.mean() - np.log(5)) < 3 * found.std() / np.sqrt(len(seeds))
    assert abs(ratio(np.ones(len(seeds))).mean() - np.log(5)) > 0.1


def test_a_setting_may_be_a_function_of_the_seed():
    dataset = data.load()
    init, apply = networks.mlp(dataset, (5,), False)

    def losses(rate, seeds):
        every = {"steps": 3, "batch_size": 20, "eval_every": 3, "tests": False}
        splits = data.splits(dataset, seeds, train=40)
        rates = [{"rate": rate}]

        def start(key, rate):
            return init(key)

        *_, last = train.fit(start, apply, lambda rate: optax.sgd(rate), splits, seeds=seeds, settings=rates, **every)
        return [*last.loss]

    found = losses(lambda seed: 0.1 * seed, [1, 2])
    np.testing.assert_allclose(found, losses(0.1, [1]) + losses(0.2, [2]), rtol=1e-5)
    assert abs(found[1] - losses(0.1, [2])[0]) > 1e-3


class Pretended(lab.Lab):
    """Trains nothing. A rate trains up to the seed's own highest one, and a network reaches no target."""

    def __init__(self, tmp_path, tops):
        super().__init__(data.load(), runs.Record(tmp_path / "metrics.jsonl"), range(len(tops)))
        self.tops, self.fits = tops, 0

    def fit(self, names, network, *, settings, seeds=None, **options):
        for seed in self.record.missing(names, self.seeds if seeds is None else seeds):
            self.fits += 1
            for name, setting in zip(names, settings, strict=True):
                assert self.record.missing([name], [seed]), f"{name} is trained twice"
                rate = setting["rate"](seed) if callable(setting["rate"]) else setting["rate"]
                part = rate / (10.0 if seed in self.tuning_seeds else self.tops[seed])
                loss = np.log(CLASSES) * (0.6 if part > 1.01 else 0.5 - 0.1 * part)
                found = {"loss_step": np.nan, "last_loss": loss, "test_accuracy": 0.5}
                self.record.add(name, seed, [0, 10], found | {"validation_accuracy": [0.1, 0.5]})


def test_the_fine_grid_reaches_the_highest_rate_of_every_seed(tmp_path):
    # The tuning seeds train up to 10. The others do up to a decade below and above it.
    tops = [1.0, 10.0, 100.0]
    study = learning_rate.LearningRate(seeds=3, first_seed=0)
    laboratory = Pretended(tmp_path, tops)
    study.measure(laboratory)
    metrics = laboratory.metrics()
    for arm, (network, limit) in product(learning_rate.ARMS, (("sigmoid", 1000), ("convolutional", 10))):
        found = study._highest(metrics, network, arm) / tops
        # The convolutional network's coarse grid ends at 10, and no fine grid becomes longer beyond that.
        np.testing.assert_array_equal(np.isnan(found), np.array(tops) > limit)
        found = found[np.isfinite(found)]
        assert ((found <= 1.01) & (found > 0.99 * 10 ** (-1 / learning_rate.FINE[network]))).all()
    fits = laboratory.fits
    study.measure(laboratory)
    assert laboratory.fits == fits


def test_the_highest_rate_of_a_seed_does_not_depend_on_other_seeds(tmp_path):
    tops = [1.0, 10.0, 100.0]
    alone, together = (Pretended(tmp_path / str(len(each)), each) for each in (tops[:1], tops))
    found = []
    for laboratory in (alone, together):
        study = learning_rate.LearningRate(seeds=len(laboratory.seeds), first_seed=0)
        study.measure(laboratory)
        found.append(study._highest(laboratory.metrics(), "sigmoid", "plain")[0])
    assert found[0] == found[1]


def test_the_best_rate_of_a_network_that_never_arrives_has_the_lowest_loss(tmp_path):
    study = learning_rate.LearningRate(seeds=3, first_seed=0)
    laboratory = Pretended(tmp_path, [10.0] * 3)
    study.measure(laboratory)
    assert lab.chosen(laboratory.metrics(), "sigmoid, plain", "steps") == lab.Chosen(10.0, "")
