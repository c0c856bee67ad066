"""NNX models as Flax's documentation writes them, through training, accumulation, recalibration and diagnosis."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import bnjax
import bnjax.nnx
from bnjax import training

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def flax_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, (24, 6)).astype(np.float32)


class KeyAtTheCall(nnx.Module):
    """https://flax.readthedocs.io/en/latest/guides/randomness.html: dropout by keys that come with the call."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.dropout(nnx.relu(self.bn(self.linear(x))), rngs=rngs)


class RequiredKey(KeyAtTheCall):
    def __call__(self, x, *, rngs: nnx.Rngs):
        return super().__call__(x, rngs)


class OwnKeys(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.Sequential(
            nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu, nnx.Dropout(0.5, rngs=rngs)
        )

    def __call__(self, x):
        return self.layers(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.bn(self.linear(x))))


class Scanned(nnx.Module):
    """https://flax.readthedocs.io/en/latest/guides/transforms.html: layers of one kind, stacked and scanned over."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return forward(x, self.blocks)


class Recurrent(nnx.Module):
    """A recurrent layer draws keys for its first carry, which is 0 whatever they are."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(1, 8, rngs=rngs), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.rnn(x[..., None])[:, -1])


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, dropout_rate=0.5, decode=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.attention(x[:, None])[:, 0])


class Count(nnx.Variable):
    pass


