"""Steps and errors with batch normalization after the activation, divided by those before it."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import placement
from experiments.harness import data, lab, protocol, runs, stream, train

CLASSES = 10
SEEDS = (*range(10),)
STEPS = np.arange(0, 110, 10)


def made(tmp_path, arrive, error):
    """Metrics as they would be if, by arm, both targets were reached at these steps (nan: never), and the test error at
    the end were this."""
    record = runs.Record(tmp_path / "metrics.jsonl")
    for network, grid in placement.GRIDS.items():
        for arm, step in arrive.items():
            there = np.nan_to_num(step, nan=np.inf) <= STEPS
            series = {"loss": np.where(there, 0.01, 2.0), "validation_accuracy": np.where(there, 0.99, 0.2)}
            for seed in SEEDS:
                record.add(lab.at(f"{network}, {arm}", 0.1), seed, STEPS, {**series, "test_error": error[arm]})
            for rate, seed in [(rate, seed) for rate in grid for seed in lab.TUNING_SEEDS]:
                curve = np.full(len(STEPS), 0.9 if rate == 0.1 else 0.5)
                record.add(lab.tuning(f"{network}, {arm}", rate), seed, STEPS, {"validation_accuracy": curve})
    return record.metrics([*SEEDS, *lab.TUNING_SEEDS], CLASSES)


def test_judge_divides_after_by_before(tmp_path):
    arrive = {"plain": 80, "before": 20, "after": 50, "both": 30}
    finding = placement.Placement(seeds=10).judge(
        made(tmp_path, arrive, dict.fromkeys(placement.ARMS, 0.1) | {"after": 0.2})
    )
    for network in placement.NETWORKS:
        for rate in placement.RATES:
            # The logarithm of the loss falls from 2 to 0.01 between two evaluations, and crosses the target in between.
            part = np.log(0.1 * np.log(CLASSES) / 2) / np.log(0.01 / 2)
            expected = (40 + 10 * part) / (10 + 10 * part)
            np.testing.assert_allclose(finding.effects[f"{network}, {rate}, loss"], [expected] * 10)
            # The smoothed accuracy rises by 0.79 / 3 in each of three evaluations, and passes 0.9 in the last.
            part = (0.9 - (0.2 + 2 * 0.79 / 3)) / (0.79 / 3)
            expected = (60 + 10 * part) / (30 + 10 * part)
            np.testing.assert_allclose(finding.effects[f"{network}, {rate}, accuracy"], [expected] * 10)
        np.testing.assert_allclose(finding.effects[f"{network}, test error"], [2.0] * 10)
    decided = protocol.decide(placement.Placement.PARTS, finding.effects, finding.remarks)
    assert protocol.verdict(decided) == "holds"


def test_judge_counts_what_never_arrives_as_the_last_step(tmp_path):
    arrive = {"plain": 80, "before": np.nan, "after": 50, "both": 30}
    effects = placement.Placement(seeds=10).judge(made(tmp_path, arrive, dict.fromkeys(placement.ARMS, 0.1))).effects
    part = np.log(0.1 * np.log(CLASSES) / 2) / np.log(0.01 / 2)
    np.testing.assert_allclose(effects["convolutional, own best rate, loss"], [(40 + 10 * part) / 100] * 10)


def test_before_and_after_have_equally_many_parameters():
    experiment, digits = placement.Placement(), data.digits()
    for network in placement.NETWORKS:
        sizes = {}
        for arm in placement.ARMS:
            params, _ = jax.eval_shape(experiment._network(digits, network, arm).init, jax.random.key(0))
            sizes[arm] = sum(leaf.size for leaf in jax.tree.leaves(params))
        units = 256 + 128 if network == "fully connected" else 8 + 8 + 16 + 16 + 4 * 32
        assert sizes["before"] == sizes["after"] == sizes["plain"] + units == sizes["both"] - 2 * units


def test_the_rate_falls_to_0_over_the_last_fifth_of_the_steps():
    optimizer, weights = placement._optimizer(0.5, steps=10), jnp.zeros(1)
    state, rates = optimizer.init(weights), []
    for _ in range(10):
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integer steps by numbers
            update, state = optimizer.update(jnp.ones(1), state)
        rates.append(-float(update[0]))
    np.testing.assert_allclose(rates, [0.5] * 9 + [0.25])


def test_the_test_error_is_that_on_moved_images():
    digits = data.digits()
    images, known = digits.test_images[:5], digits.test_images[:5].reshape(5, -1)

    def nearest(rows):
        return ((rows[:, None] - known[None]) ** 2).sum(-1).argmin(1)

    wrong = 0
    for motions in stream.motions(0, 0, placement.COPIES, 5):
        moved = np.asarray(stream.moved(images, motions)).reshape(5, -1)
        wrong += (nearest(moved) != np.arange(5)).sum()
    assert 0 < wrong < placement.COPIES * 5 / 2  # most moved images are nearest to the one that was moved

    view = train.View(images[:0], images[:0], {}, jnp.asarray(known), jnp.arange(5))
    probe = placement._probe(lambda params, state, x, train: (jax.nn.one_hot(nearest(x), 5), state), images.shape[1:])
    np.testing.assert_allclose(
        probe(None, None, view)["test_error"], (wrong + 0.5) / (placement.COPIES * 5 + 1), rtol=1e-6
    )
