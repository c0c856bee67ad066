"""Recurrent: the networks against their equations, shared statistics, and the effects of hand-made metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from experiments.claims import recurrent
from experiments.harness import lab, runs

ORDER = np.array([3, 0, 5, 1, 4, 2])


def start():
    return recurrent.init(jax.random.key(0), classes=2, features=4, pixels=6)


def logits_of_the_equations(params, state, x, normalize):
    """Equations 6 to 8 in float64, with pixels in the fixed order."""
    lstm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["lstm"])
    output, cell = np.float64(0.1 * jax.random.normal(jax.random.key(0), (len(x), 4))), np.zeros((len(x), 4))
    for t, place in enumerate(ORDER):
        gates = normalize("input_bn", t, x[:, place : place + 1] @ lstm.input_kernel)
        gates = gates + normalize("recurrent_bn", t, output @ lstm.recurrent_kernel) + lstm.bias
        f, i, o = (1 / (1 + np.exp(-gate)) for gate in np.split(gates, 4, 1)[:3])
        cell = f * cell + i * np.tanh(np.split(gates, 4, 1)[3])
        output = o * np.tanh(normalize("cell_bn", t, cell))
    return output @ np.asarray(params["kernel"], np.float64)


@pytest.mark.parametrize("arm", recurrent.ARMS)
@pytest.mark.parametrize("train", [True, False])
def test_each_network_matches_its_equations(arm, train, rng):
    x = rng.uniform(size=(5, 6)).astype(np.float32)
    params, state = start()
    # Evaluation has running statistics of its own for each timestep.
    state = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), v.dtype), state)

    def normalize(name, t, values):
        if not recurrent.ARMS[arm]["cell" if name == "cell_bn" else "gates"]:
            return values
        mean, var = values.mean(0), values.var(0)
        if not train:
            mean, var = (np.float64(v[t]) for v in getattr(state, name)[:2])
        return 0.1 * (values - mean) / np.sqrt(var + 1e-5)

    logits, _ = recurrent.apply(params, state, jnp.asarray(x), train, order=ORDER, momentum=0.9, **recurrent.ARMS[arm])
    expected = logits_of_the_equations(params, state, x, normalize)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(params["lstm"].bias, [1] * 4 + [0] * 12)


def test_shared_statistics_are_the_moments_of_all_images_and_timesteps(rng):
    x = rng.normal(np.arange(6)[:, None, None], 1 + np.arange(6)[:, None, None], (6, 50, 3))
    params, state = bnjax.indexed_bn_init(3, 6)
    for t in range(6):
        _, state = bnjax.indexed_bn_apply(params, state, jnp.asarray(x[t], jnp.float32), True, index=t, momentum=0.0)
    found = recurrent.shared(bnjax.BNLSTMState(state, state, state)).cell_bn
    pooled = x.reshape(300, 3)
    np.testing.assert_allclose(found.mean, np.tile(pooled.mean(0), (6, 1)), rtol=1e-4)
    np.testing.assert_allclose(found.var, np.tile(pooled.var(0), (6, 1)), rtol=1e-4)


def test_the_optimizer_limits_the_gradient_and_lowers_the_rate_to_0():
    optimizer, params = recurrent.optimizer(rate=0.1, steps=2), jnp.zeros(2)
    state, found = optimizer.init(params), []
    for gradient in ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0]):
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integer steps by numbers
            update, state = optimizer.update(jnp.array(gradient), state, params)
        found.append(update)
    # Adam's first step is the rate in each weight; its second, of a gradient of 0 at half the rate, is in parts of
    # that 0.09 / 0.19 / sqrt(0.000999 / 0.001999) (Kingma & Ba, 2015, algorithm 1).
    np.testing.assert_allclose(found[0], [-0.1, -0.1], rtol=1e-4)
    np.testing.assert_allclose(found[1], [-0.05 * (0.09 / 0.19) / (0.000999 / 0.001999) ** 0.5] * 2, rtol=1e-3)
    np.testing.assert_array_equal(found[2], 0)
    np.testing.assert_allclose(
        state[1][0].mu, [0.1 * 0.6 * 1.81, 0.1 * 0.8 * 1.81], rtol=1e-4
    )  # limited to a norm of 1


def test_effects_of_hand_made_metrics(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    best = {recurrent.LSTM: 0.1, recurrent.BN_LSTM: 0.01, recurrent.NO_CELL: 0.0316}
    for arm, rate in best.items():
        for each in recurrent.GRID:
            values = {"validation_accuracy": [0.1, 0.9 if each == rate else 0.5]}
            record.add(lab.tuning(arm, each), 900, [0, 10], values)
    losses = {recurrent.LSTM: [1.0, 0.6], recurrent.BN_LSTM: [0.2, 0.1], recurrent.NO_CELL: [1.0, 0.2]}
    accuracy = {recurrent.LSTM: 0.80, recurrent.BN_LSTM: 0.95, recurrent.NO_CELL: 0.96}
    for arm, rate in best.items():
        for seed in (1000, 1001):
            values = {
                "loss": [np.nan, *losses[arm]],
                "validation_accuracy": [0.1, 0.5, 0.9],
                "test_accuracy": accuracy[arm] - 0.01 * (seed - 1000),
                "test_loss": 0.2,
                "test_shared_loss": 0.3,
                "test_shared_accuracy": 0.7,
            }
            record.add(lab.at(arm, rate), seed, [0, 10, 40], values)
            for other in {*recurrent.neighbours(rate)} - {rate}:  # less accurate in validation, more in the test
                worse = values | {"validation_accuracy": [0.1, 0.5, 0.8], "test_accuracy": 1.0}
                record.add(lab.at(arm, other), seed, [0, 10, 40], worse)
            if arm == recurrent.BN_LSTM:  # at the LSTM's rate it arrives half way between the steps 10 and 40
                values["loss"] = [np.nan, 0.25 * np.log(10) * 2, 0.25 * np.log(10) / 2]
                record.add(lab.at(arm, best[recurrent.LSTM]), seed, [0, 10, 40], values)
    finding = recurrent.Recurrent(seeds=2).judge(record.metrics([900, 1000, 1001], 10))
    # The LSTM never reaches 0.25 log(10) = 0.58, and counts as reaching it at the last step; the BN-LSTM does at once.
    np.testing.assert_allclose(finding.effects["speed, own best rate"], [4, 4])
    np.testing.assert_allclose(finding.effects["speed, same rate"], [40 / 25, 40 / 25], rtol=1e-4)
    np.testing.assert_allclose(finding.effects["accuracy"], [0.15, 0.15], atol=1e-6)
    np.testing.assert_allclose(finding.effects["own statistics"], [1.5, 1.5])
    np.testing.assert_allclose(finding.effects["cell"], [-0.01, -0.01], atol=1e-6)
    assert not any(finding.remarks.values())
    assert finding.effects.keys() == {part.name for part in recurrent.Recurrent.PARTS}


def test_each_seed_chooses_among_the_tuned_rate_and_its_neighbours(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for arm in recurrent.ARMS:
        for each in recurrent.GRID:
            record.add(lab.tuning(arm, each), 900, [0, 10], {"validation_accuracy": [0.1, 0.5 + 0.4 * (each == 0.01)]})
        by_rate = ((0.5, 0.9, 0.7), (0.6, 0.9, np.nan), (0.7, 0.1, 0.8))
        for rate, ends in zip(recurrent.neighbours(0.01), by_rate, strict=True):
            for seed, end in enumerate(ends):
                record.add(lab.at(arm, rate), seed, [0, 10], {"validation_accuracy": [0.1, end], "test_loss": rate})
    metrics = record.metrics([0, 1, 2, 900], 10)
    chosen = [0.0316, 0.00316, 0.0316]  # the lowest of equals in the second; the network diverged at 0.01 in the third
    assert recurrent._own_rates(metrics)[recurrent.LSTM] == chosen
    assert [*recurrent._series(metrics)[recurrent.LSTM]["test_loss"]] == chosen
    assert recurrent.neighbours(recurrent.GRID[0]) == [*recurrent.GRID[:2]]
    assert recurrent.neighbours(recurrent.GRID[-1]) == [*recurrent.GRID[-2:]]
