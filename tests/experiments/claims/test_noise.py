"""Noise: arms that differ only in the statistics of a batch, and the verdict from given curves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.claims import noise
from experiments.harness import data, lab, runs, train
from experiments.models import networks
from tests.support import reference


@pytest.fixture
def population(rng):
    return rng.standard_normal((12, 4)).astype(np.float32) * 3 + 1


def network(arm, hidden=(5, 5)):
    layers = [networks.Layer(features) for features in (*hidden, 3)]
    options = {"layers": layers, "shape": (2, 2), "momentum": 0.9}

    def init(key):
        return networks.init(key, 4, layers, networks.he, True)

    def apply(params, state, x, train, *, axis_name=None, **more):
        return networks.apply(params, state, x, train, **{**options, **more})

    return noise.normalized_by(networks.Network(init, apply), arm)


def trained(arm, population, x):
    """Logits, gradients and the new state of a training step's loss."""
    init, apply = network(arm)
    params, state = init(jax.random.key(0), images=population)

    @jax.jit
    def step(params):
        logits, new = apply(params, state, x, True, mask=jnp.ones((len(x), 1), bool))
        return (logits**2).mean() + logits[:, 0].mean(), (logits, new)

    (_, (logits, new)), gradients = jax.value_and_grad(step, has_aux=True)(params)
    return params, logits, gradients, new


@pytest.mark.parametrize("arm", noise.ARMS[:2])
def test_batch_of_all_images_gives_all_arms_the_same_numbers(arm, population):
    """Without noise, because each arm's statistics are then those of all training images."""
    _, logits, gradients, _ = trained(noise.ARMS[2], population, population)
    _, other, other_gradients, _ = trained(arm, population, population)
    np.testing.assert_allclose(logits, other, rtol=2e-4, atol=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), gradients, other_gradients)


def forward(params, x, of):
    """Logits of x by float64 NumPy, each layer normalized by the statistics of the rows `of`, which pass too."""
    for layer in params[:-1]:
        x, of = np.float64(x) @ layer["kernel"], np.float64(of) @ layer["kernel"]
        _, mean, var = reference.moments(of)
        x, of = (np.maximum(reference.normalize(each, mean, var, 1, 0), 0) for each in (x, of))
    return x @ params[-1]["kernel"]


def test_each_arm_normalizes_by_its_own_statistics(population):
    x = population[:6]
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 100))[1]
    other = population[jax.random.permutation(key, 12)[:6]]
    assert not np.array_equal(np.sort(x, 0), np.sort(other, 0))
    for arm, of in zip(noise.ARMS, (x, population, other), strict=True):
        params, logits, _, new = trained(arm, population, x)
        np.testing.assert_allclose(logits, forward(params, x, of), rtol=2e-3, atol=2e-3, err_msg=arm)
        assert not np.array_equal(*map(jax.random.key_data, (new["key"], jax.random.fold_in(jax.random.key(0), 100))))


def test_noise_has_no_derivative(population):
    """The gradient of the noisy arm by finite differences, in float64, with the noise m and s of the layer held."""
    x, init = population[:6], network(noise.ARMS[2], (5,)).init
    params, state = init(jax.random.key(0), images=population)
    other = np.asarray(jax.random.permutation(jax.random.split(state["key"])[1], 12)[:6])

    def normalized(kernel):
        _, mean, var = reference.moments(np.float64(population) @ kernel)
        return (reference.normalize(np.float64(each) @ kernel, mean, var, 1, 0) for each in (x, population[other]))

    kernel = np.float64(params[0]["kernel"])
    _, held = normalized(kernel)
    m, s = held.mean(0), np.sqrt(held.var(0) + 1e-5)

    def loss(kernel):
        y, _ = normalized(kernel)
        return float((np.maximum((y - m) / s, 0) @ np.float64(params[1]["kernel"])).sum())

    steps = 1e-5 * np.eye(20).reshape(20, 4, 5)
    expected = [(loss(kernel + step) - loss(kernel - step)) / 2e-5 for step in steps]
    apply = network(noise.ARMS[2], (5,)).apply
    found = jax.jit(
        jax.grad(lambda kernel: apply([{**params[0], "kernel": kernel}, params[1]], state, x, True)[0].sum())
    )
    np.testing.assert_allclose(found(params[0]["kernel"]).ravel(), expected, rtol=2e-3, atol=2e-3)