class Counting(nnx.Module):
    """https://flax.readthedocs.io/en/latest/nnx_basics.html: state of a type of one's own."""

    def __init__(self, rngs):
        self.linear = nnx.SpectralNorm(nnx.Linear(6, 8, rngs=rngs), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.rows = Count(jnp.array(0))

    def __call__(self, x):
        self.rows[...] += len(x)
        return self.bn(self.linear(x))


class Autoencoder(nnx.Module):
    """A variational autoencoder draws from a stream that is not for dropout."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(6, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.decoder = nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        mean, spread = jnp.split(self.bn(self.encoder(x)), 2, -1)
        return self.decoder(mean + jnp.exp(spread) * self.rngs.noise.normal(mean.shape))


MODELS = [KeyAtTheCall, RequiredKey, OwnKeys, Scanned, Recurrent, Attention, Counting]
KEYS = {"dropout": KEY, "params": KEY, "noise": KEY, "carry": KEY}


def build(kind):
    return bnjax.nnx.convert(kind(nnx.Rngs(params=0, dropout=1, noise=2, carry=3)), momentum=0.0)


def loss(model, x, train):
    return jnp.mean((model(x) - 1) ** 2)


@pytest.mark.parametrize("kind", [*MODELS, Autoencoder])
def test_models_of_flax_train_accumulate_recalibrate_and_are_diagnosed(kind, x):
    apply, variables = bnjax.nnx.functional(build(kind))
    state = training.TrainState.create(apply_fn=apply, tx=optax.adam(1e-2), rngs=KEYS, **variables)
    for accumulate in (1, 2):
        step = training.train_step(loss, accumulate=accumulate, donate=False)
        trained, losses = state, []
        for _ in range(60):
            trained, metrics = step(trained, x)
            losses.append(metrics["loss"])
        assert np.mean(losses[-10:]) < np.mean(losses[:10])
        assert jax.tree.structure(trained.batch_stats) == jax.tree.structure(state.batch_stats)
    fixed = {"params": trained.params, "batch_stats": trained.batch_stats, **trained.collections}
    recalibrated = bnjax.recalibrate(partial(apply, rngs=KEYS), fixed, [x, x])
    assert jax.tree.structure(recalibrated) == jax.tree.structure(fixed)
    _, left = apply(recalibrated, x, mutable=["batch_stats", "batch_moments"], rngs=KEYS)
    assert bnjax.diagnose(recalibrated["params"], recalibrated["batch_stats"], left["batch_moments"]).layers
    if kind is Autoencoder:  # draws in evaluation too
        return
    evaluated = training.eval_step(loss)(trained, x)["loss"]
    model = build(kind)
    nnx.update(model, *fixed.values())
    model.eval()
    y = model(x, rngs=nnx.Rngs(0)) if kind is RequiredKey else model(x)
    np.testing.assert_allclose(evaluated, jnp.mean((y - 1) ** 2), rtol=1e-5)


@pytest.mark.parametrize("kind", [KeyAtTheCall, RequiredKey, OwnKeys, Scanned])
def test_dropout_differs_from_key_to_key_and_not_for_one(kind, x):
    apply, variables = bnjax.nnx.functional(build(kind))
    keys = jax.random.split(KEY, 3)
    one, same, other = (
        apply(variables, x, mutable=["batch_stats"], rngs={"dropout": k})[0] for k in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_allclose(jnp.mean(one == 0), 0.75, atol=0.12)  # half by ReLU, half of the rest by dropout
    if kind is not Scanned:
        return
    masks = []  # each block has a mask of its own

    class Watched(nnx.Dropout):
        def __call__(self, x, **options):
            y = super().__call__(jnp.ones_like(x), **options)
            jax.debug.callback(lambda y: masks.append(np.asarray(y)), y)
            return y

    model = build(Scanned)
    model.blocks.dropout.__class__ = Watched
    apply, variables = bnjax.nnx.functional(model)
    apply(variables, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    jax.effects_barrier()
    assert len(masks) == 3
    assert len({mask.tobytes() for mask in masks}) == 3


def test_the_call_gets_an_rngs_of_the_callers(x):
    apply, variables = bnjax.nnx.functional(build(KeyAtTheCall))
    y, _ = apply(variables, x, mutable=["batch_stats"], rngs=nnx.Rngs(dropout=5))
    model = build(KeyAtTheCall)
    model.train()
    np.testing.assert_allclose(y, model(x, rngs=nnx.Rngs(dropout=5)), rtol=1e-5, atol=1e-6)


def test_a_layer_keeps_its_own_evaluation_in_training(x):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = (bnjax.nnx.BatchNorm(6, momentum=0.0, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return self.second(self.first(x))

    def moved(model):
        apply, variables = bnjax.nnx.functional(model)
        _, updates = apply(variables, x, mutable=["batch_stats"])
        return {name: bool((updates["batch_stats"][name]["var"][...] != 1).any()) for name in ("first", "second")}

    model = Two(nnx.Rngs(0))
    assert moved(model) == {"first": True, "second": True}
    model.first.eval()
    assert moved(model) == {"first": False, "second": True}
    assert model.first.use_running_average
    model.eval()  # as a whole
    assert moved(model) == {"first": True, "second": True}
    model.first.use_running_average, model.second.use_running_average = None, False
    assert moved(model) == {"first": True, "second": True}


def test_variables_of_other_types_are_carried(x):
    apply, variables = bnjax.nnx.functional(build(Counting))
    assert sorted(variables) == ["Count", "batch_stats", "params"]
    state = training.TrainState.create(apply_fn=apply, tx=optax.sgd(0.1), **variables)
    for accumulate in (1, 2, 3):
        state, _ = training.train_step(loss, accumulate=accumulate)(state, x)
        assert state.collections["Count"]["rows"][...] == 24 * accumulate
    model = build(Counting)
    nnx.update(model, state.params, state.batch_stats, *state.collections.values())
    assert model.rows[...] == 72
    _, updates = apply(variables, x, mutable=["batch_stats"])
    assert sorted(updates) == ["batch_stats"]


def test_functional_rejects_what_has_no_key_where_it_is_drawn_from(x):
    for kind in (OwnKeys, Scanned):
        apply, variables = bnjax.nnx.functional(build(kind))
        with pytest.raises(ValueError, match=r"draws random numbers from 'dropout'.*Pass rngs=\{'dropout': key\}"):
            apply(variables, x, mutable=["batch_stats"], rngs={"noise": KEY})
    model = build(KeyAtTheCall)
    model.kept = nnx.Rngs(params=0)  # as many models keep what they were made with, and do not draw from it
    apply, variables = bnjax.nnx.functional(model)
    apply(variables, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    with pytest.raises(TypeError, match=r"functional\(model=OwnKeys\): expected a module, got a class"):
        bnjax.nnx.functional(OwnKeys)
    with pytest.raises(TypeError, match=r"functional\(model=list\): expected an NNX module. Pass the module"):
        bnjax.nnx.functional([model])
    with pytest.raises(TypeError, match=r"functional\(model=BatchNorm\): .* A Linen module has `apply` already"):
        bnjax.nnx.functional(linen.BatchNorm())


def test_mutable_is_that_of_linen(x):
    """One name, or True for all collections, as `apply` of Linen takes."""
    apply, variables = bnjax.nnx.functional(bnjax.nnx.BatchNorm(6, rngs=nnx.Rngs(0)))
    for mutable, names in (("batch_stats", ["batch_stats"]), (True, ["batch_stats", "params"])):
        _, updates = apply(variables, x, mutable=mutable)
        assert sorted(updates) == names
        np.testing.assert_allclose(updates["batch_stats"]["mean"][...], 0.01 * x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(apply(variables, x, mutable=False), x / np.sqrt(1 + 1e-5), rtol=1e-6)
