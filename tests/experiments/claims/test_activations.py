"""The drift of a distribution, and the change of a gradient by the update of the layers before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import activations
from experiments.harness import curves, distributions, lab, protocol, runs
from experiments.models import networks
from tests.support.effects import repeated

LOG10 = np.log(10)


def test_drift_is_the_deviation_of_the_median_over_all_steps(rng):
    median, spread = rng.standard_normal((2, 31, 3)), rng.uniform(1, 2, (2, 31, 3))
    every = distributions.drift(np.arange(31), median, spread)
    weights = np.array([0.5, *[1] * 29, 0.5])
    want = np.empty((2, 3))
    for run, unit in np.ndindex(2, 3):
        mean = np.average(median[run, :, unit], weights=weights)
        variance = np.average((median[run, :, unit] - mean) ** 2, weights=weights)
        want[run, unit] = np.sqrt(variance) / np.average(spread[run, :, unit], weights=weights)
    np.testing.assert_allclose(every, want.mean(1))
    # A median that moves once counts by the steps before and after, wherever the evaluations are.
    steps = np.array([0, 1, 2, 3, 50, 50 + 1e-9, 200])
    moved = np.array([0, 0, 0, 0, 0, 1, 1.0])[None, :, None]
    np.testing.assert_allclose(distributions.drift(steps, moved, 2 + 0 * moved), np.sqrt(0.25 * 0.75) / 2, rtol=1e-6)


def test_summary_of_normal_numbers_is_their_median_and_nearly_their_deviation(rng):
    x = 3 + 2 * rng.standard_normal((20_000, 2)).astype(np.float32)
    found = distributions.summary(jnp.asarray(x))
    np.testing.assert_allclose(found["median"], np.median(x, 0), rtol=1e-5)
    np.testing.assert_allclose(found["spread"], 1.036 * 2, rtol=0.03)  # the 85th percentile of a normal distribution


def test_gradient_change_matches_a_hand_derivation_of_a_linear_network(rng):
    """The loss of a linear network has the gradient W_before.T x.T (softmax - labels) W_after.T."""
    x, labels = rng.standard_normal((5, 4)), np.array([0, 1, 2, 0, 1])
    kernels = [rng.standard_normal(shape) for shape in ((4, 3), (3, 3), (3, 3))]
    rate = 0.3

    def gradients(kernels):
        outputs = [x]
        for kernel in kernels:
            outputs.append(outputs[-1] @ kernel)
        exp = np.exp(outputs[-1] - outputs[-1].max(1, keepdims=True))
        error = (exp / exp.sum(1, keepdims=True) - np.eye(3)[labels]) / 5
        found = []
        for kernel, inputs in zip(kernels[::-1], outputs[-2::-1], strict=True):
            found.append(inputs.T @ error)
            error = error @ kernel.T
        return found[::-1]

    before = gradients(kernels)
    updated = [kernel - rate * gradient for kernel, gradient in zip(kernels, before, strict=True)]
    change, cosine = [], []
    for layer in (1, 2):
        g, after = before[layer], gradients(updated[:layer] + kernels[layer:])[layer]
        change.append(np.linalg.norm(g - after) / np.linalg.norm(g))
        cosine.append((g * after).sum() / np.linalg.norm(g) / np.linalg.norm(after))

    def apply(params, state, x, train):
        for layer in params:
            x = x @ layer["kernel"]
        return x, state

    params = [{"kernel": jnp.asarray(kernel, jnp.float32)} for kernel in kernels]
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(labels)
    found = activations.gradient_change(apply, params, (), *batch, jnp.float32(rate))
    np.testing.assert_allclose(found["change"], change, rtol=1e-4)
    np.testing.assert_allclose(found["cosine"], cosine, rtol=1e-4)


def test_at_losses_interpolates_where_a_level_is_first_passed():
    loss = np.array([[4.0, 2.0, 3.0, 1.0, 1.5, 0.0]])
    values = np.array([[0.0, 20.0, 7.0, 30.0, 9.0, 40.0]])
    np.testing.assert_allclose(curves.at_losses(loss, values, [3]), [10])  # first passed between 4 and 2
    np.testing.assert_allclose(curves.at_losses(loss, values, [1.5]), [(7 + 3 * 30) / 4])
    np.testing.assert_allclose(curves.at_losses(loss, values, [3, 5]), [(10 + 0) / 2])  # below 5 from the beginning
    assert np.isnan(curves.at_losses(loss, values, [3, -1]))[0]


def test_log_spaced_steps_have_equal_ratios():
    steps = np.array(curves.log_spaced(1000, 31))
    assert (steps[0], steps[-1]) == (1, 1000)
    np.testing.assert_allclose(steps[steps > 20][1:] / steps[steps > 20][:-1], 10**0.1, rtol=0.03)


def a_run(record, name, seed, change, cosine, jump):
    """A run whose loss falls through all levels with a constant change of gradients, and whose median jumps midway."""
    loss = [1.2 * LOG10, 0.8 * LOG10, 0.6 * LOG10, 0.1 * LOG10]
    values = {
        "validation_accuracy": [0.1, 0.5, 0.6, 0.9],
        "batch_loss": loss,
        "change": [change] * 4,
        "cosine": [cosine] * 4,
        "median": [[0.0], [0.0], [jump], [jump]],
        "spread": [[1.0]] * 4,
    }
    record.add(name, seed, (0, 2, 2.0001, 4), values)


@pytest.fixture
def record(tmp_path):
    found = runs.Record(tmp_path / "metrics.jsonl")
    for arm in activations.ARMS:
        for rate, accuracy in ((0.1, 0.2), (1, 0.8 if arm == "plain" else 0.7), (10, 0.75), (100, 0.1)):
            for seed in lab.TUNING_SEEDS:
                values = {"validation_accuracy": [0.1, accuracy]}
                found.add(lab.tuning(f"sigmoid, {arm}", rate), seed, (0, 4), values)
    return found


def test_effects_are_plain_over_normalized_at_the_rates_that_tuning_chose(record):
    for seed in (0, 1):
        a_run(record, "sigmoid, plain@1", seed, 0.4 + seed, 0.5, 3)
        a_run(record, "sigmoid, batch normalization@1", seed, 0.2, 0.75, 1)
        a_run(record, "sigmoid, batch normalization@10", seed, 0.8, -0.5, 2)
    study = activations.Activations(seeds=2, first_seed=0, networks=("sigmoid",))
    finding = study.judge(record.metrics([*lab.TUNING_SEEDS, 0, 1], 10))
    np.testing.assert_allclose(finding.effects["sigmoid, same rate, drift"], [3, 3], rtol=1e-3)
    np.testing.assert_allclose(finding.effects["sigmoid, same rate, change"], [2, 7], rtol=1e-3)
    np.testing.assert_allclose(finding.effects["sigmoid, own best rate, change"], [0.5, 1.75], rtol=1e-3)
    np.testing.assert_allclose(finding.effects["sigmoid, same rate, cosine"], [0.25, 0.25], rtol=1e-3)
    assert not any(finding.remarks.values())
    decided = {part.name: part for part in protocol.decide(study.PARTS, repeated(finding.effects), finding.remarks)}
    assert decided["sigmoid, same rate, drift"].verdict == protocol.HOLDS
    assert decided["convolutional, same rate, drift"].verdict == protocol.UNDECIDED
    assert "convolutional" not in finding.measured


def test_the_probe_sees_the_inputs_of_the_last_hidden_layer(rng):
    study = activations.Activations()
    shape = (4, 4)
    layers = [networks.Layer(6), networks.Layer(5), networks.Layer(3)]
    images = rng.uniform(0, 1, (20, 16)).astype(np.float32)
    init = networks.init(jax.random.key(0), 16, layers, networks.constant(0.5), True)

    def apply(params, state, x, train, **options):
        options = {"activation": jax.nn.sigmoid} | options
        return networks.apply(params, state, x, train, layers=layers, shape=shape, **options)

    inputs, _ = distributions.last_inputs(apply, activations.ACTIVATIONS["sigmoid"], *init, jnp.asarray(images))
    hidden = images.astype(np.float64)
    for layer in init[0][:2]:
        product = hidden @ np.asarray(layer["kernel"], np.float64)
        normalized = (product - product.mean(0)) / np.sqrt(product.var(0) + 1e-5)
        hidden = 1 / (1 + np.exp(-normalized))
    np.testing.assert_allclose(inputs, normalized, rtol=1e-3, atol=1e-3)
    assert study.units < 100
