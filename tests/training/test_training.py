"""Training: against a plain loop, accumulated against merged, and what the checkpoint policy saves."""

import re
from functools import cache, partial

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import training
from tests.support.comparison import assert_same

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)


class Network(nn.Module):
    norm: type = bnjax.linen.BatchNorm
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dense(8, use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(3)(x)


def loss(model, batch, train):
    logits = model(batch["x"], train)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return value, {"accuracy": jnp.mean(logits.argmax(-1) == batch["y"])}


@pytest.fixture
def batch(rng):
    return {"x": rng.normal(1, 2, (24, 5)).astype(np.float32), "y": rng.integers(0, 3, 24)}


@cache
def initialized(model):
    """The variables of a network for this batch."""
    return jax.jit(partial(model.init, train=False))(KEY, np.zeros((24, 5), np.float32))


def start(model, batch, tx=None, **fields):
    variables = initialized(model)
    tx = optax.adam(0.01) if tx is None else tx
    return training.TrainState.create(apply_fn=model.apply, tx=tx, **variables, **fields)


def test_steps_match_a_plain_loop(batch):
    model, tx = Network(), optax.adam(0.01)
    variables = initialized(model)
    params, stats, opt_state = variables["params"], variables["batch_stats"], tx.init(variables["params"])

    def plain(params, stats):
        variables = {"params": params, "batch_stats": stats}
        logits, updates = model.apply(variables, batch["x"], True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(24), batch["y"]]), updates["batch_stats"]

    @jax.jit
    def plain_step(params, stats, opt_state):
        (value, stats), gradients = jax.value_and_grad(plain, has_aux=True)(params, stats)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, value

    state, step = start(model, batch), training.train_step(loss)
    for _ in range(5):
        params, stats, opt_state, value = plain_step(params, stats, opt_state)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_same(state.params, params, 1e-4, 1e-5)
    assert_same(state.batch_stats, stats, 1e-5)
    assert state.step == 5
    logits = model.apply({"params": params, "batch_stats": stats}, batch["x"], False)
    metrics = training.eval_step(loss)(state, batch)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(-1) == batch["y"]), rtol=1e-6)
    expected = -jnp.mean(jax.nn.log_softmax(logits)[np.arange(24), batch["y"]])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_the_state_is_donated_unless_told_otherwise(batch):
    model = Network()
    variables = initialized(model)
    rngs = {"dropout": jax.random.key(1)}
    state = training.TrainState.create(apply_fn=model.apply, tx=optax.adam(0.01), rngs=rngs, **variables)
    training.train_step(loss, donate=False)(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    training.train_step(loss)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((variables, rngs)))  # the user's own


def moments_of_layers(model, variables, parts):
    """Per layer the moments of each part, by hand: one forward pass a part."""
    collect = jax.jit(partial(model.apply, train=True, mutable=["batch_stats", "batch_moments"]))
    for part in parts:
        _, seen = collect(variables, part)
        yield {name: layer["moments"] for name, layer in seen["batch_moments"].items()}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_averages_gradients_and_absorbs_the_merged_moments_once(batch, accumulate):
    model = Network()
    variables = initialized(model)
    parts = [{k: v[i::accumulate] for k, v in batch.items()} for i in range(accumulate)]
    state, metrics = training.train_step(loss, accumulate=accumulate)(start(model, batch, optax.sgd(1.0)), batch)
    seen = list(moments_of_layers(model, variables, [part["x"] for part in parts]))
    for name, before in variables["batch_stats"].items():
        merged = bnjax.merge_moments(*(layers[name] for layers in seen))
        np.testing.assert_allclose(state.batch_stats[name]["mean"], 0.1 * merged.mean, rtol=1e-4, atol=1e-6)
        expected = 0.9 * before["var"] + 0.1 * merged.var
        np.testing.assert_allclose(state.batch_stats[name]["var"], expected, rtol=1e-5)
    # The first layer's kernel is the same for all parts, so its merged moments are those of the whole batch.
    hidden = batch["x"].astype(np.float64) @ np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    np.testing.assert_allclose(state.batch_stats["BatchNorm_0"]["var"], 0.9 + 0.1 * hidden.var(0), rtol=1e-5)

    def value(params, part):
        bound = training.Model(model.apply, {**variables, "params": params}, ["batch_stats"], None)
        return loss(bound, part, True)[0]

    both = jax.jit(jax.value_and_grad(value))
    values, gradients = zip(*(both(variables["params"], part) for part in parts), strict=True)
    np.testing.assert_allclose(metrics["loss"], np.mean(values), rtol=1e-5)
    expected = jax.tree.map(lambda p, *g: p - np.mean(g, 0), variables["params"], *gradients)
    assert_same(state.params, expected, 1e-4, 1e-5)


