"""What changes along a step of the gradient, and the noise after batch normalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from experiments.claims import smoothness
from experiments.harness import curves, lab, protocol, runs, train
from tests.support.effects import repeated

LOG10 = np.log(10)


def test_along_gradient_of_a_parabola_follows_its_curvature():
    """f = sum(c p^2) / 2 has the gradient c p, and after a step of eta the gradient c (1 - eta c) p."""
    curvature, p = np.array([1.0, 3.0]), np.array([2.0, -1.0])
    found = smoothness.along_gradient(
        lambda params: (jnp.asarray(curvature, jnp.float32) * params["p"] ** 2).sum() / 2,
        {"p": jnp.asarray(p, jnp.float32)},
    )
    g, here = curvature * p, (curvature * p**2).sum() / 2
    eta = 0.4 * here / (g @ g)  # the longest step: both measures grow with the step in a parabola
    after = (curvature * (p - eta * g) ** 2).sum() / 2
    np.testing.assert_allclose(found["batch_loss"], here, rtol=1e-5)
    np.testing.assert_allclose(found["missed"], (after - (here - 0.4 * here)) / (0.4 * here), rtol=1e-4)
    np.testing.assert_allclose(found["changed"], eta * np.linalg.norm(curvature * g) / np.linalg.norm(g), rtol=1e-4)


def test_a_larger_network_of_the_same_function_is_as_smooth():
    """With twice the weights and half the inputs the gradient is half as large, and the step four times as long."""

    def loss(scale):
        return lambda params: jnp.log1p(jnp.exp(-scale * params["p"])).sum()

    one, other = (smoothness.along_gradient(loss(s), {"p": jnp.array([0.3, -1.0]) / s}) for s in (1.0, 0.5))
    for name in smoothness.SMOOTH:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4)


def test_the_probe_averages_over_batches_and_measures_one_update():
    """Of a network of one unit of each kind, written by hand."""
    study = smoothness.Smoothness(batch_size=2, batches=2)
    images = jnp.array([[1.0], [2.0], [3.0], [-1.0], [9.0]])
    labels = jnp.array([0, 1, 1, 0, 0])
    params, rate = [{"kernel": jnp.array([[0.5]])}, {"kernel": jnp.array([[1.0, -1.0]])}], 0.2

    def apply(params, state, x, train, activation=jax.nn.sigmoid):
        return activation(x @ params[0]["kernel"]) @ params[1]["kernel"], state

    view = train.View(images, labels, {"rate": jnp.float32(rate)}, images, labels)
    found = study._probe(apply, "sigmoid", "plain")(params, (), view)

    def gradient(rows):
        """Of the loss -log(sigmoid(+-2 w2 h)), where h is the hidden unit, by the kernels (w1, (v, -v))."""
        total = np.zeros(3)
        for x, label in zip(np.asarray(images)[rows, 0], np.asarray(labels)[rows], strict=True):
            h = 1 / (1 + np.exp(-0.5 * x))
            first = 1 / (1 + np.exp(-2 * h))  # the probability of class 0
            error = np.array([first, 1 - first]) - np.eye(2)[label]
            total += np.array([(error[0] - error[1]) * h * (1 - h) * x, error[0] * h, error[1] * h]) / len(rows)
        return total

    moved = 0.5 - rate * gradient([0, 1])[0]
    before, after = (np.median(np.asarray(images)[:, 0] * w) for w in (0.5, moved))
    low, high = np.percentile(np.asarray(images)[:, 0] * 0.5, (15, 85))
    np.testing.assert_allclose(found["median"], [before], rtol=1e-5)
    np.testing.assert_allclose(found["shift"], abs(after - before) / ((high - low) / 2), rtol=1e-3)
    each = [
        smoothness.along_gradient(lambda p, b=b: _loss(apply, p, images[b], labels[b]), params)
        for b in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(found["batch_loss"], (each[0]["batch_loss"] + each[1]["batch_loss"]) / 2, rtol=1e-5)
    for name in smoothness.SMOOTH:
        np.testing.assert_allclose(found[name], np.sqrt(each[0][name] * each[1][name]), rtol=1e-3)


def _loss(apply, params, x, labels):
    logits, _ = apply(params, (), x, True)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


@pytest.mark.parametrize("shape", [(4000, 3), (250, 4, 4, 3)])
def test_noise_after_batch_normalization_is_of_the_stated_size_and_only_in_training(rng, shape):
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params, bn_state = bnjax.bn_init(3)
    _, (state,) = smoothness.noisy_init(jax.random.key(1), lambda key: (params, [bn_state]))
    y, new = smoothness.noisy_bn_apply(params, state, x, True)
    y = np.asarray(y).reshape(-1, 3)
    assert (np.abs(y.mean(0)) < 0.51).all()
    assert (np.abs(y.mean(0)) > 1e-3).any()
    # s about a deviation in [1, 1.25] with 0.1, m about its mean with a width of 0.2.
    spread = np.sqrt(np.array([1, 1.25]) ** 2 + 0.1**2 + 0.2**2 / 12)
    assert (y.std(0) > 0.97 * spread[0]).all()
    assert (y.std(0) < 1.03 * spread[1]).all()
    again, _ = smoothness.noisy_bn_apply(params, new, x, True)
    assert np.abs(np.asarray(again).reshape(-1, 3).mean(0) - y.mean(0)).max() > 1e-2  # drawn anew
    evaluated, _ = smoothness.noisy_bn_apply(params, state, x, False)
    expected, _ = bnjax.bn_apply(params, bn_state, x, False)
    np.testing.assert_array_equal(evaluated, expected)


def test_the_summary_of_a_run_has_the_drift_of_all_units():
    median = [np.array([0.0, 5.0, 1.0]), np.array([2.0, 5.0, 1.0]), np.array([2.0, 5.0, 4.0])]
    values = {"median": median, "spread": [np.array([1.0, 1.0, 2.0])] * 3, "shift": [0.1, 0.2, 0.3], "test_loss": 1.0}
    steps, kept = smoothness._with_drift([0, 1, 2], values)
    assert (steps, kept.keys()) == ([0, 1, 2], {"drift", "shift", "test_loss"})
    # Linear between evaluations, of which the middle one therefore counts twice: the medians 0, 2, 2, 2 and 1, 1, 1, 4.
    deviations = np.std([0, 2, 2, 2]), 0, np.std([1, 1, 1, 4]) / 2
    np.testing.assert_allclose(kept["drift"], [np.mean(deviations)], rtol=1e-6)
    assert smoothness._with_drift([0], {"missed": [1.0]}) == ([0], {"missed": [1.0]})


def a_run(record, name, seed, reaches, factor=1.0, jump=1.0):
    """A run whose loss falls to 0.05 log(10) at a step, in smaller steps through all levels before it."""
    steps = [0, 1, 2, 3, reaches, reaches + 100]
    loss = [1.2, 0.8, 0.6, 0.2, 0.05, 0.05]
    values = {
        "loss": [np.nan, *np.multiply(loss[1:], LOG10)],
        "validation_accuracy": [0.1, 0.5, 0.6, 0.95, 0.99, 0.99],
        "test_accuracy": 0.9,
        "batch_loss": np.multiply(loss, LOG10),
        "missed": [factor] * 6,
        "changed": [factor**2] * 6,
        "drift": [jump],
        "shift": [0.25 * jump] * 6,
    }
    record.add(name, seed, steps, values)


def test_effects_compare_at_equal_loss_and_the_noisy_arm_at_its_own_rate(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for arm, best in (("plain", 1), ("noise after it", 10)):
        for rate in (0.1, 1, 10, 100):
            for seed in lab.TUNING_SEEDS:
                values = {"validation_accuracy": [0.1, 0.9 if rate == best else 0.2]}
                record.add(lab.tuning(f"sigmoid, {arm}", rate), seed, (0, 4), values)
    for seed in (0, 1):
        a_run(record, "sigmoid, plain@1", seed, 80, factor=2 + seed)
        a_run(record, "sigmoid, batch normalization@1", seed, 8)
        a_run(record, "sigmoid, noise after it@10", seed, 20, jump=3.0)
    study = smoothness.Smoothness(seeds=2, first_seed=0, networks=("sigmoid",))
    effects = study.judge(record.metrics([*lab.TUNING_SEEDS, 0, 1], 10)).effects
    np.testing.assert_allclose(effects["sigmoid, missed"], [2, 3], rtol=1e-3)
    np.testing.assert_allclose(effects["sigmoid, changed"], [4, 9], rtol=1e-3)
    for measure in ("drift", "shift"):
        np.testing.assert_allclose(effects[f"sigmoid, noise, {measure}"], 3, rtol=1e-3)
    # The logarithm of the loss falls from 0.2 to 0.05 from step 3 on, and is at 0.1 log(10) half way.
    np.testing.assert_allclose(effects["sigmoid, noise, loss"], (3 + 80) / (3 + 20), rtol=1e-3)
    plain, noisy = ((0.7 + 0.45 + 0.225 + 0.03 * (step - 3) + 1) / (step + 100) for step in (80, 20))
    np.testing.assert_allclose(effects["sigmoid, noise, error"], plain / noisy, rtol=1e-3)
    decided = {part.name: part for part in protocol.decide(study.PARTS, repeated(effects))}
    assert decided["sigmoid, changed"].verdict == protocol.HOLDS
    assert decided["sigmoid, noise, shift"].verdict == protocol.HOLDS
    assert decided["convolutional, missed"].verdict == protocol.UNDECIDED


def test_the_mean_error_of_a_diverged_network_is_that_of_one_always_wrong():
    accuracy = np.array([[0.5, np.nan, np.nan], [1.0, 1.0, 0.5]])
    series = runs.Series((0, 1), np.array([0, 2, 10]), {"validation_accuracy": accuracy})
    np.testing.assert_allclose(curves.mean_error(series), [(2 * 0.75 + 8) / 10, (8 * 0.25) / 10])