def test_evaluation_uses_the_statistics_of_all_training_images_in_every_arm(population):
    x = population[:3] + 1
    for arm in noise.ARMS:
        init, apply = network(arm)
        params, state = init(jax.random.key(0), images=population)
        logits, new = apply(params, state, x, False)
        np.testing.assert_allclose(logits, forward(params, x, population), rtol=2e-3, atol=2e-3)
        assert new is state


def test_each_run_has_the_training_images_of_its_own_seed():
    digits = data.digits()
    splits = data.splits(digits, [3, 4], train=20)

    def init(key, images):
        return {"kernel": jnp.zeros((64, 10))}, {"images": jnp.asarray(images)}

    def probe(params, state, view):
        return {"different": jnp.abs(state["images"] - view.images).max(), "sum": state["images"].sum()}

    each = train.fit(
        init,
        lambda params, state, x, train, **_: (x @ params["kernel"], state),
        lambda: optax.sgd(0.1),
        splits,
        seeds=[3, 4],
        steps=1,
        batch_size=10,
        eval_every=1,
        probe=probe,
        with_images=True,
    )
    values = next(each).values
    np.testing.assert_array_equal(values["different"], [0, 0])
    assert values["sum"][0] != values["sum"][1]


def test_effects_are_ratios_at_the_rates_of_each_measure(tmp_path):
    record, steps = runs.Record(tmp_path / "metrics.jsonl"), [0, 10, 20]
    for i, arm in enumerate(noise.ARMS):
        for rate, accuracy, loss in ((0.01, 0.1, 3.0), (0.1, 0.5, 1.0), (1, 0.6, 2.0), (3, 0.1, 9.0)):
            # The gap at the target, which only the rates from 0.1 on reach in time, is smallest for the rate 1.
            trained = [0.1 if rate > 0.01 else 2.3, 0.1]
            values = {"train_loss": [2.3, *trained], "validation_loss": [3.0, 3 - accuracy, loss]}
            record.add(lab.tuning(arm, rate), 900, steps, values)
        for seed in (1000, 1001):
            ends = {"test_loss": (2.0, 4.0, 2.5)[i] + seed - 1000, "test_accuracy": 0.8}
            curve = {"train_loss": [2.3, 1.0, 0.5], "validation_loss": [2.3, 2.0, 2.0]}
            record.add(lab.at(arm, 0.1), seed, steps, {**curve, **ends})
            # The target, 0.1 log(10) = 0.230, is half way between the two last evaluations.
            target = 0.1 * np.log(10)
            curve["train_loss"] = [2.3, target + 0.1, target - 0.1]
            curve["validation_loss"] = [2.3, target + 0.1 + (i + 1), target - 0.1 + (i + 1)]
            record.add(lab.at(arm, 1), seed, steps, {**curve, "test_loss": 99.0, "test_accuracy": 0.1})
    experiment = noise.Noise(seeds=2)
    finding = experiment.judge(record.metrics([900, 1000, 1001], 10))
    expected = [[4 / 2, 5 / 3], [4 / 2.5, 5 / 3.5], [2 / 1] * 2, [2 / 3] * 2]
    for part, values in zip(noise.Noise.PARTS, expected, strict=True):
        np.testing.assert_allclose(finding.effects[part.name], values, rtol=1e-4)
        assert finding.remarks[part.name] == ""


def test_a_rate_at_the_edge_of_the_grid_is_remarked(tmp_path):
    record = runs.Record(tmp_path / "metrics.jsonl")
    for arm in noise.ARMS:
        for rate in (0.1, 1, 3):
            loss = [2.0, 1.8, 1.0] if rate == 1 else [2.0, 2.0, 2.0]
            loss = [2.0, 2.0, 0.1] if rate == 3 and arm == "batch" else loss
            values = {"train_loss": [2.0, 0.1, 0.1], "validation_loss": loss}
            record.add(lab.tuning(arm, rate), 900, [0, 1, 2], values)
        for rate in (1, 3):
            curves = {"train_loss": [2.0, 0.1], "validation_loss": [2.0, 1.0], "test_loss": 1.0, "test_accuracy": 0.5}
            record.add(lab.at(arm, rate), 1000, [0, 1], curves)
    remarks = noise.Noise(seeds=1).judge(record.metrics([900, 1000], 10)).remarks
    edge = "the best learning rate of batch, 3, is at the edge of its grid"
    assert [*remarks.values()] == [edge, "", "", ""]


def test_rejects_a_batch_that_does_not_divide_the_images():
    with pytest.raises(data.InputError, match="images=200, batch_size=30: expected a multiple"):
        noise.Noise(batch_size=30)
