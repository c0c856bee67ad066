"""Numbers that depend on the count of updates: their values at large counts, and when they are called."""

import dataclasses
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.core.running import rates
from tests.support.compiling import compilations

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32) + 4
PARAMS, STATE = bnjax.bn_init(3)
BATCH_MEAN = X.astype(np.float64).mean(0)


@dataclasses.dataclass(frozen=True)
class Holding:
    """A schedule that holds a number or an array."""

    number: object

    def __call__(self, count):
        return self.number + 0 * count.astype(jnp.float32)


class Changing:
    """A schedule that is a method of an object that changes."""

    def __init__(self, number):
        self.number = number

    def at(self, count):
        return self.number + 0 * count.astype(jnp.float32)


def linen_mean(**options):
    layer = bnjax.linen.BatchNorm(use_running_average=False, **options)
    return layer.apply(layer.init(jax.random.key(0), X), X, mutable=["batch_stats"])[1]["batch_stats"]["mean"]


def nnx_mean(**options):
    layer = bnjax.nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))
    nnx.jit(lambda layer, x: layer(x))(layer, X)
    return layer.mean[...]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


def converted_linen_mean(**options):
    model = bnjax.linen.convert(Network(), **options)
    step = jax.jit(lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])[1])
    return step(model.init(jax.random.key(0), X), X)["batch_stats"]["BatchNorm_0"]["mean"]


def converted_nnx_mean(**options):
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    bnjax.nnx.convert(model, **options)
    nnx.jit(lambda model, x: model(x))(model, X)
    return model.layers[0].mean[...]


MEANS = {
    "bn_apply": lambda **options: bnjax.bn_apply(PARAMS, STATE, X, True, **options)[1].mean,
    "ghost_bn_apply": lambda **options: bnjax.ghost_bn_apply(PARAMS, STATE, X, True, ghost_size=4, **options)[1].mean,
    "renorm_bn_apply": lambda **options: (
        bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=2.0, d_max=1.0, **options)[1].mean
    ),
    "indexed_bn_apply": lambda **options: bnjax.indexed_bn_apply(
        PARAMS, bnjax.indexed_bn_init(3, 2)[1], X, True, index=1, **options
    )[1].mean[1],
    "linen": linen_mean,
    "nnx": nnx_mean,
    "converted linen": converted_linen_mean,
    "converted nnx": converted_nnx_mean,
}


@pytest.mark.parametrize("call", MEANS)
def test_a_schedule_is_asked_at_each_call(call):
    schedule = Changing(0.75)
    np.testing.assert_allclose(MEANS[call](momentum=schedule.at), 0.25 * BATCH_MEAN, rtol=1e-6)
    schedule.number = 0.5
    np.testing.assert_allclose(MEANS[call](momentum=schedule.at), 0.5 * BATCH_MEAN, rtol=1e-6)


