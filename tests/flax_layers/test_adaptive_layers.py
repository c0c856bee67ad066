"""AdaptiveBatchNorm in Linen and NNX, in whole models: deeper layers, modes, folding, conversion."""

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
from bnjax import training
from tests.support import reference

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (8, 3)).astype(np.float32)
KERNELS = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(4, 2)).astype(np.float32)
STATS = [{"mean": RNG.normal(size=n).astype(np.float32), "var": np.ones(n, np.float32) * 2} for n in (4, 2)]
SOURCE_WEIGHT = 3


class Network(nn.Module):
    """Two blocks of a linear layer and Flax's own norm, so that the second norm sees what the first one gives."""

    @nn.compact
    def __call__(self, x, train=False):
        for features in (4, 2):
            x = nn.Dense(features, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
        return x


def linen_model():
    norms = {
        f"BatchNorm_{i}": {"scale": np.ones(n, np.float32), "bias": np.zeros(n, np.float32)}
        for i, n in ((0, 4), (1, 2))
    }
    kernels = {f"Dense_{i}": {"kernel": kernel} for i, kernel in enumerate(KERNELS)}
    stats = {f"BatchNorm_{i}": own for i, own in enumerate(STATS)}
    return Network(), {"params": kernels | norms, "batch_stats": stats}


def nnx_model():
    rngs, layers = nnx.Rngs(0), []
    for kernel, stats in zip(KERNELS, STATS, strict=True):
        layers += [nnx.Linear(*kernel.shape, use_bias=False, rngs=rngs), nnx.BatchNorm(kernel.shape[1], rngs=rngs)]
        layers[-2].kernel[...] = kernel
        layers[-1].mean[...], layers[-1].var[...] = stats["mean"], stats["var"]
    model = nnx.Sequential(*layers)
    model.eval()
    return model


def oracle(x, source_weight):
    """The network in float64, each layer adapted to the output of the layers before it."""
    for kernel, stats in zip(KERNELS, STATS, strict=True):
        x = x.astype(np.float64) @ kernel
        mean, var = reference.adapted(x, stats["mean"], stats["var"], source_weight)
        x = reference.normalize(x, mean, var, 1, 0)
    return x


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_converted_linen_model_adapts_layer_by_layer_and_writes_nothing():
    model, variables = linen_model()
    adaptive = bnjax.linen.convert(model, to=bnjax.linen.AdaptiveBatchNorm, source_weight=SOURCE_WEIGHT)
    close(jax.jit(adaptive.apply)(variables, X), oracle(X, SOURCE_WEIGHT))
    _, updates = adaptive.apply(variables, X, mutable=["batch_stats", "batch_moments"])
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    assert not updates["batch_moments"]["BatchNorm_0"]["moments"].weight.any()
    plain = bnjax.linen.convert(adaptive, to=bnjax.linen.BatchNorm)
    close(plain.apply(variables, X), oracle(X, 1e12))
    train = {"train": True, "mutable": ["batch_stats"]}
    jax.tree.map(close, adaptive.apply(variables, X, **train), plain.apply(variables, X, **train))


def test_a_converted_nnx_model_adapts_layer_by_layer_and_writes_nothing():
    model = bnjax.nnx.convert(nnx_model(), to=bnjax.nnx.AdaptiveBatchNorm, source_weight=SOURCE_WEIGHT)
    apply, variables = bnjax.nnx.functional(model)
    for y in (nnx.jit(lambda model, x: model(x))(model, X), apply(variables, X)):
        close(y, oracle(X, SOURCE_WEIGHT))
    np.testing.assert_array_equal(model.layers[1].mean[...], STATS[0]["mean"])
    bnjax.nnx.convert(model, source_weight=0, to=bnjax.nnx.AdaptiveBatchNorm)
    close(model(X), oracle(X, 0))
    bnjax.nnx.convert(model, to=bnjax.nnx.BatchNorm)
    assert not hasattr(model.layers[1], "source_weight")
    close(model(X), oracle(X, 1e12))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_training_is_that_of_batch_norm_and_a_frozen_layer_adapts_in_evaluation_alone(library, frozen):
    options = {"source_weight": SOURCE_WEIGHT, "frozen": frozen, "momentum": 0.9}
    kind = getattr(bnjax, library).AdaptiveBatchNorm
    if library == "linen":
        layer = kind(**options)
        variables = layer.init(KEY, X, use_running_average=True)
        evaluated = layer.apply(variables, X, use_running_average=True)
        trained, updates = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
        mean = updates["batch_stats"]["mean"]
    else:
        layer = kind(3, rngs=nnx.Rngs(0), **options)
        evaluated = layer(X, use_running_average=True)
        trained, mean = layer(X), layer.mean[...]
    close(evaluated, reference.normalize(X, *reference.adapted(X, np.zeros(3), np.ones(3), SOURCE_WEIGHT), 1, 0))
    statistics = (np.zeros(3), np.ones(3)) if frozen else reference.moments(X)[1:]
    close(trained, reference.normalize(X, *statistics, 1, 0))
    close(mean, 0 if frozen else 0.1 * X.mean(0))


def test_an_adaptive_linen_layer_is_named_and_not_folded(caplog):
    model, variables = linen_model()
    options = {"to": bnjax.linen.AdaptiveBatchNorm, "source_weight": SOURCE_WEIGHT}
    adaptive = bnjax.linen.convert(model, where=lambda path: path == "BatchNorm_0", **options)
    folded, interceptor = bnjax.linen.fold_model(adaptive, variables, X)
    assert interceptor.report.folded == [("Dense_1", "BatchNorm_1")]
    assert "'BatchNorm_0' adapts to each batch" in interceptor.report.unfolded["BatchNorm_0"]
    assert "BatchNorm_0: 'BatchNorm_0' adapts" in caplog.text
    close(interceptor.model.apply(folded, X), adaptive.apply(variables, X))
    with pytest.raises(ValueError, match=r"'BatchNorm_0' adapts to each batch.*convert\(model, to=BatchNorm\)"):
        bnjax.linen.fold_model(adaptive, variables, X, pairs=[("Dense_0", "BatchNorm_0")])
    plain = bnjax.linen.convert(adaptive, to=bnjax.linen.BatchNorm)  # as the message says
    folded, interceptor = bnjax.linen.fold_model(plain, variables, X)
    assert "batch_stats" not in folded
    close(interceptor.model.apply(folded, X), model.apply(variables, X))
    written = nn.Sequential(
        [nn.Dense(4, use_bias=False), bnjax.linen.AdaptiveBatchNorm(source_weight=1, use_running_average=True)]
    )
    own = {
        group: {f"layers_{i}": v[name] for i, name in enumerate(("Dense_0", "BatchNorm_0")) if name in v}
        for group, v in variables.items()
    }
    report = bnjax.linen.fold_model(written, own, X)[1].report
    assert (report.folded, list(report.unfolded)) == ([], ["layers_1"])


def test_an_adaptive_nnx_layer_is_named_and_not_folded(caplog):
    options = {"to": bnjax.nnx.AdaptiveBatchNorm, "source_weight": SOURCE_WEIGHT}
    model = bnjax.nnx.convert(nnx_model(), where=lambda path: path == "layers/1", **options)
    expected = model(X)
    with pytest.raises(ValueError, match=r"'layers/1' adapts to each batch.*convert\(model, to=BatchNorm\)"):
        bnjax.nnx.fold_model(model, pairs=[("layers/0", "layers/1")])
    assert list(bnjax.nnx.fold_report(model, X).unfolded) == ["layers/1"]
    close(bnjax.nnx.fold_model(model, X)(X), expected)
    assert "layers/1: 'layers/1' adapts" in caplog.text
    assert [type(model.layers[i]).__name__ for i in (1, 3)] == ["AdaptiveBatchNorm", "Identity"]


@pytest.mark.slow
def test_training_recalibration_and_diagnosis_take_adaptive_models():
    """As with plain layers; the evaluation step adapts."""
    model, variables = linen_model()
    models = {
        "adaptive": bnjax.linen.convert(model, to=bnjax.linen.AdaptiveBatchNorm, source_weight=SOURCE_WEIGHT),
        "plain": bnjax.linen.convert(model),
    }

    def loss(model, batch, train):
        return jnp.mean(model(batch, train) ** 3)

    results = {}
    for name, own in models.items():
        fresh = jax.tree.map(jnp.array, variables)
        again = bnjax.recalibrate(lambda v, x, own=own, **options: own.apply(v, x, train=True, **options), fresh, [X])
        assert bnjax.diagnose(again["params"], again["batch_stats"]).findings == []
        state = training.TrainState.create(apply_fn=own.apply, tx=optax.sgd(0.1), **fresh)
        evaluated = training.eval_step(loss)(state, X)
        state, _ = training.train_step(loss, accumulate=2)(state, X)
        results[name] = state.batch_stats, again["batch_stats"], evaluated["loss"]
    jax.tree.map(close, results["adaptive"][:2], results["plain"][:2])
    for name, source_weight in {"adaptive": SOURCE_WEIGHT, "plain": 1e12}.items():
        close(results[name][2], np.mean(oracle(X, source_weight) ** 3))


def test_a_layer_takes_a_traced_source_weight():
    variables = bnjax.linen.BatchNorm(use_running_average=True).init(KEY, X)

    def call(source_weight):
        layer = bnjax.linen.AdaptiveBatchNorm(source_weight=source_weight, use_running_average=True)
        return layer.apply(variables, X)

    layer = bnjax.nnx.AdaptiveBatchNorm(3, source_weight=jnp.array(5.0), use_running_average=True, rngs=nnx.Rngs(0))
    mean, var = reference.adapted(X, np.zeros(3), np.ones(3), 5)
    for y in (jax.jit(call)(5.0), nnx.jit(lambda layer, x: layer(x))(layer, X)):
        close(y, reference.normalize(X, mean, var, 1, 0))


def test_a_traced_mode_is_an_error_of_ours_in_a_frozen_layer_too():
    layer = bnjax.linen.AdaptiveBatchNorm(source_weight=1, frozen=True)
    variables = layer.init(KEY, X, use_running_average=True)
    nnx_layer = bnjax.nnx.AdaptiveBatchNorm(3, source_weight=1, frozen=True, rngs=nnx.Rngs(0))
    for call in (lambda mode: layer.apply(variables, X, mode), lambda mode: nnx_layer(X, mode)):
        with pytest.raises(TypeError, match=r"AdaptiveBatchNorm\(use_running_average=...\): expected a Python bool"):
            jax.eval_shape(call, True)


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "AdaptiveBatchNorm"}, r"convert\(source_weight=None\): expected a number of 0 or more"),
        ({"to": "AdaptiveBatchNorm", "source_weight": -1}, r"convert\(source_weight=-1\)"),
        ({"source_weight": 4}, r"a BatchNorm has no source_weight.*pass to=AdaptiveBatchNorm too"),
    ],
    ids=["missing", "negative", "another class"],
)
def test_convert_rejects_a_source_weight_that_is_missing_or_wrong(library, changes, message):
    module = getattr(bnjax, library)
    model = linen_model()[0] if library == "linen" else nnx_model()
    changes = changes | ({"to": getattr(module, changes["to"])} if "to" in changes else {})
    with pytest.raises((TypeError, ValueError), match=message):
        module.convert(model, **changes)
    with pytest.raises(TypeError, match=r"convert\(source_weight=...\): the value is traced"):
        jax.eval_shape(lambda w: module.convert(model, to=module.AdaptiveBatchNorm, source_weight=w), 4.0)