def test_accumulation_counts_an_update_once_and_honours_real_weights(rng):
    """With a schedule, unbiased_var and weights: as one update by the whole batch, which a single layer sees alike."""
    x = rng.normal(2, 3, (12, 4)).astype(np.float32)
    weights = rng.random((12, 1)).astype(np.float32)
    model = bnjax.linen.BatchNorm(use_running_average=False, momentum=bnjax.cumulative_average, unbiased_var=True)

    def mean(model, batch, train):
        return jnp.mean(model(batch["x"], mask=batch["weights"]) ** 2)

    state = training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.0), **model.init(KEY, x))
    whole = {"x": x, "weights": weights}
    expected, _ = training.train_step(mean, donate=False)(state, whole)
    actual, _ = training.train_step(mean, accumulate=3)(state, whole)
    assert_same(actual.batch_stats, expected.batch_stats, 1e-5, 1e-6)
    np.testing.assert_array_equal(actual.batch_stats["count"], 1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_nnx_model_trains_the_same_way(batch, accumulate):
    class NNXNetwork(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(5, 8, use_bias=False, rngs=rngs)
            self.bn = bnjax.nnx.BatchNorm(8, momentum=0.0, rngs=rngs)
            self.out = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jax.nn.relu(self.bn(self.hidden(x))))

    def nnx_loss(model, batch, train):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()

    model = NNXNetwork(nnx.Rngs(0))
    hidden = batch["x"].astype(np.float64) @ np.asarray(model.hidden.kernel[...], np.float64)
    apply, variables = bnjax.nnx.functional(model)
    state = training.TrainState.create(apply_fn=apply, tx=optax.adam(0.01), **variables)
    step = training.train_step(nnx_loss, accumulate=accumulate, donate=False)
    state, first = step(state, batch)
    np.testing.assert_allclose(state.batch_stats["bn"]["var"][...], hidden.var(0), rtol=1e-5)
    for _ in range(20):
        state, last = step(state, batch)
    assert last["loss"] < first["loss"]
    nnx.update(model, state.params, state.batch_stats)
    model.eval()
    logits = model(batch["x"])
    expected = -jnp.mean(jax.nn.log_softmax(logits)[np.arange(24), batch["y"]])
    np.testing.assert_allclose(training.eval_step(nnx_loss)(state, batch)["loss"], expected, rtol=1e-5)


def test_every_step_and_micro_batch_draws_its_own_random_numbers(batch):
    drawn = []

    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, ())
            jax.debug.callback(lambda v: drawn.append(float(v)), jax.random.uniform(self.make_rng("noise")))
            return scale * x

    model = Noise()
    params = model.init({"params": KEY, "noise": KEY}, batch["x"])
    drawn.clear()
    state = training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.0), rngs={"noise": KEY}, **params)
    step = training.train_step(lambda model, batch, train: jnp.mean(model(batch["x"])), accumulate=2)
    for _ in range(2):
        state, _ = step(state, batch)
    jax.effects_barrier()
    # The shapes of a micro-batch are found by tracing, which draws nothing.
    assert len(drawn) == len(set(drawn)) == 4


def test_a_step_over_sharded_arrays_is_the_step_of_one_device(batch):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    results = []
    for accumulate in 1, 2:
        for shard in False, True:
            state, data = start(Network(), batch), batch
            if shard:
                state = jax.device_put(state, NamedSharding(mesh, P()))
                data = jax.device_put(batch, NamedSharding(mesh, P("data")))
            step = training.train_step(loss, accumulate=accumulate)
            for _ in range(3):
                state, metrics = step(state, data)
            results.append((state.params, state.batch_stats, metrics))
        assert_same(results[-1], results[-2], 1e-4, 1e-5)


