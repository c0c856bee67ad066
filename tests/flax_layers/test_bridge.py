"""Layers through `flax.nnx.bridge`: an NNX layer in a Linen model, and a Linen layer in an NNX model."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import training
from tests.support.folding import numbers

pytestmark = pytest.mark.usefixtures("flax_promotion")
X = 2 + 3 * numbers(24, 4)
KEY = jax.random.key(0)


class Inner(nnx.Module):
    """An NNX model whose layers have numbers as names."""

    def __init__(self, rngs):
        self.layers = nnx.List([bnjax.nnx.BatchNorm(4, momentum=0.0, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


class LinenModel(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.norm(x))


class LinenPart(nn.Module):
    """A Linen module, which draws from a stream if its `rate` is not 0."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.0)(x)
        return nn.Dropout(self.rate, deterministic=self.rate == 0)(x)


class NnxModel(nnx.Module):
    def __init__(self, part, **options):
        self.part = bridge.ToNNX(part, rngs=nnx.Rngs(0)).lazy_init(X)
        self.bn = bnjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.options = options

    def __call__(self, x):
        return self.bn(self.part(x, **self.options))


def linen(norm):
    model = LinenModel(norm)
    return model.apply, model.init(KEY, X)


def whole(model):
    return model.apply, model.init(KEY, X)


layer = partial(bridge.to_linen, bnjax.nnx.BatchNorm, 4, momentum=0.0)
# By name: the model, and the path of the layer that gets X.
MODELS = {
    "to_linen": (lambda: linen(layer()), "norm"),
    "to_linen, a model": (lambda: linen(bridge.to_linen(Inner)), "norm/layers/0"),
    "to_linen alone": (lambda: whole(layer()), ""),
    "ToNNX": (lambda: bnjax.nnx.functional(NnxModel(LinenPart())), "part/BatchNorm_0"),
    "ToNNX, a list": (lambda: bnjax.nnx.functional(NnxModel(LinenPart(), mutable=["batch_stats"])), "part/BatchNorm_0"),
    "ToNNX, all": (lambda: bnjax.nnx.functional(NnxModel(LinenPart(), mutable=True)), "part/BatchNorm_0"),
    "ToNNX alone": (
        lambda: bnjax.nnx.functional(bridge.ToNNX(LinenPart(), rngs=nnx.Rngs(0)).lazy_init(X)),
        "BatchNorm_0",
    ),
}


SLOW = ("to_linen", "ToNNX", "ToNNX, a list")  # each differs in few lines from another
CASES = [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in MODELS.items()]


def loss(model, x, train):
    return jnp.sum(model(x) ** 2)


@pytest.mark.parametrize(("make", "path"), CASES)
def test_bridged_layers_are_recalibrated_accumulated_and_diagnosed(make, path):
    apply, variables = make()
    mean, var = X.astype(np.float64).mean(0), X.astype(np.float64).var(0)

    def check(batch_stats):
        leaves = jax.tree_util.tree_leaves_with_path(batch_stats)
        named = {jax.tree_util.keystr(k, simple=True, separator="/").removesuffix("/value"): v for k, v in leaves}
        np.testing.assert_allclose(named[f"{path}/mean".strip("/")], mean, rtol=1e-5)
        np.testing.assert_allclose(named[f"{path}/var".strip("/")], var, rtol=1e-5)

    new = bnjax.recalibrate(apply, variables, [X[:16], X[16:]])
    check(new["batch_stats"])
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    _, updates = jax.jit(partial(apply, mutable=["batch_stats", "batch_moments"]))(new, X)
    report = bnjax.diagnose(new["params"], new["batch_stats"], updates["batch_moments"])
    assert report.layers[path or "the model itself"].shift.max() < 1e-4
    state = training.TrainState.create(apply_fn=apply, tx=optax.sgd(0.0), **variables)
    check(training.train_step(loss, accumulate=2)(state, X)[0].batch_stats)


def test_a_linen_part_of_an_nnx_model_needs_keys_only_where_it_draws():
    apply, variables = bnjax.nnx.functional(NnxModel(LinenPart(0.5)))
    with pytest.raises(ValueError, match=r"LinenPart draws random numbers \(Dropout_0 .*rngs=\{'default': key\}"):
        apply(variables, X, mutable=["batch_stats"])
    y, _ = apply(variables, X, mutable=["batch_stats"], rngs={"default": KEY})
    same, _ = apply(variables, X, mutable=["batch_stats"], rngs={"default": KEY})
    np.testing.assert_array_equal(y, same)


def test_a_converted_linen_model_around_numbered_layers_of_flax():
    class Numbered(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

        def __call__(self, x):
            return self.norms[1](self.norms[0](x))

    model = bnjax.linen.convert(bridge.to_linen(Numbered), momentum=0.0, where=lambda path: path == "norms/0")
    _, updates = model.apply(model.init(KEY, X), X, mutable=["batch_stats"])
    first, second = (updates["batch_stats"]["norms"][n]["mean"] for n in (0, 1))
    np.testing.assert_allclose(first, X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(second, np.zeros(4), atol=1e-6)
    with pytest.raises(ValueError, match=r"where matches no layer of ToLinen. Its layers are: 'norms/0', 'norms/1'"):
        bnjax.linen.convert(bridge.to_linen(Numbered), where=lambda path: path == "norms/2").init(KEY, X)


def test_recalibrate_names_a_bridged_layer_of_flax():
    apply, variables = bnjax.nnx.functional(NnxModel(nn.BatchNorm(use_running_average=False)))
    with pytest.raises(ValueError, match=r"gave no moments of the batch: part\. .*or bnjax.nnx.convert"):
        bnjax.recalibrate(apply, variables, [X])


def test_fold_names_bridged_layers():
    model = LinenModel(bridge.to_linen(bnjax.nnx.BatchNorm, 4, use_running_average=True))
    _, interceptor = bnjax.linen.fold_model(model, model.init(KEY, X), X)
    assert interceptor.report.unfolded["norm"].startswith("it is in the NNX module 'norm' (flax.nnx.bridge)")

    # The remedy: a layer of Linen reads the same variables, and is folded.
    other = LinenModel(bnjax.linen.BatchNorm(use_running_average=True))
    variables = bnjax.recalibrate(*linen(layer()), [X])
    folded, interceptor = bnjax.linen.fold_model(other, variables, X)
    assert interceptor.report.folded == [("norm", "Dense_0")]
    want = model.apply(variables, X)
    np.testing.assert_allclose(interceptor.model.apply(folded, X), want, rtol=1e-5, atol=1e-5)

    model = NnxModel(bnjax.linen.BatchNorm(use_running_average=True))
    model.eval()
    report = bnjax.nnx.fold_report(model, X)
    assert report.unfolded["part"].startswith("it is in the Linen module 'part' (flax.nnx.bridge)")
