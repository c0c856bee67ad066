"""Folding is for evaluation: in training it is an error, as is a folded model; unfolded layers are named."""

import gc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx
from tests.support.folding import CLOSE, numbers

pytestmark = pytest.mark.usefixtures("flax_promotion")
X = numbers(5, 4)
TRAINS = r"'bn' normalizes? by (its|their) batch in this trace|all norms .* in this trace, 'bn' for one"


class Linen(nn.Module):
    norm: Any = nn.BatchNorm
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return self.norm(name="bn", use_running_average=not train)(nn.Dense(4, name="a")(x))


class Frozen(bnjax.linen.BatchNorm):
    frozen: bool = True


class Nnx(nnx.Module):
    def __init__(self, norm=bnjax.nnx.BatchNorm, **options):
        self.a, self.bn = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), norm(4, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, train=None):
        return self.bn(self.a(x)) if train is None else self.bn(self.a(x), use_running_average=not train)


@pytest.mark.parametrize(
    "model", [Linen(), Linen(bnjax.linen.BatchNorm), bnjax.linen.convert(Linen(), momentum=0.5)], ids=str
)
def test_linen_refuses_to_fold_in_training_and_a_folded_model_in_training(model):
    variables = model.init(jax.random.key(0), X, False)
    for options in ({}, {"mutable": ["batch_stats"]}):
        with pytest.raises(ValueError, match=rf"fold_model\(...\): ({TRAINS}).*such as train=False"):
            bnjax.linen.fold_model(model, variables, X, True, **options)
    folded, interceptor = bnjax.linen.fold_model(model, variables, X, train=False)
    message = "interceptor: 'bn' is folded, but is called in training"
    with pytest.raises(ValueError, match=message):
        interceptor.model.apply(folded, X, train=True, mutable=["batch_stats"])
    with nn.intercept_methods(interceptor), pytest.raises(ValueError, match=message):
        model.apply(folded, X, train=True, mutable=["batch_stats"])


def test_linen_says_that_the_model_trains_where_it_draws_random_numbers():
    model = Linen(rate=0.5)
    with pytest.raises(ValueError, match=r"fold_model\(...\): the model ran as in training: Dropout_0 .* train=False"):
        bnjax.linen.fold_model(model, model.init(jax.random.key(0), X, False), X, True)


def test_nnx_refuses_to_fold_in_training_and_a_folded_model_in_training():
    model = Nnx(nnx.BatchNorm)
    before = nnx.state(model)
    for fold in (bnjax.nnx.fold_model, bnjax.nnx.fold_report):
        with pytest.raises(ValueError, match=r"fold_model\(model=...\): bn: in training mode.* call model.eval\(\)"):
            fold(model, X)
        with pytest.raises(ValueError, match=rf"fold_model\(...\): ({TRAINS}).*such as train=False"):
            fold(model, X, train=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    want = model(X, train=False)
    assert bnjax.nnx.fold_report(model, X, train=False).folded == [("a", "bn")]  # the call says so, not the mode
    model.eval()
    bnjax.nnx.fold_model(model, X)
    np.testing.assert_allclose(model(X), want, **CLOSE)
    apply, variables = bnjax.nnx.functional(model)
    np.testing.assert_allclose(apply(variables, X), want, **CLOSE)
    for call in (lambda: model(X, train=True), lambda: apply(variables, X, mutable=["batch_stats"])):
        with pytest.raises(ValueError, match=r"'bn' is folded, but is called in training.*Call model.eval\(\)"):
            call()
    model.train()
    with pytest.raises(ValueError, match="'bn' is folded, but is called in training"):
        model(X)
    np.testing.assert_allclose(model(X, train=False), want, **CLOSE)


def test_frozen_norms_are_folded_and_called_in_training():
    model = bnjax.linen.convert(Linen(), frozen=True)
    variables = model.init(jax.random.key(0), X, False)
    folded, interceptor = bnjax.linen.fold_model(model, variables, X, True)
    y, updates = interceptor.model.apply(folded, X, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, model.apply(variables, X, False), **CLOSE)
    assert not updates
    model = Nnx(frozen=True)
    want = model(X)
    assert type(bnjax.nnx.fold_model(model, X).bn) is bnjax.nnx.Identity
    model.train()
    np.testing.assert_allclose(model(X), want, **CLOSE)


class Own(nnx.Module):
    """A project's own batch normalization."""

    def __init__(self):
        self.running_mean, self.running_var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))

    def __call__(self, x):
        return (x - self.running_mean[...]) / jnp.sqrt(self.running_var[...])


class OwnLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean = self.variable("statistics", "running_mean", jnp.zeros, (4,))
        return (x - mean.value) / self.variable("statistics", "running_std", jnp.ones, (4,)).value


def test_fold_names_other_layers_with_statistics(caplog):
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), Own())
    model.unused = bnjax.nnx.IndexedBatchNorm(4, num_indices=2, rngs=nnx.Rngs(0))
    report = bnjax.nnx.fold_report(model, X)
    assert {path: why.partition(" is ")[0] for path, why in report.unfolded.items()} == {
        "layers/1": "Own",
        "unused": "IndexedBatchNorm",
    }
    model = nn.Sequential([nn.Dense(4), OwnLinen(), Frozen(use_running_average=True)])
    _, interceptor = bnjax.linen.fold_model(model, model.init(jax.random.key(0), X), X)
    assert interceptor.report.unfolded["layers_1"].startswith("OwnLinen is none of ['AdaptiveBatchNorm', 'BatchNorm'")
    assert interceptor.report.unfolded["layers_2"].startswith("Frozen is none of ['AdaptiveBatchNorm', 'BatchNorm'")
    assert "left layers_1: OwnLinen is none of" in caplog.text


def test_fold_report_leaves_no_classes():
    model = Nnx()
    model.eval()

    def classes():
        gc.collect()
        return len(nnx.Linear.__subclasses__()), len(bnjax.nnx.BatchNorm.__subclasses__())

    bnjax.nnx.fold_report(model, X)
    before = classes()
    for _ in range(3):
        assert bnjax.nnx.fold_report(model, X).folded == [("a", "bn")]
    assert classes() == before
