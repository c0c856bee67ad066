"""States that are kept: donated ones, ones that share arrays, and ones that are stored as bytes."""

from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

import bnjax.linen
import bnjax.nnx
from bnjax import training

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)
IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]


class Averaged(training.TrainState):
    """A state with averaged parameters, as many programs keep them."""

    ema: Any = struct.field(default_factory=dict)


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, (8, 3)).astype(np.float32)


def loss(model, batch, train):
    return jnp.mean(model(batch) ** 2)


def start(framework, x, cls=training.TrainState, tx=None, **fields):
    """A state and the variables that it was created from."""
    if framework == "linen":
        layer = bnjax.linen.BatchNorm()
        variables = layer.init(KEY, x, use_running_average=True)

        def apply(variables, x, mutable=False, **kwargs):
            return layer.apply(variables, x, use_running_average=not mutable, mutable=mutable, **kwargs)

    else:
        apply, variables = bnjax.nnx.functional(bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    tx = optax.adam(0.1) if tx is None else tx
    return cls.create(apply_fn=apply, tx=tx, **variables, **fields), variables


def alive(tree):
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_state_that_was_given_away_is_refused_and_each_remedy_keeps_it(framework, x):
    rngs = {"dropout": jax.random.key(1)}
    state, variables = start(framework, x, rngs=rngs)
    step, keeping = training.train_step(loss), training.train_step(loss, donate=False)
    expected, _ = keeping(state, x)
    assert alive((state, variables))
    copy = jax.tree.map(jnp.copy, state)
    new, _ = step(state, x)
    assert alive((new, copy, variables, rngs))
    assert not alive(state.params)
    advice = r"\d+ of \d+ arrays are deleted, state.* first. A step.*jax.tree.map\(jnp.copy, state\).*donate=False"
    for again in step, keeping, training.train_step(loss, accumulate=2):
        with pytest.raises(ValueError, match=r"^train_step\(...\)\(state=...\): " + advice):
            again(state, x)
    with pytest.raises(ValueError, match=r"^eval_step\(...\)\(state=...\): " + advice):
        training.eval_step(loss)(state, x)
    with pytest.raises(ValueError, match=r"^TrainState.apply_gradients\(...\): " + advice):
        state.apply_gradients(grads=new.params)
    with pytest.raises(ValueError, match=r"to_state_dict\(...\): " + advice):
        flax.serialization.to_bytes(state)
    with pytest.raises(ValueError, match=r"eval_step.*: 2 of \d+ arrays are deleted, state.params.* first"):
        training.eval_step(loss)(new.replace(params=state.params), x)
    with pytest.raises(
        ValueError, match=r"^TrainState.create\(...\): 2 of \d arrays are deleted, \['params'\].* first"
    ):
        training.TrainState.create(apply_fn=new.apply_fn, params=state.params, tx=new.tx)
    for kept, _ in (step(copy, x), keeping(start(framework, x)[0], x)):
        jax.tree.map(np.testing.assert_array_equal, kept.params, expected.params)


def test_every_array_of_a_new_state_is_its_own(x):
    """An optimizer may keep the parameters themselves, and a model two names for one array."""
    one = jnp.ones(3)
    variables = {"params": {"scale": one, "bias": one}, "batch_stats": {"mean": one, "var": one}, "cache": {"one": one}}
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    keeping = optax.GradientTransformation(lambda params: (params, params), lambda u, state, params: (u, state))
    state = Averaged.create(apply_fn=layer.apply, tx=keeping, ema=variables["params"], **variables)
    new, _ = training.train_step(loss)(state, x)
    assert alive(variables)
    assert new.step == 1


def test_one_array_twice_in_a_state_is_refused_where_it_would_be_donated(x):
    state, _ = start("linen", x, Averaged)
    step = training.train_step(loss)
    state, _ = step(state, x)
    state = state.replace(ema=state.params)
    with pytest.raises(ValueError, match=r"state.ema\['bias'\] are the same array.*Copy one of them.*donate=False"):
        step(state, x)
    kept, _ = training.train_step(loss, donate=False)(state, x)
    state = state.replace(ema=jax.tree.map(jnp.copy, state.params))
    average = state.ema
    state, _ = step(state, x)
    jax.tree.map(np.testing.assert_array_equal, state.params, kept.params)
    jax.tree.map(np.testing.assert_array_equal, state.ema, kept.ema)
    assert not alive(average)


def test_a_step_is_compiled_and_traced_like_any_jitted_function(x):
    state, _ = start("linen", x)
    step, evaluate = training.train_step(loss), training.eval_step(loss)
    assert "stablehlo" in step.lower(state, x).as_text()
    shapes = jax.eval_shape(step, state, x)
    assert shapes[1]["loss"].shape == evaluate.eval_shape(state, x)["loss"].shape == ()
    new, metrics = jax.jit(step)(state, x)  # inside another compiled function nothing is donated
    np.testing.assert_allclose(metrics["loss"], 1, rtol=1e-3)  # the variance of what is normalized
    assert int(new.step) == 1
    assert alive(state)


@pytest.mark.parametrize("rngs", [*IMPLEMENTATIONS, "raw", "stacked", "none"])
def test_bytes_restore_a_state_exactly(rngs, x):
    cls = Averaged if rngs == "rbg" else training.TrainState
    keys = {
        **{name: {"dropout": jax.random.key(7, impl=name), "noise": jax.random.key(8)} for name in IMPLEMENTATIONS},
        "raw": {"dropout": jax.random.PRNGKey(7)},
        "stacked": {"dropout": jax.random.split(jax.random.key(7, impl="rbg"), 3)},
        "none": None,
    }[rngs]
    state, _ = start("linen", x, cls, rngs=keys)
    state = state.replace(params=jax.tree.map(lambda leaf: leaf + 0.5, state.params), step=3)
    target, _ = start("linen", x, cls, rngs=jax.tree.map(jnp.copy, keys))
    for restored in (
        flax.serialization.from_bytes(target, flax.serialization.to_bytes(state)),
        flax.serialization.from_state_dict(target, flax.serialization.to_state_dict(state)),
    ):
        assert type(restored) is cls
        assert jax.tree.structure(restored) == jax.tree.structure(target)
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            assert jnp.result_type(before) == jnp.result_type(after)
            typed = jnp.issubdtype(jnp.result_type(before), jax.dtypes.prng_key)
            pair = [jax.random.key_data(k) for k in (before, after)] if typed else [before, after]
            np.testing.assert_array_equal(*pair)
        if keys is not None:
            assert jax.random.key_impl(restored.rngs["dropout"]) == jax.random.key_impl(state.rngs["dropout"])
    if rngs in IMPLEMENTATIONS:
        draws = [jax.random.normal(s.rngs["dropout"], (4,)) for s in (state, restored)]
        np.testing.assert_array_equal(*draws)


def test_a_restored_state_goes_on_as_the_stored_one(x):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = bnjax.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    variables = Network().init(KEY, x, False)
    step = training.train_step(lambda model, batch, train: jnp.mean(model(batch, train) ** 2), donate=False)

    def create(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return training.TrainState.create(apply_fn=Network().apply, tx=optax.adam(0.1), rngs=rngs, **variables)

    state, _ = step(create(1), x)
    restored = flax.serialization.from_bytes(create(2), flax.serialization.to_bytes(state))
    after, same = step(state, x), step(restored, x)
    jax.tree.map(np.testing.assert_array_equal, after[1], same[1])
    jax.tree.map(np.testing.assert_array_equal, after[0].params, same[0].params)


def test_a_state_of_other_fields_is_not_restored(x):
    state, _ = start("linen", x)
    other, _ = start("linen", x, Averaged)
    with pytest.raises(ValueError, match=r"from_state_dict\(state=.*expected the fields of Averaged.*'ema'"):
        flax.serialization.from_bytes(other, flax.serialization.to_bytes(state))


def test_orbax_restores_a_state_with_typed_keys(x, tmp_path):
    import orbax.checkpoint as orbax

    state, _ = start("linen", x, rngs={"dropout": jax.random.key(7, impl="rbg")})
    target, _ = start("linen", x, rngs={"dropout": jax.random.key(0, impl="rbg")})
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state.replace(step=jnp.asarray(5)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)
    assert int(restored.step) == 5
    keys = [jax.random.key_data(s.rngs["dropout"]) for s in (restored, state)]
    np.testing.assert_array_equal(*keys)
    assert jax.random.key_impl(restored.rngs["dropout"]) == "rbg"


def test_the_state_of_an_nnx_model_goes_through_bytes(x):
    """Its parameters and the optimizer's moments are states of NNX, and the noise of the optimizer has a key."""

    def create(seed):
        rngs = nnx.Rngs(seed)
        model = nnx.Sequential(nnx.Linear(x.shape[-1], 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
        apply, variables = bnjax.nnx.functional(model)
        tx = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(seed)), optax.adam(0.1))
        return training.TrainState.create(apply_fn=apply, tx=tx, **variables)

    step = training.train_step(lambda model, x, train: jnp.sum(model(x) ** 3), donate=False)
    state, target = step(create(1), x)[0], create(2)
    restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(target)
    assert isinstance(restored.params, nnx.State)
    after, same = (step(s.replace(apply_fn=target.apply_fn, tx=target.tx), x)[0] for s in (state, restored))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(same), strict=True):
        a, b = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (a, b))
        np.testing.assert_array_equal(a, b)
