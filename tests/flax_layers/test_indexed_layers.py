"""`IndexedBatchNorm` with an index for each example: each index has the statistics of its own examples."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.training import TrainState, train_step
from tests.support import reference

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)
INDEX = np.array([0, 2, 2, 0, 2, 3, 3, 2])  # index 0 is only in the first half, 3 only in the second, 1 in none
ONES, ZEROS = np.ones(3), np.zeros(3)


def close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.fixture
def x(rng):
    return (rng.normal(2, 3, (8, 3)) + 50 * INDEX[:, None]).astype(np.float32)


def linen_run(x):
    layer = bnjax.linen.IndexedBatchNorm(num_indices=4, indexed_params=True, momentum=0.8)
    variables = layer.init(KEY, x, True, index=INDEX)
    y, updates = layer.apply(variables, x, False, index=INDEX, mutable=["batch_stats"])
    return y, updates["batch_stats"], layer.apply({**variables, **updates}, x, True, index=INDEX)


def nnx_run(x):
    layer = bnjax.nnx.IndexedBatchNorm(3, num_indices=4, indexed_params=True, momentum=0.8, rngs=nnx.Rngs(0))
    y = layer(x, index=INDEX)
    return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)), layer(x, True, index=INDEX)


@pytest.mark.parametrize("run", [linen_run, nnx_run])
def test_each_index_is_normalized_by_its_own_examples(run, x):
    y, stats, evaluated = run(x)
    for k in 0, 2, 3:
        own = x[k == INDEX]
        expected, mean, var = reference.train(own, ONES, ZEROS, 0, 1, momentum=0.8)
        close((y[k == INDEX], stats["mean"][k], stats["var"][k]), (expected, mean, var))
        close(evaluated[k == INDEX], reference.normalize(own, mean, var, ONES, ZEROS), 1e-4)
    close((stats["mean"][1], stats["var"][1]), (ZEROS, ONES), 0)


def test_moments_of_parts_with_different_indices_are_those_of_the_whole(x):
    layer = bnjax.linen.IndexedBatchNorm(num_indices=4, momentum=0.8, use_running_average=False)
    variables = layer.init(KEY, x, index=0)

    @jax.jit
    def collect(variables, x, index):
        return layer.apply(variables, x, index=index, mutable=["batch_stats", "batch_moments"])[1]

    first = collect(variables, x[:4], INDEX[:4])
    both = collect({**variables, "batch_moments": first["batch_moments"]}, x[4:], INDEX[4:])
    for k in 0, 2, 3:
        _, mean, var = reference.train(x[k == INDEX], ONES, ZEROS, 0, 1, momentum=0.8)
        close((both["batch_stats"]["mean"][k], both["batch_stats"]["var"][k]), (mean, var))
    np.testing.assert_array_equal(both["batch_moments"]["moments"].weight[:, 0], [2, 0, 4, 2])


@pytest.mark.slow
def test_an_index_for_each_example_accumulates_and_recalibrates(x):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, index, train):
            return bnjax.linen.IndexedBatchNorm(num_indices=4, momentum=0.8)(x, not train, index=index)

    def loss(model, batch, train):
        return (model(*batch, train) ** 2).mean()

    network = Network()
    variables = network.init(KEY, x, INDEX, False)
    state = TrainState.create(apply_fn=network.apply, tx=optax.sgd(0.1), **variables)
    state, _ = train_step(loss, accumulate=2)(state, (x, INDEX))

    def apply(variables, batch, **options):
        return network.apply(variables, *batch, True, **options)

    halves = [(x[:4], INDEX[:4]), (x[4:], INDEX[4:])]
    recalibrated = bnjax.recalibrate(apply, variables, halves)["batch_stats"]["IndexedBatchNorm_0"]
    accumulated = state.batch_stats["IndexedBatchNorm_0"]
    for k in 0, 2, 3:
        _, mean, var = reference.train(x[k == INDEX], ONES, ZEROS, 0, 1, momentum=0.8)
        close((accumulated["mean"][k], accumulated["var"][k]), (mean, var))
        close((recalibrated["mean"][k], recalibrated["var"][k]), reference.moments(x[k == INDEX])[1:])
    close((recalibrated["mean"][1], recalibrated["var"][1]), (ZEROS, ONES), 0)
