"""Finite values whose variance leaves the floating range: NaN in only that feature, under every transform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
from tests.support import reference

SHAPE = (64, 3)
PARAMS, STATE = bnjax.bn_init(3)


def _whole(x, **options):
    return bnjax.bn_apply(PARAMS, STATE, x, True, **options)


def _per_example(x):
    y, state = jax.vmap(partial(_whole, axis_name="b"), axis_name="b")(x)
    return y, jax.tree.map(lambda v: v[0], state)


def _mesh():
    return Mesh(np.array(jax.devices()[:8]), "d")


def _by_device(x):
    apply = jax.shard_map(partial(_whole, axis_name="d"), mesh=_mesh(), in_specs=P("d"), out_specs=(P("d"), P()))
    return apply(x)


def _sharded(x):
    return _whole(jax.lax.with_sharding_constraint(x, NamedSharding(_mesh(), P("d"))))


def _layer(x):
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    variables = {"params": {"scale": PARAMS.scale, "bias": PARAMS.bias}, "batch_stats": STATE._asdict()}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    stats = updates["batch_stats"]
    return y, STATE._replace(mean=stats["mean"], var=stats["var"], count=jnp.where(stats["mean"] == 0, 0, 1))


WAYS = {
    "whole": _whole,
    "mask": lambda x: _whole(x, mask=jnp.ones((64, 1), bool)),
    "weights": lambda x: _whole(x, mask=jnp.full((64, 1), 0.25)),
    "per example": _per_example,
    "shard_map": _by_device,
    "sharded jit": _sharded,
    "renormalized": lambda x: bnjax.renorm_bn_apply(PARAMS, STATE, x, True, r_max=1.0, d_max=0.0),
    "indexed": lambda x: _first(*bnjax.indexed_bn_apply(PARAMS, bnjax.indexed_bn_init(3, 1)[1], x, True, index=0)),
    "Linen": _layer,
}


def _first(y, state):
    return y, jax.tree.map(lambda v: v[0], state)


@pytest.mark.parametrize("way", WAYS)
def test_overflowing_variance_is_nan_in_its_feature_under_every_transform(way):
    rng = np.random.default_rng(0)
    x, g = rng.normal(2, 1, SHAPE), rng.normal(0, 1, SHAPE)
    factors = np.array([1.0, 1.0, 1.0])

    @jax.jit
    def run(x):
        (_, (y, state)), gradient = jax.value_and_grad(
            lambda x: (lambda out: ((jnp.asarray(g, jnp.float32) * out[0]).sum(), out))(WAYS[way](x)), has_aux=True
        )(x)
        return y, gradient, state

    for k in (1e10, 1e15, 1e17, 1e19, 1e20, 1e25, 1e37):
        factors[0] = k
        scaled = (x * factors).astype(np.float32)
        assert np.isfinite(scaled).all()
        y, gradient, state = (np.asarray(v) for v in (*run(scaled)[:2], run(scaled)[2].count))
        _, mean, var = reference.moments(scaled)
        right = reference.normalize(scaled, mean, var, np.ones(3), np.zeros(3), epsilon=1e-5)
        right_gradient = reference.gradients(scaled, g, np.ones(3))[0] * factors
        overflows = k > 1e18
        kept = slice(1, 3) if overflows else slice(0, 3)
        np.testing.assert_allclose(y[:, kept], right[:, kept], atol=1e-5, rtol=0)
        # The gradient has a factor 1 / var, which in float32 is exact to 1.2e-38, the least normal number, times var.
        np.testing.assert_allclose((gradient * factors)[:, kept], right_gradient[:, kept], atol=1e-3, rtol=0)
        assert state.tolist() == [0 if overflows else 1, 1, 1]
        if overflows:
            assert np.isnan(y[:, 0]).all()
            assert np.isnan(gradient[:, 0]).all()


def test_ghost_group_with_an_overflowing_variance_is_nan_and_the_others_are_right():
    rng = np.random.default_rng(1)
    x = rng.normal(2, 1, (32, 3)).astype(np.float32)
    x[:16, 0] *= 1e20
    y, state = bnjax.ghost_bn_apply(PARAMS, STATE, x, True, ghost_size=16)
    assert np.isnan(np.asarray(y)[:16, 0]).all()
    right = reference.train(x[16:], 1, 0, 0, 1)[0]
    np.testing.assert_allclose(np.asarray(y)[16:], right, atol=1e-5)
    assert state.count.tolist() == [0, 1, 1]


def test_batch_moments_of_an_overflowing_variance_are_nan():
    x = np.array([[1e20, 1.0], [-1e20, 3.0]], np.float32)
    var = bnjax.batch_moments(jnp.asarray(x)).var
    assert np.isnan(var[0])
    assert var[1] == 1
