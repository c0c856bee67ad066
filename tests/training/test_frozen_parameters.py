"""Scale and bias of frozen layers under optimizers that change what has no gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import training

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)
DECAY = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))  # halves what has no gradient
FROZEN = {"frozen": True, "frozen_params": True}


class Network(nn.Module):
    """A frozen layer, and another one that may be frozen by `convert`."""

    options: dict
    jitted: bool = False

    @nn.compact
    def __call__(self, x, train):
        layer = nn.jit(bnjax.linen.BatchNorm) if self.jitted else bnjax.linen.BatchNorm
        x = layer(use_running_average=not train, name="held", **self.options)(x)
        return nn.BatchNorm(use_running_average=not train, name="free")(nn.Dense(3)(x))


def no_gradient(model, batch, train):
    return jnp.sum(jax.lax.stop_gradient(model(batch, train)))


def variables():
    """Those of `Network`: every parameter is 3."""
    layer = {"scale": np.full(3, 3, "f"), "bias": np.full(3, 3, "f")}
    stats = {"mean": np.zeros(3, "f"), "var": np.ones(3, "f")}
    params = {"held": layer, "free": layer, "Dense_0": {"kernel": np.full((3, 3), 3, "f"), "bias": np.full(3, 3, "f")}}
    return {"params": params, "batch_stats": {"held": stats, "free": stats}}


def linen_state(model, tx=DECAY):
    return training.TrainState.create(apply_fn=model.apply, tx=tx, **variables())


def threes(variables):
    return {**variables, "params": jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), variables["params"])}


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, (8, 3)).astype(np.float32)


@pytest.mark.parametrize("held", [FROZEN, {"frozen_params": True}, {"frozen": True}])
def test_a_step_leaves_the_frozen_scale_of_a_linen_layer(held, x):
    options = {"policy": training.save_statistics} if "frozen" in held else {"accumulate": 2}
    model = bnjax.linen.convert(Network(held))
    state, _ = training.train_step(no_gradient, **options)(linen_state(model), x)
    for name in "scale", "bias":
        np.testing.assert_array_equal(state.params["held"][name], 3 if "frozen_params" in held else 1.5)
        np.testing.assert_array_equal(state.params["free"][name], 1.5)
    np.testing.assert_array_equal(state.params["Dense_0"]["kernel"], 1.5)


def test_a_block_that_jax_has_traced_before_is_heard_again(x):
    for _ in range(2):
        state, _ = training.train_step(no_gradient)(linen_state(Network(FROZEN, jitted=True)), x)
        np.testing.assert_array_equal(state.params["held"]["scale"], 3)
        np.testing.assert_array_equal(state.params["free"]["scale"], 1.5)


def test_a_frozen_teacher_of_the_same_names_does_not_freeze_the_model(x):
    teacher = bnjax.linen.convert(Network({}), **FROZEN)

    def loss(model, batch, train):
        return no_gradient(model, batch, train) + 0 * teacher.apply(variables(), batch, False).sum()

    state, _ = training.train_step(loss)(linen_state(Network({})), x)  # whose layer "free" is Flax's own
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 1.5), state.params)


def test_a_layer_that_convert_freezes_stays_while_adam_decays_the_rest(x):
    """Adam with decay: the update of a parameter without a gradient is -learning_rate * decay * parameter."""
    tx = optax.adamw(0.1, weight_decay=0.2)
    model = bnjax.linen.convert(Network({}), where=lambda path: path == "free", **FROZEN)
    state = linen_state(model, tx)
    step = training.train_step(no_gradient)
    for _ in range(3):
        state, _ = step(state, x)
    np.testing.assert_array_equal(state.params["free"]["scale"], 3)
    np.testing.assert_allclose(state.params["held"]["scale"], 3 * 0.98**3, rtol=1e-6)
    np.testing.assert_allclose(state.params["Dense_0"]["kernel"], 3 * 0.98**3, rtol=1e-6)


def test_a_frozen_layer_under_scan_and_one_that_is_the_whole_model(x):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = bnjax.linen.BatchNorm(use_running_average=True, frozen_params=True)(x)
            return nn.Dense(3)(x), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            axes = {"params": 0, "batch_stats": 0}
            return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)(name="blocks")(x, None)[0]

    state = training.TrainState.create(apply_fn=Deep().apply, tx=DECAY, **threes(Deep().init(KEY, x, False)))
    state, _ = training.train_step(no_gradient)(state, x)
    np.testing.assert_array_equal(state.params["blocks"]["BatchNorm_0"]["scale"], np.full((2, 3), 3))
    np.testing.assert_array_equal(state.params["blocks"]["Dense_0"]["kernel"], np.full((2, 3, 3), 1.5))

    layer = bnjax.linen.BatchNorm(frozen_params=True, use_running_average=False)
    state = training.TrainState.create(apply_fn=layer.apply, tx=DECAY, **threes(layer.init(KEY, x)))
    state, _ = training.train_step(lambda model, batch, train: model(batch).sum())(state, x)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 3), state.params)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_leaves_the_frozen_scale_of_an_nnx_layer(accumulate, x):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    bnjax.nnx.convert(model)
    bnjax.nnx.convert(model, where=lambda path: path == "layers/0", **FROZEN)
    apply, initial = bnjax.nnx.functional(model)
    state = training.TrainState.create(apply_fn=apply, tx=DECAY, **threes(initial))
    step = training.train_step(lambda model, x, train: jax.lax.stop_gradient(model(x)).sum(), accumulate=accumulate)
    state, _ = step(state, x)
    nnx.update(model, state.params)
    np.testing.assert_array_equal(model.layers[0].scale[...], 3)
    np.testing.assert_array_equal(model.layers[0].bias[...], 3)
    np.testing.assert_array_equal(model.layers[1].kernel[...], 1.5)
    np.testing.assert_array_equal(model.layers[2].scale[...], 1.5)


def test_parameters_that_are_frozen_in_one_call_only_learn_from_the_other(x):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return bnjax.linen.BatchNorm(use_running_average=not train, frozen_params=not train, name="free")(x)

    def both(model, batch, train):
        return no_gradient(model, batch, True) + no_gradient(model, batch, False)

    given = {name: {"free": layers["free"]} for name, layers in variables().items()}
    for loss, expected in ((both, 1.5), (lambda model, batch, train: no_gradient(model, batch, False), 3)):
        state = training.TrainState.create(apply_fn=Twice().apply, tx=DECAY, **given)
        state, _ = training.train_step(loss)(state, x)
        np.testing.assert_array_equal(state.params["free"]["scale"], expected)


@pytest.mark.parametrize("mask", [None, training.decay_mask])
def test_in_a_loop_of_its_own_an_nnx_model_needs_the_mask_of_the_guide(mask, x):
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    bnjax.nnx.convert(model, **FROZEN)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.2, mask=mask), wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).mean())(model))
    expected = 1 if mask is not None else 0.98**3
    np.testing.assert_allclose(model.layers[1].scale[...], expected, rtol=1e-6)
