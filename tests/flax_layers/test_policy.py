"""The checkpoint policy `save_statistics`: what it saves, and what the backward pass recomputes."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax import training
from experiments.benchmark import footprint
from tests.support.comparison import assert_same
from tests.support.compiling import executed

PARAMS, STATE = bnjax.bn_init(4)


def block(kernel, x, **options):
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(bnjax.bn_apply(PARAMS, STATE, y, True, **options)[0])


def network(kernels, x, policy, **options):
    """Three blocks, all under the policy; True is no checkpoint at all."""

    def apply(kernels, x):
        for kernel in kernels:
            x = block(kernel, x, **options)
        return x

    return jnp.sum((apply if policy is True else jax.checkpoint(apply, policy=policy))(kernels, x))


@pytest.fixture
def kernels(rng):
    return [rng.normal(0, 0.3, (3, 3, 4, 4)).astype(np.float32) for _ in range(3)]


@pytest.fixture
def images(rng):
    return rng.normal(1, 2, (8, 6, 6, 4)).astype(np.float32)


def residuals(policy, kernels, images):
    """The residuals that the forward pass keeps in addition to its arguments."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(lambda kernels: network(kernels, images, policy), kernels)
    return [line for line in text.getvalue().splitlines() if " argument " not in line and " constant" not in line]


def test_the_policy_saves_one_activation_a_block_and_the_statistics(kernels, images):
    saved = residuals(training.save_statistics, kernels, images)
    activations = [line for line in saved if "[8,6,6,4]" in line]
    assert len(activations) == len(kernels)
    convolution = block.__code__.co_firstlineno + 1
    assert all(f"test_policy.py:{convolution}:" in line for line in activations)
    statistics = [line for line in saved if line not in activations]
    assert len(statistics) == 3 * len(kernels)  # weight, mean and variance
    assert all(line.startswith("f32[4] ") for line in statistics)
    assert len([line for line in residuals(True, kernels, images) if "[8,6,6,4]" in line]) >= 2 * len(kernels)


def test_residuals_of_a_network_are_the_convolutions_alone_and_never_more_than_those_of_flax():
    x = jnp.zeros((4, 8, 8, 4))
    flax, plain, saved = (footprint.residuals(norm, policy, x) for _, norm, policy in footprint.WAYS)
    assert plain <= flax
    assert saved <= 0.6 * flax
    activations = footprint.BLOCKS * x.nbytes
    assert activations <= saved < 1.05 * activations  # the rest are statistics and parameters


@pytest.mark.parametrize("mapped", ["jit", "shard_map", "vmap"])
def test_the_policy_recomputes_no_reduction_and_no_collective(mapped, kernels, images):
    """The StableHLO of the gradient has as many of both as without a checkpoint; the gradients are the same."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(policy):
        def grad(kernels, x):
            names = {} if mapped == "jit" else {"axis_name": "data"}
            value, gradients = jax.value_and_grad(lambda k: network(k, x, policy, **names))(kernels)
            # The value keeps the forward pass alive.
            return jax.lax.psum(value, "data") if mapped == "shard_map" else value, gradients

        if mapped == "shard_map":
            return jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        if mapped == "vmap":
            return jax.jit(lambda k, x: jax.vmap(grad, (None, 0), axis_name="data")(k, x.reshape(4, 2, *x.shape[1:])))
        return jax.jit(grad)

    def operations(policy):
        text = gradient(policy).lower(kernels, images).as_text()
        return executed(text, ("reduce", "all_gather", "all_reduce", "convolution", "rsqrt"))

    plain, policy, nothing = (operations(p) for p in (True, training.save_statistics, None))
    for name in "reduce", "all_gather", "all_reduce", "convolution":
        assert policy[name] == plain[name], name
    assert plain["reduce"] > 0
    assert nothing["reduce"] > plain["reduce"]  # what a plain checkpoint costs
    assert nothing["convolution"] > plain["convolution"]
    if mapped == "shard_map":
        assert nothing["all_reduce"] > plain["all_reduce"] > 0
    assert_same(gradient(training.save_statistics)(kernels, images), gradient(True)(kernels, images), 1e-4, 1e-4)
