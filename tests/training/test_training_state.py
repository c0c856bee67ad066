"""What a training step does with metrics and with collections other than parameters and running statistics."""

from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import bnjax.linen
import bnjax.nnx
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


# A state that was given away


def step_of(x, **options):
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    state = start(layer, x)
    return state, training.train_step(lambda model, x, train: model(x).sum(), **options)


def test_a_state_that_was_given_away_is_named_with_what_to_do(x):
    state, step = step_of(x)
    kept = jax.tree.map(jnp.copy, state)
    new, _ = step(state, x)
    advice = r"Go on with the state that the step returned.*jax\.tree\.map\(jnp\.copy, state\).*donate=False"
    with pytest.raises(ValueError, match=rf"^train_step\(...\)\(state=...\): state\.step was deleted.*{advice}"):
        step(state, x)
    evaluate = training.eval_step(lambda model, x, train: model(x).sum())
    averaged = new.replace(params=state.params)
    for call, run in {"train_step": step, "eval_step": evaluate}.items():
        with pytest.raises(ValueError, match=rf"^{call}\(...\)\(state=...\): state\.params\['bias'\] was deleted"):
            run(averaged, x)
    with pytest.raises(ValueError, match=r"^TrainState\.create\(params=...\): params\['bias'\] was deleted"):
        training.TrainState.create(apply_fn=state.apply_fn, tx=optax.sgd(0.0), params=state.params)
    # Both remedies.
    again, _ = step(kept, x)
    np.testing.assert_array_equal(again.batch_stats["mean"], new.batch_stats["mean"])
    state, step = step_of(x, donate=False)
    for _ in range(2):
        again, _ = step(state, x)
    np.testing.assert_array_equal(again.batch_stats["mean"], new.batch_stats["mean"])


@pytest.mark.usefixtures("flax_promotion")
def test_the_variables_and_keys_given_to_create_stay_usable(x):
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    variables, keys = layer.init(KEY, x), {"dropout": jax.random.key(1), "raw": jax.random.PRNGKey(2)}
    state = training.TrainState.create(apply_fn=layer.apply, tx=optax.adam(0.1), rngs=keys, **variables)
    training.train_step(lambda model, x, train: model(x).sum())(state, x)
    y = layer.apply(variables, x, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-5)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(keys))


def test_a_step_has_the_methods_of_a_compiled_function(x):
    state, step = step_of(x)
    assert "stablehlo" in step.lower(state, x).as_text()
    assert int(jax.jit(lambda s: step(s, x)[0])(state).step) == 1


# Saving by flax.serialization


def saved_and_restored(state, target):
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (a, b))
        np.testing.assert_array_equal(a, b)


class Mine(training.TrainState):
    """A subclass with a field of its own."""

    extra: Any = None


@pytest.mark.usefixtures("flax_promotion")
@pytest.mark.parametrize("kind", [training.TrainState, Mine])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "raw", None])
def test_a_state_goes_through_bytes_with_its_keys(kind, impl, x):
    def create(seed):
        keys = {"raw": jax.random.PRNGKey, None: lambda seed: None}
        key = keys.get(impl, lambda seed: jax.random.key(seed, impl=impl))(seed)
        others = {"extra": key} if kind is Mine else {}
        layer = bnjax.linen.BatchNorm(use_running_average=False, momentum=bnjax.cumulative_average)
        variables = jax.tree.map(lambda v: v + seed, layer.init(KEY, x))
        cache = {} if key is None else {"cache": {"key": key, "several": jnp.stack([key, key])}}
        rngs = None if key is None else {"dropout": key}
        return kind.create(apply_fn=layer.apply, tx=optax.adam(0.1), rngs=rngs, **variables, **cache, **others)

    state = create(1)
    restored = saved_and_restored(state, create(2))
    assert type(restored) is kind
    assert_equal(restored, state.replace(apply_fn=restored.apply_fn, tx=restored.tx))
    if impl is not None:
        drawn = (jax.random.bits(s.rngs["dropout"]) for s in (restored, state))
        np.testing.assert_array_equal(*drawn)
    step = training.train_step(lambda model, x, train: model(x).sum(), donate=False)
    np.testing.assert_array_equal(*(step(s, x)[0].batch_stats["var"] for s in (restored, state)))


@pytest.mark.usefixtures("flax_promotion")
def test_the_state_of_an_nnx_model_goes_through_bytes(x):
    def create(seed):
        rngs = nnx.Rngs(seed)
        model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
        apply, variables = bnjax.nnx.functional(model)
        noise = optax.add_noise(0.1, 0.5, jax.random.key(seed))  # its state holds a key
        state = training.TrainState.create(apply_fn=apply, tx=optax.chain(noise, optax.adam(0.1)), **variables)
        return training.train_step(lambda model, x, train: jnp.sum(model(x) ** 3))(state, x)[0]

    state, target = create(1), create(2)
    restored = saved_and_restored(state, target)
    assert_equal(restored, state.replace(apply_fn=target.apply_fn, tx=target.tx))
    assert isinstance(restored.params, nnx.State)


def test_restoring_other_fields_is_an_error(x):
    state, _ = step_of(x)
    saved = flax.serialization.to_state_dict(state)
    with pytest.raises(
        ValueError, match=r"TrainState: expected the fields \['batch_stats', .*, got \['batch_stats', .*"
    ):
        flax.serialization.from_state_dict(state, {k: v for k, v in saved.items() if k != "rngs"})
