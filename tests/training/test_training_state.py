"""What a training step does with metrics and with collections other than parameters and running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import bnjax.linen
from bnjax import training

KEY = jax.random.key(0)
PARTS = [1, 2, 4]


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, (8, 3)).astype(np.float32)


def start(model, x, **kwargs):
    return training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.0), **model.init(KEY, x), **kwargs)


def run(loss, x, accumulate, model=None):
    model = bnjax.linen.BatchNorm(use_running_average=False) if model is None else model
    return training.train_step(loss, accumulate=accumulate, donate=False)(start(model, x), x)


@pytest.mark.parametrize("accumulate", PARTS)
def test_metrics_are_those_of_the_whole_batch(x, accumulate):
    def loss(model, x, train):
        above = x > 1
        return jnp.sum(model(x)) * 0, {
            "count": jnp.sum(above),
            "counts": jnp.sum(above, 0, dtype=jnp.uint8),
            "rows": jnp.int8(len(x)),
            "mean": jnp.mean(x),
            "means": jnp.mean(x, 0),
            "half": jnp.float16(40000.0),
            "complex": jnp.mean(x.astype(jnp.complex64) * 1j),
        }

    _, metrics = run(loss, x, accumulate)
    wide = x.astype(np.float64)
    assert metrics["count"] == (wide > 1).sum()
    np.testing.assert_array_equal(metrics["counts"], (wide > 1).sum(0))
    assert metrics["rows"] == 8
    assert jnp.issubdtype(metrics["count"].dtype, jnp.integer)
    np.testing.assert_allclose(metrics["mean"], wide.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["means"], wide.mean(0), rtol=1e-6)
    assert float(metrics["half"]) == 40000  # whose sum leaves float16
    np.testing.assert_allclose(metrics["complex"], 1j * wide.mean(), rtol=1e-6)


def test_counts_of_micro_batches_leave_a_narrow_dtype(x):
    _, metrics = run(lambda model, x, train: (model(x).sum(), {"count": jnp.int8(100)}), x, 4)
    assert metrics["count"] == 400


def test_train_step_rejects_metrics_that_micro_batches_cannot_be_combined_in(x):
    with pytest.raises(TypeError, match=r"the metric 'finite' is bool.*Return a fraction.*or an integer count"):
        run(lambda model, x, train: (model(x).sum(), {"finite": jnp.isfinite(x).all()}), x, 2)
    with pytest.raises(ValueError, match=r"'each' has shape \(4,\) for a micro-batch and \(8,\) for the batch"):
        run(lambda model, x, train: (model(x).sum(), {"each": x.sum(1)}), x, 2)
    _, metrics = run(lambda model, x, train: (model(x).sum(), {"each": x.sum(1)}), x, 1)
    np.testing.assert_array_equal(metrics["each"], x.sum(1))


@pytest.mark.parametrize("accumulate", PARTS)
def test_train_step_rejects_results_that_are_no_loss_and_metrics(x, accumulate):
    with pytest.raises(TypeError, match=r"loss\(...\): expected the loss, or.*got a list of metrics"):
        run(lambda model, x, train: (model(x).sum(), [x.sum()]), x, accumulate)
    with pytest.raises(TypeError, match=r"loss\(...\): expected the loss, or.*got a .*Tracer of metrics"):
        run(lambda model, x, train: (model(x).sum(), x.sum()), x, accumulate)
    with pytest.raises(TypeError, match=r"loss\(...\): expected the loss, or.*got tuple"):
        run(lambda model, x, train: (model(x).sum(), {}, {}), x, accumulate)


def test_train_step_rejects_the_state_of_flax(x):
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    state = train_state.TrainState.create(apply_fn=layer.apply, params=layer.init(KEY, x)["params"], tx=optax.sgd(0.1))
    for step in (training.train_step, training.eval_step):
        with pytest.raises(TypeError, match=r"expected bnjax.training.TrainState, got flax.training.train_state.Train"):
            step(lambda model, x, train: model(x).sum())(state, x)


class Seen(nn.Module):
    """Counts and averages of its own, beside statistics: what a cache, spectral normalization or metrics do."""

    @nn.compact
    def __call__(self, x):
        rows = self.variable("metrics", "rows", lambda: jnp.zeros((), jnp.int32))
        largest = self.variable("cache", "largest", lambda: jnp.full(x.shape[1:], -jnp.inf))
        train = self.is_mutable_collection("metrics")
        y = bnjax.linen.BatchNorm(use_running_average=not train)(x)
        if train and not self.is_initializing():
            rows.value += len(x)
            largest.value = jnp.maximum(largest.value, x.max(0))
        self.sow("intermediates", "y", y)
        return y * rows.value.astype(y.dtype)


@pytest.mark.parametrize("accumulate", PARTS)
def test_other_collections_go_from_call_to_call(x, accumulate):
    state = start(Seen(), x)
    assert sorted(state.collections) == ["cache", "metrics"]
    step = training.train_step(lambda model, x, train: model(x).sum(), accumulate=accumulate)
    for steps in (1, 2):
        state, _ = step(state, x * steps)
        assert state.collections["metrics"]["rows"] == 8 * steps
    np.testing.assert_array_equal(state.collections["cache"]["largest"], np.maximum(x.max(0), 2 * x.max(0)))
    assert jax.tree.structure(state.collections) == jax.tree.structure(start(Seen(), x).collections)
    evaluated = training.eval_step(lambda model, x, train: jnp.abs(model(x)).sum())(state, x)["loss"]
    plain = Seen().apply({"params": state.params, "batch_stats": state.batch_stats, **state.collections}, x)
    np.testing.assert_allclose(evaluated, jnp.abs(plain).sum(), rtol=1e-6)


def test_spectral_normalization_of_flax_trains_beside_batch_normalization(x):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
            return bnjax.linen.BatchNorm(use_running_average=not train)(x)

    variables = Network().init(KEY, x, False)
    state = training.TrainState.create(apply_fn=Network().apply, tx=optax.sgd(0.0), **variables)
    state, _ = training.train_step(lambda model, x, train: model(x, train).sum())(state, x)
    _, updates = Network().apply(variables, x, True, mutable=["batch_stats"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.batch_stats, updates["batch_stats"])


def test_accumulation_rejects_a_collection_that_changes_its_shape(x):
    class Growing(nn.Module):
        @nn.compact
        def __call__(self, x):
            rows = self.variable("cache", "rows", lambda: jnp.zeros((0, 3)))
            rows.value = jnp.concatenate([rows.value, x]) if not self.is_initializing() else rows.value
            return bnjax.linen.BatchNorm(use_running_average=False)(x)

    step = training.train_step(lambda model, x, train: model(x).sum(), accumulate=2)
    with pytest.raises(ValueError, match=r"the collection 'cache' changes from .*\(0, 3\).* to .*\(4, 3\)"):
        step(start(Growing(), x), x)


def test_create_rejects_what_is_no_collection(x):
    with pytest.raises(TypeError, match=r"TrainState.create\(ema=...\): expected a collection of variables, got float"):
        start(bnjax.linen.BatchNorm(use_running_average=False), x, ema=0.9)
