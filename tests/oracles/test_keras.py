"""bnjax against Keras on JAX, only in float32, because Keras casts float64 to float32 before it computes."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import bnjax
from bnjax import interop
from tests.oracles.layers import BIAS, FIRST, LAST, SCALE, STEPS, JaxLayer, batch, compare, ours, promotion


def layer(shape, dtype="float32", **options):
    module = keras.layers.BatchNormalization(dtype=dtype, **options)
    module.build((None, *shape[1:]))
    for variable, value in ((module.gamma, SCALE), (module.beta, BIAS)):
        if variable is not None:
            variable.assign(value)
    return module


def theirs(module, mask=None):
    mask = {} if mask is None else {"mask": mask}

    def apply(params, kept, x, train):
        params = [p for p in params if p is not None]
        return module.stateless_call(params, kept, x, training=train, **mask)

    params = [None if v is None else v.value for v in (module.gamma, module.beta)]
    kept = [v.value for v in module.non_trainable_variables]
    return JaxLayer(apply, params, kept, lambda kept: kept[:2])


def converted(module, **options):
    variables = interop.from_keras(module.get_weights(), module.scale, module.center)
    return ours(*variables, **{**interop.KERAS, **options})


@pytest.mark.parametrize("shape", LAST, ids=str)
def test_bn_apply_matches_keras_in_every_layout(agree, shape):
    module = layer(shape)
    compare(agree, converted(module), theirs(module), shape)


def test_bn_apply_matches_keras_with_channels_first(agree):
    module = layer(FIRST[2], axis=1)
    compare(agree, converted(module, axis=1), theirs(module), FIRST[2])


OPTIONS = {
    "no_scale_momentum_0": {"scale": False, "momentum": 0.0},
    "no_center_momentum_1": {"center": False, "momentum": 1.0},
    "neither": {"scale": False, "center": False},
    "momentum_0.9_epsilon_1": {"momentum": 0.9, "epsilon": 1.0},
    "epsilon_1e-5": {"epsilon": 1e-5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bn_apply_matches_keras_with_options(agree, name):
    module = layer(LAST[2], **OPTIONS[name])
    options = {key: value for key, value in OPTIONS[name].items() if key in interop.KERAS}
    compare(agree, converted(module, **options), theirs(module), LAST[2])


def test_bn_apply_matches_keras_with_a_mask(agree):
    mask = np.random.default_rng(9).random(LAST[1][:-1]) < 0.6
    module = layer(LAST[1])
    # Keras divides by n + 1e-7, which float32 does not distinguish from n.
    compare(agree, converted(module, mask=mask[..., None]), theirs(module, mask), LAST[1])


def test_bn_apply_matches_keras_with_bfloat16_input(agree):
    module = layer(LAST[2], "mixed_bfloat16")
    compare(agree, converted(module), theirs(module), LAST[2], "bfloat16")


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.3), (1e3, 1e3)])
def test_renorm_bn_apply_matches_keras(agree, r_max, d_max):
    clipping = {"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max}
    options = {"momentum": 0.9, "epsilon": 1e-3}
    module = layer(LAST[2], renorm=True, renorm_clipping=clipping, renorm_momentum=0.9, **options)
    params, state = interop.from_keras(module)
    # Keras starts its standard deviation at 1, without epsilon.
    state = state._replace(var=state.var - options["epsilon"])
    our = ours(params, state, bnjax.renorm_bn_apply, r_max=r_max, d_max=d_max, **options)
    compare(agree, our, theirs(module), LAST[2])


@pytest.mark.parametrize(("scale", "center"), [(True, True), (True, False), (False, True), (False, False)])
def test_keras_round_trip_is_exact(agree, dtype, scale, center):
    module = layer(LAST[2], dtype, scale=scale, center=center)
    for step in range(STEPS):
        module(batch(step, LAST[2], dtype)[0], training=True)
    params, state = interop.from_keras(module.get_weights(), scale, center)
    fresh = layer(LAST[2], dtype, scale=scale, center=center)
    fresh.set_weights(interop.to_keras(params, state, fresh))
    again, back = interop.from_keras(fresh)
    leaves = (jax.tree.leaves(values) for values in ((again, back[:2]), (params, state[:2])))
    for our, their in zip(*leaves, strict=True):
        agree("round trip", our, their, growth=0)
    assert len(fresh.get_weights()) == 2 + scale + center
    for our, their in zip(fresh.get_weights(), module.get_weights(), strict=True):
        agree("round trip", our, their, growth=0)
    for our, their in zip((v for v in (*params, *state[:2]) if v is not None), module.get_weights(), strict=True):
        agree("round trip", our, their, growth=0)


def test_from_keras_says_what_a_layer_must_be():
    with pytest.raises(ValueError, match=r"has no weights yet. Call it once, or layer.build"):
        interop.from_keras(keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match=r"expected a BatchNormalization.*got LayerNormalization"):
        interop.from_keras(keras.layers.LayerNormalization())
    with pytest.raises(ValueError, match="scale=True, center=False, but scale and bias are None and present"):
        interop.to_keras(*bnjax.bn_init(5, scale=None), layer(LAST[2], center=False))


RATE = 0.125


def test_a_network_trains_as_in_keras(agree):
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((20,)), keras.layers.Dense(64, "relu"), keras.layers.BatchNormalization()])
    network.compile(optimizer=keras.optimizers.SGD(RATE), loss="mse")
    dense, normalization = network.layers
    params, state = interop.from_keras(normalization.get_weights())
    params = *map(jnp.asarray, dense.get_weights()), params

    def apply(params, state, x, train):
        kernel, bias, layer = params
        return bnjax.bn_apply(layer, state, jax.nn.relu(x @ kernel + bias[None]), train, **interop.KERAS)

    @jax.jit
    def update(params, state, x, target):
        def loss(params):
            y, new = apply(params, state, x, True)
            return jnp.mean((y - target) ** 2), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), new, value

    rng = np.random.default_rng(0)
    inputs, targets = (rng.normal(size=(6, 32, features)).astype("float32") for features in (20, 64))
    for x, target in zip(inputs[:-1], targets, strict=False):
        params, state, value = update(params, state, x, target)
        with promotion():
            loss = network.train_on_batch(x, target)
        agree("loss", value, loss)
    kernel, bias, layer = params
    ours = [kernel, bias, *interop.to_keras(layer, state)]
    quantities = [*["parameter"] * 4, "running mean", "running var"]
    for quantity, our, their in zip(quantities, ours, network.get_weights(), strict=True):
        agree(quantity, our, their)
    with promotion():
        y = network(inputs[-1], training=False)
        network.set_weights(ours)
        ours_there = network(inputs[-1], training=False)
    agree("output", apply(params, state, inputs[-1], False)[0], y)
    agree("output", ours_there, y)
