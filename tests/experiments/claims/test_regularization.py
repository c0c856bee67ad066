"""Regularization: dropout and the penalty by their formulas, and the verdict from given curves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import regularization
from experiments.harness import curves, data, lab, runs
from experiments.models import networks


def test_penalty_is_the_gradient_of_its_formula():
    params = [{"kernel": jnp.array([[1.5, -2.0]]), "bias": jnp.array([3.0, 4.0])}]
    optimizer = regularization.penalized(jnp.float32(0.5), jnp.float32(0.01), dropout=jnp.float32(0))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates[0]["kernel"], [[-0.5 * 0.01 * 1.5, 0.5 * 0.01 * 2]], rtol=1e-6)
    np.testing.assert_array_equal(updates[0]["bias"], [0, 0])


def test_dropout_drops_its_share_keeps_the_mean_and_is_drawn_anew():
    """Of a network whose hidden units are all 1, so that its logit is the sum of those that are kept."""
    layers = [networks.Layer(400), networks.Layer(1)]
    params = [
        {"kernel": jnp.zeros((4, 400)), "bias": jnp.ones(400)},
        {"kernel": jnp.ones((400, 1)), "bias": jnp.zeros(1)},
    ]

    def apply(params, state, x, train, **options):
        return networks.apply(params, state, x, train, layers=layers, shape=(2, 2), **options)

    whole = networks.Network(lambda key: (params, []), apply)
    init, apply = regularization.with_dropout(whole)
    params, state = init(jax.random.key(0), dropout=0.25, l2=0)
    x = jnp.zeros((50, 4))
    logits, new = apply(params, state, x, True)
    kept = np.asarray(logits) * 0.75
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)  # each unit that is kept counts 1 / (1 - 0.25)
    assert len(np.unique(kept)) > 10  # every image has its own units
    np.testing.assert_allclose(kept.mean(), 300, atol=6)  # its standard error is sqrt(400 / 4 * 3 / 4 / 50) = 1.2
    again, _ = apply(params, new, x, True)
    assert not np.array_equal(again, logits)
    evaluated, same = apply(params, state, x, False)
    np.testing.assert_array_equal(evaluated, np.full((50, 1), 400))
    assert same is state


@pytest.mark.parametrize("batch_norm", [False, True])
def test_no_dropout_is_the_network_itself(batch_norm):
    network = networks.mlp(data.digits(), (6,), batch_norm)
    x = jnp.asarray(data.digits().train_images[:8].reshape(8, -1))
    init, apply = regularization.with_dropout(network)
    params, state = init(jax.random.key(1), dropout=0, l2=0)
    logits, new = apply(params, state, x, True)
    expected, expected_state = network.apply(*network.init(jax.random.key(1)), x, True)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, new[0], expected_state)


def test_value_at_a_target_is_interpolated():
    falling = np.array([[3.0, 2, 1, 2], [3, 1, 0, 0], [3, 3, 3, 2], [0.5, 1, 2, 3], [1.5, 1.5, np.nan, 0]])
    values = np.array([[0.0, 10, 20, 99], [0, 10, 20, 30], [0, 1, 2, 3], [7, 8, 9, 9], [1, 2, 3, 4]])
    found = curves.at_target(falling, values, 1.5)
    np.testing.assert_allclose(found, [15, 7.5, np.nan, 7, 1])


def test_rate_with_the_lowest_loss_at_the_end_is_chosen(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for rate, losses in ((0.1, [2, 2, 2, 2]), (0.3, [2, 9, 1, 1]), (1, [2, 0.1, 1.5, 1.5]), (3, [2, 0.1, None, None])):
        values = {"validation_loss": np.array(losses, float), "validation_accuracy": [0.1] * 4}
        record.add(lab.tuning("plain", rate), 900, range(4), values)
    # Smoothed, the last losses are 2, (9 + 1 + 1) / 3, (0.1 + 1.5 + 1.5) / 3 and, of the diverged network, infinity.
    assert lab.chosen(record.metrics([900], 10), "plain", "loss") == lab.Chosen(1.0, "")


@pytest.mark.parametrize(
    ("last", "rate", "edge"),
    [(0.1, 0.3, ""), (0.3, 0.1, "plain reaches the target of the training loss at no learning rate of its grid")],
)
def test_the_rate_with_the_smallest_gap_must_reach_the_target(tmp_path, last, rate, edge):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for each, gap in ((0.1, 2.0), (0.3, 1.0), (1, 2.0)):
        losses = np.array([2.0, last, last, last])
        values = {"train_loss": losses, "validation_loss": losses + gap, "validation_accuracy": [0.1] * 4}
        record.add(lab.tuning("plain", each), 900, range(4), values)
    assert lab.chosen(record.metrics([900], 10), "plain", "gap") == lab.Chosen(rate, edge)


@pytest.mark.parametrize(("lower", "rate"), [(1.57, 0.3), (1.59, 1.0)])
def test_the_lowest_rate_within_one_standard_error_of_the_smallest_gap_is_chosen(tmp_path, lower, rate):
    """The smallest gap, at the rate 1, is 1 on average over three seeds, with a standard error of 1 / sqrt(3) = 0.577.
    The rate 0.1 never reaches the target, and 3 has the same gap as 1."""
    record = runs.Record(tmp_path / "metrics.jsonl")
    for each, gaps in ((0.1, (0, 0, 0)), (0.3, (lower,) * 3), (1, (0, 1, 2)), (3, (0, 1, 2))):
        for seed, gap in enumerate(gaps, 900):
            losses = np.array([2.0, *[0.3 if each == 0.1 else 0.1] * 3])
            values = {"train_loss": losses, "validation_loss": losses + gap, "validation_accuracy": [0.1] * 4}
            record.add(lab.tuning("plain", each), seed, range(4), values)
    metrics = record.metrics([900, 901, 902], 10)
    assert lab.chosen(metrics, "plain", "steady gap") == lab.Chosen(rate, "")
    assert lab.chosen(metrics, "plain", "gap") == lab.Chosen(1.0, "")


def test_a_smallest_gap_at_the_edge_of_the_grid_is_told_though_a_lower_rate_is_chosen(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for rate, gaps in ((0.1, (9, 9)), (0.3, (1.5, 1.5)), (1, (0, 2))):
        for seed, gap in enumerate(gaps, 900):
            losses = np.array([2.0, 0.1, 0.1, 0.1])
            values = {"train_loss": losses, "validation_loss": losses + gap, "validation_accuracy": [0.1] * 4}
            record.add(lab.tuning("plain", rate), seed, range(4), values)
    found = lab.chosen(record.metrics([900, 901], 10), "plain", "steady gap")
    assert found == lab.Chosen(0.3, "the best learning rate of plain, 1, is at the edge of its grid")


def test_effects_of_given_losses(tmp_path):
    record, steps = runs.Record(tmp_path / "metrics.jsonl"), [0, 10]
    loss = dict(zip(regularization.ARMS, (3.0, 1.5, 2.0, 1.2, 1.0, 1.1), strict=True))
    target = 0.1 * np.log(10)
    for arm in regularization.ARMS:
        for rate, accuracy, validation in ((0.01, 0.2, 3.0), (0.1, 0.4, 1.0), (1, 0.5, 2.0), (3, 0.2, 3.0)):
            values = {"train_loss": [2.3, 0.1, 0.1], "validation_loss": [3.0, 3 - accuracy, validation]}
            record.add(lab.tuning(arm, rate), 900, [0, 5, 10], values)
        for seed in (1000, 1001):
            values = {"train_loss": [2.3, 0.5], "validation_loss": [2.3, 2.0], "test_accuracy": 0.8}
            record.add(lab.at(arm, 0.1), seed, steps, {**values, "test_loss": loss[arm] + seed - 1000})
            gap = 4.0 if arm.startswith("plain") else 1.0
            ends = {"train_loss": [target + 0.1, target - 0.1], "test_loss": target - 0.1 + gap, "test_accuracy": 0.1}
            fit = {"validation_loss": [target + 0.1 + gap / 2, target - 0.1 + gap / 2]}
            record.add(lab.at(arm, 1), seed, steps, {**ends, **fit})
    finding = regularization.Regularization(seeds=2).judge(record.metrics([900, 1000, 1001], 10))
    expected = {
        "gap at equal training loss": [4, 4],
        "test loss": [3 / 1.2, 4 / 2.2],
        "dropout adds less": [3 / 1.5 / (1.2 / 1.0), 4 / 2.5 / (2.2 / 2.0)],
        "instead of dropout": [1.5 / 1.2, 2.5 / 2.2],
    }
    assert [*finding.effects] == [part.name for part in regularization.Regularization.PARTS] == [*expected]
    for name, values in expected.items():
        np.testing.assert_allclose(finding.effects[name], values, rtol=1e-4, err_msg=name)
    assert {*finding.remarks.values()} == {""}


def test_rejects_a_dropout_of_everything():
    with pytest.raises(data.InputError, match=r"dropout=1\.0: expected a number in"):
        regularization.Regularization(dropout=1.0)
