"""bnjax against Equinox, in both of its modes; its channels come first and its batch is an axis of vmap.

Not compared: half precisions, in which Equinox takes the moments too, and the documented unbiased variance, which it
does not compute.
"""

import equinox as eqx
import jax.numpy as jnp
import pytest

import bnjax
from tests.oracles.layers import FEATURES, FIRST, JaxLayer, affine, compare, ours

MOMENTUM = 0.9


def theirs(dtype, mode, momentum=MOMENTUM, **options):
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        FEATURES, axis_name="batch", mode=mode, momentum=momentum, dtype=dtype, **options
    )
    params = affine(dtype, layer.channelwise_affine, layer.channelwise_affine)
    index = layer.batch_state_index if mode == "batch" else layer.ema_state_index

    def apply(params, state, x, train):
        called = layer
        if layer.channelwise_affine:
            called = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(params))
        return called(x, state, inference=not train)

    return JaxLayer(apply, params, state, lambda state: state.get(index), over="batch")


def as_batch(params, state, x, train, momentum, **options):
    """Evaluation divides both statistics by 1 - momentum^count: the variance too, although it starts at 1."""
    if train:
        return bnjax.bn_apply(params, state, x, True, momentum=momentum, **options)
    share = (1 - momentum ** state.count.astype(float)).astype(x.dtype)
    debiased = state._replace(mean=state.mean / share, var=state.var / share)
    return bnjax.bn_apply(params, debiased, x, False, **options)[0], state


def as_ema(params, state, x, train, momentum, **options):
    """The first update replaces the statistics, and training too normalizes by the running ones, after the update."""

    def kept(count):
        return jnp.where(count == 0, 0, momentum)

    if train:
        _, state = bnjax.bn_apply(params, state, x, True, momentum=kept, **options)
    return bnjax.bn_apply(params, state, x, False, **options)


MODES = {"batch": as_batch, "ema": as_ema}


def converted(dtype, mode, learned=True, momentum=MOMENTUM, **options):
    _, state = bnjax.bn_init(FEATURES, dtype=dtype)
    return ours(affine(dtype, learned, learned), state, MODES[mode], momentum=momentum, axis=1, **options)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def lost(mode, momentum):
    """The division by 1 - momentum^count."""
    return 1 / (1 - momentum) if mode == "batch" else 1


@pytest.mark.parametrize("shape", FIRST, ids=str)
def test_bn_apply_matches_equinox_in_every_layout(agree, mode, shape):
    our, their = converted("float32", mode), theirs("float32", mode)
    compare(agree, our, their, shape, growth=lost(mode, MOMENTUM))


OPTIONS = {
    "no_affine": ({"channelwise_affine": False}, {"learned": False}),
    "momentum_0.5_epsilon_1": ({"momentum": 0.5, "eps": 1.0}, {"momentum": 0.5, "epsilon": 1.0}),
    "momentum_0.99": ({"momentum": 0.99}, {"momentum": 0.99}),
    "epsilon_1e-3": ({"eps": 1e-3}, {"epsilon": 1e-3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bn_apply_matches_equinox_with_options(agree, x64, mode, name):
    their, our = OPTIONS[name]
    growth = lost(mode, our.get("momentum", MOMENTUM))
    compare(agree, converted(x64, mode, **our), theirs(x64, mode, **their), FIRST[1], x64, growth)