def test_a_frozen_layer_stays_while_another_accumulates(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    model = nn.Sequential(
        [
            bnjax.linen.BatchNorm(use_running_average=True),
            bnjax.linen.BatchNorm(use_running_average=False, momentum=0.0),
        ]
    )
    variables = model.init(KEY, x)
    state = training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.0), **variables)
    state, _ = training.train_step(lambda model, x, train: model(x).mean(), accumulate=2)(state, x)
    frozen, trained = state.batch_stats["layers_0"], state.batch_stats["layers_1"]
    assert_same(frozen, variables["batch_stats"]["layers_0"], 0, 0)
    np.testing.assert_allclose(trained["mean"], x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(trained["var"], x.var(0), rtol=1e-4)


def test_a_state_of_frozen_dicts_keeps_its_structure(batch):
    variables = flax.core.freeze(initialized(Network()))
    state = training.TrainState.create(apply_fn=Network().apply, tx=optax.sgd(0.1), **variables)
    after, _ = training.train_step(loss, donate=False)(state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_metric_may_not_take_the_name_of_the_loss(batch):
    step = training.train_step(lambda model, batch, train: (model(batch["x"], train).mean(), {"loss": 0.0}))
    with pytest.raises(ValueError, match="metrics hold a 'loss'"):
        step(start(Network(), batch), batch)


def test_decay_mask_leaves_out_scale_and_bias_by_path():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "haiku": {"scale": jnp.ones((1, 1, 1, 4))},
        "bn": bnjax.BNParams(jnp.ones((2, 4)), None),
        "vector": jnp.ones(4),
        "list": [jnp.ones(2), {"bias": jnp.ones(())}],
        "scale": {"kernel": jnp.ones(2)},
        "block/~/bn": {"offset": jnp.ones(2), "scale": [jnp.ones(2)]},
        "flat/bn/bias": jnp.ones(2),
        "flat/kernel": jnp.ones(2),
    }
    assert training.decay_mask(params) == {
        "conv": {"kernel": True, "bias": False},
        "haiku": {"scale": False},
        "bn": bnjax.BNParams(False, None),
        "vector": True,
        "list": [True, {"bias": False}],
        "scale": {"kernel": True},
        "block/~/bn": {"offset": False, "scale": [False]},
        "flat/bn/bias": False,
        "flat/kernel": True,
    }
    assert training.decay_mask({("bn", "scale"): 1.0, ("dense", "kernel"): 1.0}) == {
        ("bn", "scale"): False,
        ("dense", "kernel"): True,
    }
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    masked = optax.masked(optax.add_decayed_weights(0.5), training.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, state)
    updates, _ = masked.update(zeros, masked.init(state), state)
    flat = {path[-1]: v[...] for path, v in nnx.to_flat_state(updates)}
    np.testing.assert_allclose(flat["kernel"], 0.5 * model.layers[0].kernel[...])
    np.testing.assert_array_equal(flat["scale"], 0)
    np.testing.assert_array_equal(flat["bias"], 0)


BAD = {
    "zero": (lambda: training.train_step(loss, accumulate=0), "accumulate=0"),
    "not an integer": (lambda: training.train_step(loss, accumulate=2.0), "accumulate=2.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_train_step_rejects_a_bad_number(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_train_step_rejects_what_it_cannot_accumulate(batch):
    step = training.train_step(loss, accumulate=5)
    with pytest.raises(ValueError, match=r"shape \(24, 5\).*multiple of 5"):
        step(start(Network(), batch), batch)
    with pytest.raises(ValueError, match=r"gave no moments of the batch: BatchNorm_0, BatchNorm_1\. For a model"):
        training.train_step(loss, accumulate=2)(start(Network(norm=nn.BatchNorm), batch), batch)
    mixed = nn.Sequential([bnjax.linen.BatchNorm(use_running_average=False), nn.BatchNorm(use_running_average=False)])
    state = training.TrainState.create(apply_fn=mixed.apply, tx=optax.sgd(0.1), **mixed.init(KEY, batch["x"]))
    step = training.train_step(lambda model, batch, train: model(batch["x"]).mean(), accumulate=2)
    with pytest.raises(ValueError, match=r"gave no moments of the batch: layers_1\. For"):
        step(state, batch)
    step = training.train_step(loss, accumulate=2)
    state, _ = step(start(bnjax.linen.convert(Network(norm=nn.BatchNorm)), batch), batch)
    expected, _ = training.train_step(loss, accumulate=2)(start(Network(), batch), batch)
    assert_same(state.batch_stats, expected.batch_stats, 1e-6, 1e-6)


def test_a_train_step_under_the_policy_is_the_same_step(batch):
    plain, _ = training.train_step(loss)(start(Network(), batch), batch)
    policy, _ = training.train_step(loss, policy=training.save_statistics)(start(Network(), batch), batch)
    assert_same(policy.params, plain.params, 1e-4, 1e-5)
    assert_same(policy.batch_stats, plain.batch_stats, 1e-6)