@pytest.mark.parametrize("call", MEANS)
def test_a_schedule_may_hold_an_array(call):
    for momentum in (Holding(jnp.array([0.0, 0.5, 0.75])), bnjax.linear_ramp(jnp.array([0.0, 0.5, 0.75]), 1.0, 5, 6)):
        np.testing.assert_allclose(MEANS[call](momentum=momentum), BATCH_MEAN * [1, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize("layer", ["pure", "linen", "nnx"])
def test_a_bound_of_renormalization_is_asked_at_each_call(layer):
    """The output is the one of evaluation within the bounds, and limited to d_max where they are 1 and d_max."""
    bound = Changing(jnp.array([50.0, 50.0, 50.0]))
    options = {"r_max": lambda count: 1e3 + 0 * count.astype(jnp.float32), "d_max": bound.at}

    def output():
        if layer == "pure":
            return bnjax.renorm_bn_apply(PARAMS, STATE, X, True, **options)[0]
        if layer == "linen":
            module = bnjax.linen.RenormBatchNorm(use_running_average=False, **options)
            return module.apply(module.init(jax.random.key(0), X), X, mutable=["batch_stats"])[0]
        return bnjax.nnx.RenormBatchNorm(3, **options, rngs=nnx.Rngs(0))(X)

    np.testing.assert_allclose(output(), X / np.sqrt(1 + 1e-5), rtol=1e-5)
    bound.number = jnp.zeros(3)
    np.testing.assert_allclose(np.mean(output(), 0), 0, atol=1e-5)


def test_a_schedule_of_bounds_is_not_checked_in_evaluation_where_it_has_no_value():
    y, _ = bnjax.renorm_bn_apply(PARAMS, STATE, X, False, r_max=lambda count: 2.0, d_max=lambda count: 1.0)
    np.testing.assert_allclose(y, X / np.sqrt(1 + 1e-5), rtol=1e-6)


# Programs


@pytest.mark.parametrize("momentum", [bnjax.cumulative_average, bnjax.debiased(0.9), bnjax.linear_ramp(0.5, 0.9, 0, 9)])
def test_a_schedule_adds_no_program_to_a_training_step_and_one_to_an_eager_call(momentum):
    x = jnp.asarray(X)
    assert (
        compilations(lambda: jax.jit(lambda s, x: bnjax.bn_apply(PARAMS, s, x, True, momentum=momentum))(STATE, x)) == 1
    )
    # An array of momenta and its complement: the same program of bn_apply, which the schedule precedes.
    bnjax.bn_apply(PARAMS, STATE, x, True, momentum=lambda count: jnp.full(3, 0.5, jnp.float32))
    assert compilations(lambda: bnjax.bn_apply(PARAMS, STATE, x, True, momentum=momentum)) <= 1
    assert compilations(lambda: bnjax.bn_apply(PARAMS, STATE, x, True, momentum=momentum)) == 0


# Large counts


@pytest.mark.parametrize("count", [0, 1, 2, 7, 2**24 - 1, 2**24, 2**24 + 2, 2**28, 2**31 - 1])
def test_cumulative_average_weighs_the_new_batch_by_its_share_at_any_count(count):
    keep, take = rates("test", bnjax.cumulative_average, STATE._replace(count=jnp.int32(count)), True)
    np.testing.assert_allclose(take, 1 / (count + 1), rtol=2e-7)
    assert keep == bnjax.cumulative_average(jnp.int32(count)) < 1
    np.testing.assert_allclose(keep, count / (count + 1), rtol=1.2e-7)


@pytest.mark.parametrize("momentum", [0.5, 0.99, 1 - 1e-6])
def test_debiased_weighs_the_new_batch_exactly(momentum):
    for count in (0, 1, 2, 10, 300):
        exact = Fraction(momentum)
        want = (1 - exact) / (1 - exact ** (count + 1))
        state = STATE._replace(count=jnp.int32(count))
        keep, take = rates("test", bnjax.debiased(momentum), state, True)
        np.testing.assert_allclose(take, float(want), rtol=5e-7)
        np.testing.assert_allclose(keep, float(1 - want), atol=1.2e-7)
    assert bnjax.debiased(1 - 1e-9)(jnp.int32(2**24)) < 1


@pytest.mark.optimized
def test_debiased_forgets_the_initial_values_whole_and_leaves_no_negative_variance():
    # The momentum is a constant of the compiled code and the count is not: XLA then computes one function beforehand.
    params, state = bnjax.bn_init(33)
    for momentum in (0.5, 0.9, 0.95, 0.99, 0.999):
        schedule = bnjax.debiased(momentum)
        keep, take = jax.jit(schedule.weights)(state.count)
        assert keep.tolist() == [0] * 33
        assert take.tolist() == [1] * 33
    step = jax.jit(lambda state: bnjax.bn_apply(params, state, jnp.zeros((4, 33)), True, momentum=schedule)[1])
    assert step(state).var.tolist() == [0] * 33


def test_the_running_mean_still_moves_after_2_to_the_24_updates():
    state = STATE._replace(count=jnp.full(3, 2**25, jnp.int32))
    x = np.float32([[0.0], [2.0**26]]) * np.ones(3, np.float32)
    new = bnjax.bn_apply(PARAMS, state, x, True, momentum=bnjax.cumulative_average)[1]
    np.testing.assert_allclose(new.mean, 2.0**25 / (2**25 + 1), rtol=1e-6)


def test_linear_ramp_starts_where_it_says_at_large_counts():
    ramp = bnjax.linear_ramp(1.0, 3.0, 2**24 + 1, 2**24 + 5)
    np.testing.assert_array_equal(ramp(2**24 + jnp.arange(7)), [1, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_array_equal(bnjax.linear_ramp(0.0, 1.0, 2**40, 2**41)(jnp.int32(7)), 0)


# What is not a schedule


@pytest.mark.parametrize(
    ("momentum", "message"),
    [
        (optax.linear_schedule, r"momentum=...\): .*got linear_schedule, which cannot be called with only the count"),
        (optax.exponential_decay, r"momentum=...\): .*pass the one that it makes: momentum=exponential_decay\("),
    ],
)
@pytest.mark.parametrize("call", ["bn_apply", "linen", "nnx"])
def test_what_is_no_schedule_is_named_with_what_to_pass(call, momentum, message):
    name = "BatchNorm" if call in ("linen", "nnx") else call
    with pytest.raises(TypeError, match=rf"^{name}\({message}"):
        MEANS[call](momentum=momentum)


def test_a_type_error_in_a_schedule_is_its_own():
    def broken(count):
        raise TypeError("of its own")

    with pytest.raises(TypeError, match=r"^of its own$"):
        bnjax.bn_apply(PARAMS, STATE, X, True, momentum=broken)


@pytest.mark.parametrize("r_max", [None, bnjax.linear_ramp, optax.linear_schedule])
def test_a_bound_that_is_no_schedule_is_named(r_max):
    with pytest.raises((TypeError, ValueError), match=r"^renorm_bn_apply\(r_max="):
        bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=r_max, d_max=0.0)
