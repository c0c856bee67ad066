"""Diagnosis of running statistics: networks broken on purpose, each in one way, and healthy ones."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.diagnosis.limits import BATCH, SCALE
from bnjax.diagnosis.measure import diagnose
from experiments.harness import data
from tests.support.diagnosis import COLLECTED, EPSILON, summary

pytestmark = pytest.mark.usefixtures("flax_promotion")


class Perceptron(nn.Module):
    momentum: float = 0.9
    before: bool = True  # normalize before the nonlinearity
    depth: int = 2

    @nn.compact
    def __call__(self, x, train):
        for _ in range(self.depth):
            norm = bnjax.linen.BatchNorm(use_running_average=not train, momentum=self.momentum)
            x = nn.Dense(32)(x)
            x = nn.relu(norm(x)) if self.before else norm(nn.relu(x))
        return nn.Dense(10)(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = partial(bnjax.linen.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), (2, 2))(x.reshape(-1, 8, 8, 1))))
        branch = norm(scale_init=nn.initializers.zeros)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(10)(nn.relu(x + branch).reshape(len(x), -1))


class NNXPerceptron(nnx.Module):
    def __init__(self, momentum=0.9):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = bnjax.nnx.BatchNorm(32, momentum=momentum, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.norm(self.hidden(x))))


@pytest.fixture(scope="module")
def digits():
    """Images around 0 with a standard deviation of 1 over all, and labels."""
    images = data.digits().train_images.reshape(-1, 64)
    return (images - images.mean()) / images.std(), data.digits().train_labels


@functools.cache
def network(name):
    """The call of a network, its variables at the start, and a function that trains it.

    The call is in training if something is mutable. `trained(variables, digits, steps, rate, carry)`
    takes steps of Adam; without `carry` each throws away the running statistics.
    """
    model, batch, _ = NETWORKS[name]
    if isinstance(model, nnx.Module):
        apply, variables = bnjax.nnx.functional(model)
    else:

        def apply(variables, x, mutable=()):
            return model.apply(variables, x, bool(mutable), mutable=mutable or False)

        variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), jnp.zeros((2, 64)), False)
    tx = optax.scale_by_adam()

    @jax.jit
    def all_steps(variables, digits, steps, rate, carry):
        images, labels = digits

        def step(i, state):
            params, stats, opt_state = state
            places = (i * batch + jnp.arange(batch)) % len(images)

            def loss(params):
                logits, updates = apply(
                    {"params": params, "batch_stats": stats}, images[places], mutable=["batch_stats"]
                )
                values = optax.softmax_cross_entropy_with_integer_labels(logits, labels[places])
                return values.mean(), updates["batch_stats"]

            gradients, new = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(gradients, opt_state)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return params, jax.tree.map(lambda n, o: jnp.where(carry, n, o), new, stats), opt_state

        params, stats = variables["params"], variables["batch_stats"]
        params, stats, _ = jax.lax.fori_loop(0, steps, step, (params, stats, tx.init(params)))
        return {"params": params, "batch_stats": stats}

    def trained(variables, digits, steps=300, rate=1e-3, carry=True):
        return all_steps(variables, digits, steps, rate, carry)  # compiled once, whatever is left out

    compiled = jax.jit(apply, static_argnames="mutable")
    return lambda variables, x, mutable=(): compiled(variables, x, mutable=tuple(mutable)), variables, trained


def beside(apply, variables, x, **options):
    """The diagnosis of variables compared with the batch x."""
    moments = apply(variables, x, mutable=COLLECTED)[1]["batch_moments"]
    return diagnose(variables["params"], variables["batch_stats"], moments, **options)


def by_numpy(state, batch):
    """Shift and ratio of variances in float64, from the definitions, for a batch of shape (examples, features)."""
    mean, var = (np.asarray(state[name], np.float64) for name in ("mean", "var"))
    batch = np.asarray(batch, np.float64)
    return (
        abs(mean - batch.mean(0)) / np.sqrt(batch.var(0) + EPSILON),
        (var + EPSILON) / (batch.var(0) + EPSILON),
    )


def damage(params, state, batch):
    """The root mean square of the output in evaluation minus that in training, over that of the scales if less."""
    scale = np.asarray(params["scale"], np.float64)
    mean, var = (np.asarray(state[name], np.float64) for name in ("mean", "var"))
    batch = np.asarray(batch, np.float64)
    evaluated = scale * (batch - mean) / np.sqrt(var + EPSILON)
    trained = scale * (batch - batch.mean(0)) / np.sqrt(batch.var(0) + EPSILON)
    usual = np.maximum(abs(scale), np.sqrt(np.mean(scale**2)))
    return np.sqrt(np.mean((evaluated - trained) ** 2, 0)) / usual


def first_layer(variables, x):
    """What the first layer of batch normalization of a Perceptron that normalizes first sees, in float64."""
    dense = {name: np.asarray(v, np.float64) for name, v in variables["params"]["Dense_0"].items()}
    return x.astype(np.float64) @ dense["kernel"] + dense["bias"]


# The model, the size of its batches, and the number of steps, after which each is right on 95% of its data or more, in
# evaluation as in training.
NETWORKS = {
    "normalized before ReLU": (Perceptron(), 100, 300),
    "after ReLU, long memory": (Perceptron(0.99, before=False, depth=1), 100, 1000),
    "residual, small batches": (Residual(), 32, 500),
    "nnx, long memory, small batches": (NNXPerceptron(0.99), 32, 1000),
}
DEAR = {"residual, small batches", "after ReLU, long memory"}


@pytest.fixture
def healthy(digits):
    """The first of them: its call and its variables."""
    apply, variables, trained = network("normalized before ReLU")
    return apply, trained(variables, digits)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEAR)) for name in NETWORKS])
def test_diagnose_is_silent_on_healthy_networks(name, digits):
    _, size, steps = NETWORKS[name]
    apply, variables, trained = network(name)
    variables = trained(variables, digits, steps)
    assert np.mean(apply(variables, digits[0]).argmax(-1) == digits[1]) > 0.95
    for start in range(0, 10 * size, size):
        diagnosis = beside(apply, variables, digits[0][start : start + size])
        assert diagnosis.findings == []
        assert not diagnosis


def test_the_table_of_a_healthy_network_is_one_line(healthy, digits):
    apply, variables = healthy
    diagnosis = beside(apply, variables, digits[0][:100])
    assert str(diagnosis) == "findings: 0; layers: 2, compared with a batch: 2 (of effectively 100); features: 64"
    alone = diagnose(variables["params"], variables["batch_stats"])
    assert repr(alone) == "findings: 0; layers: 2, compared with a batch: 0; features: 64"
    report = alone.layers["BatchNorm_0"]
    assert (report.shift, report.var_ratio, report.effective_batch, report.count) == (None, None, None, None)


def test_statistics_that_were_not_carried_along_come_first(digits):
    for name, layers in (
        ("normalized before ReLU", ["BatchNorm_0", "BatchNorm_1"]),
        ("nnx, long memory, small batches", ["norm"]),
    ):
        apply, variables, trained = network(name)
        variables = trained(variables, digits, 50, carry=False)
        expected = [("error", layer, "never updated", (32, 32)) for layer in layers]
        assert summary(diagnose(variables["params"], variables["batch_stats"])) == expected
        diagnosis = beside(apply, variables, digits[0][:100])
        assert summary(diagnosis) == expected  # the distance to the batch is not a second finding
        assert "mutable" in diagnosis.findings[0].advice
        assert (diagnosis.layers[layers[0]].shift > 0).all()


@pytest.mark.parametrize(("scale", "shift"), [(1, 4), (20, 0), (1 / 20, 0)])
def test_other_data_than_in_training_show_in_shift_and_ratio(scale, shift, healthy, digits):
    apply, variables = healthy
    x = (scale * digits[0][:100] + shift).astype(np.float32)
    diagnosis = beside(apply, variables, x)
    shifts, ratios = by_numpy(variables["batch_stats"]["BatchNorm_0"], first_layer(variables, x))
    report = diagnosis.layers["BatchNorm_0"]
    np.testing.assert_allclose(report.shift, shifts, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(report.var_ratio, ratios, rtol=1e-4)
    harm = damage(
        variables["params"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"], first_layer(variables, x)
    )
    np.testing.assert_allclose(report.damage, harm, rtol=1e-4)
    found = {f.problem: f for f in diagnosis.findings if f.layer == "BatchNorm_0"}
    if shift:
        scale = np.asarray(variables["params"]["BatchNorm_0"]["scale"], np.float64)
        relevance = np.minimum(scale / np.sqrt(np.mean(scale**2)), 1)  # a feature of small scale does less
        off = relevance * shifts / np.sqrt(np.maximum(ratios, 1)) > 0.5 + 3 / np.sqrt(100)
        assert list(found) == ["mean shifted"]
        assert found["mean shifted"].features == (off.sum(), 32)
        np.testing.assert_allclose(found["mean shifted"].damage, harm.max(), rtol=1e-4)
        np.testing.assert_allclose(found["mean shifted"].value, shifts[harm.argmax()], rtol=1e-4)
        assert found["mean shifted"].indices == tuple(i for i in np.argsort(-harm) if off[i])
        assert diagnosis.findings[0].problem == "mean shifted"
    else:
        finding = found["variance differs"]
        assert (finding.severity, finding.features) == ("error", (32, 32))
        np.testing.assert_allclose(finding.damage, harm.max(), rtol=1e-4)
        np.testing.assert_allclose(finding.value, ratios[harm.argmax()], rtol=1e-4)
        assert diagnosis.findings[0] == finding
    assert "recalibrate" in diagnosis.findings[0].advice


def test_statistics_of_stale_weights_are_found_and_recalibrated(healthy, digits):
    apply, variables = healthy
    later = network("normalized before ReLU")[2](variables, digits, rate=1e-2)
    stale = {"params": later["params"], "batch_stats": variables["batch_stats"]}
    diagnosis = beside(apply, stale, digits[0][:100])
    assert {f.problem for f in diagnosis.findings} <= {"mean shifted", "variance differs"}
    assert {f.layer for f in diagnosis.findings} == {"BatchNorm_0", "BatchNorm_1"}
    shifts, ratios = by_numpy(stale["batch_stats"]["BatchNorm_0"], first_layer(stale, digits[0][:100]))
    np.testing.assert_allclose(diagnosis.layers["BatchNorm_0"].shift, shifts, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(diagnosis.layers["BatchNorm_0"].var_ratio, ratios, rtol=1e-3)
    mended = bnjax.recalibrate(apply, stale, [digits[0][i::3] for i in range(3)])
    assert beside(apply, mended, digits[0][:100]).findings == []


@pytest.mark.parametrize("dead", [5, 20, 32])
def test_relus_that_died_before_the_layer_are_dead_features(dead, digits):
    apply, variables, trained = network("after ReLU, long memory")
    variables = jax.tree.map(jnp.array, variables)
    variables["params"]["Dense_0"]["bias"] = jnp.asarray(np.where(np.arange(32) < dead, -100, 0), jnp.float32)
    variables = trained(variables, digits, 1500)  # 0.99^1500 of the initial variance are less than epsilon
    silent = np.maximum(first_layer(variables, digits[0]), 0).var(0) < EPSILON  # one more may die in training
    assert silent[:dead].all()
    severity = "warning" if silent.sum() > 16 else "note"
    for diagnosis in (
        diagnose(variables["params"], variables["batch_stats"]),
        beside(apply, variables, digits[0][:100]),
    ):
        expected = (severity, "BatchNorm_0", "dead features", (silent.sum(), 32))
        assert [f for f in summary(diagnosis) if f[1] == "BatchNorm_0"] == [expected]
        np.testing.assert_array_equal(diagnosis.layers["BatchNorm_0"].dead, silent)


def test_features_that_are_constant_in_the_batch_alone_are_dead_if_many(rng):
    x = rng.normal(0, 1, (64, 8)).astype(np.float32)
    params, state = bnjax.bn_init(8)
    _, state = bnjax.bn_apply(params, state, x, True, momentum=0.0)
    for constant, expected in (1, []), (2, [("note", "the model itself", "dead features", (2, 8))]):
        y = np.where(np.arange(8) < constant, x.mean(0), x)
        assert summary(diagnose(params, state, bnjax.batch_moments(y))) == expected


def test_scale_of_zero_is_noted_and_meant_at_the_start_of_a_residual_branch(digits):
    apply, variables, _ = network("residual, small batches")
    variables = jax.tree.map(jnp.array, variables)
    _, updates = apply(variables, digits[0][:64], mutable=["batch_stats"])
    diagnosis = diagnose(variables["params"], updates["batch_stats"])
    assert summary(diagnosis) == [("note", "BatchNorm_1", "zero scale", (8, 8))]
    assert "residual" in diagnosis.findings[0].advice
    scale = jnp.array([1.0, 0.0, -1.0, 0.5 * SCALE, 2 * SCALE, -0.5 * SCALE, 1.0, 1.0])
    variables["params"]["BatchNorm_1"]["scale"] = scale
    diagnosis = diagnose(variables["params"], updates["batch_stats"])
    assert summary(diagnosis) == [("note", "BatchNorm_1", "zero scale", (3, 8))]
    assert "decay_mask" in diagnosis.findings[0].advice


def test_what_is_not_finite_is_an_error_and_comes_first(healthy, digits):
    _, variables = healthy
    broken = jax.tree.map(np.array, variables)
    broken["batch_stats"]["BatchNorm_1"]["mean"][:3] = np.nan
    broken["batch_stats"]["BatchNorm_1"]["var"][3] = -0.5
    broken["params"]["BatchNorm_0"]["bias"][0] = np.inf
    broken["params"]["BatchNorm_1"]["scale"][:2] = np.nan
    broken["params"]["BatchNorm_1"]["scale"][2] = 0
    diagnosis = diagnose(broken["params"], broken["batch_stats"])
    assert summary(diagnosis) == [
        ("error", "BatchNorm_1", "non-finite statistics", (3, 32)),
        ("error", "BatchNorm_1", "non-finite scale", (2, 32)),
        ("error", "BatchNorm_0", "non-finite bias", (1, 32)),
        ("error", "BatchNorm_1", "negative variance", (1, 32)),
        ("note", "BatchNorm_1", "zero scale", (1, 32)),
    ]
    assert [f.value for f in diagnosis.findings] == [None, None, None, -0.5, None]
    assert diagnosis.layers["BatchNorm_1"].nonfinite.sum() == 4


def test_a_batch_that_is_not_finite_is_an_error_of_every_layer_that_it_reaches(healthy, digits):
    apply, variables = healthy
    x = digits[0][:100].copy()
    x[3, 7] = np.nan
    assert summary(beside(apply, variables, x)) == [
        ("error", layer, "non-finite batch", (32, 32)) for layer in ("BatchNorm_0", "BatchNorm_1")
    ]


def test_two_examples_on_each_device_are_a_small_batch_unless_devices_share(healthy, digits):
    _, variables = healthy
    x = digits[0][:16].reshape(8, 2, 64)

    class Shared(nn.Module):
        axis_name: str | None

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(32)(x)
            return bnjax.linen.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)

    def moments(axis_name):
        apply = partial(Shared(axis_name).apply, variables, mutable=COLLECTED)
        collected = jax.vmap(apply, axis_name="device")(x)[1]["batch_moments"]
        return jax.tree.map(lambda leaf: leaf[0], collected)

    alone = diagnose(variables["params"], variables["batch_stats"], moments(None))
    assert summary(alone) == [("warning", "BatchNorm_0", "small batch", (32, 32))]
    assert alone.findings[0].value == alone.layers["BatchNorm_0"].effective_batch == 2 < BATCH
    assert "axis_name" in alone.findings[0].advice
    assert diagnose(variables["params"], variables["batch_stats"], moments("device")).findings == []


def test_diagnose_rejects_moments_that_the_layers_of_flax_did_not_give():
    params, state = bnjax.bn_init(3)
    with pytest.raises(ValueError, match=r"diagnose\(batch_moments=...\).*convert the model by bnjax.linen.convert"):
        diagnose(params, state, {})
