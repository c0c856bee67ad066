"""Which calls of the Linen layers write statistics, and what counts updates in the layers of both frameworks."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.scope import DenyList

import bnjax
import bnjax.linen
import bnjax.nnx

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(2, 3, (8, 3)).astype(np.float32)
SEQUENCES = X[:, :, None] * np.ones(4, np.float32)
LSTM = partial(bnjax.linen.BNLSTMCell, features=4, num_steps=2)
# A model that trains with batch statistics, its input, and the call's other arguments.
MODELS = {
    "BatchNorm": (bnjax.linen.BatchNorm(use_running_average=False), X, {}),
    "a schedule": (bnjax.linen.BatchNorm(use_running_average=False, momentum=bnjax.debiased(0.9)), X, {}),
    "Ghost": (bnjax.linen.GhostBatchNorm(use_running_average=False, ghost_size=4), X, {}),
    "Renorm": (bnjax.linen.RenormBatchNorm(use_running_average=False), X, {}),
    "Indexed": (bnjax.linen.IndexedBatchNorm(use_running_average=False, num_indices=2), X, {"index": 1}),
    "Conditional": (
        bnjax.linen.ConditionalBatchNorm(use_running_average=False, num_classes=2),
        X,
        {"label": np.arange(8) % 2},
    ),
    "converted": (bnjax.linen.convert(nn.Sequential([nn.BatchNorm(use_running_average=False)])), X, {}),
    "BNLSTM": (bnjax.linen.BNLSTM(LSTM(use_running_average=False)), SEQUENCES, {}),
}
FAST = ("a schedule", "Renorm", "converted")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_training_call_without_mutable_statistics_normalizes_and_writes_nothing(name):
    """The output is that of the call which updates; where the mean is known it is that of the batch."""
    model, x, call = MODELS[name]
    variables = model.init(KEY, x, **call)

    def both(variables):
        return model.apply(variables, x, mutable=["batch_stats"], **call), model.apply(variables, x, **call)

    (expected, updates), output = jax.jit(both)(variables)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), output, expected)
    if name != "BNLSTM":
        np.testing.assert_allclose(output.mean(0), 0, atol=1e-6)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), updates["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))  # the call that may write does


def test_what_is_not_mutable_is_not_written():
    layer, x, _ = MODELS["a schedule"]
    variables = layer.init(KEY, x)
    stats = {name: variables["batch_stats"][name] for name in ("mean", "var")}  # no count yet
    for mutable, written in (
        (["batch_moments"], {"batch_moments"}),
        (DenyList("batch_stats"), {"params"}),
        ([], set()),
    ):
        y, updates = layer.apply({**variables, "batch_stats": stats}, x, mutable=mutable)
        assert set(updates) == written
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    moments = layer.apply(variables, x, mutable=["batch_moments"])[1]["batch_moments"]["moments"]
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-5)


def linen_counts(layer, options, count, steps):
    model = getattr(bnjax.linen, layer)(use_running_average=False, **options)
    variables = model.init(KEY, X)
    variables = {**variables, "batch_stats": {**variables["batch_stats"], "count": jnp.asarray(count)}}
    for _ in range(steps):
        variables = {**variables, **model.apply(variables, X, mutable=["batch_stats"])[1]}
    return variables["batch_stats"]


def nnx_counts(layer, options, count, steps):
    model = getattr(bnjax.nnx, layer)(3, rngs=nnx.Rngs(0), **options)
    model.count = nnx.BatchStat(jnp.asarray(count))
    for _ in range(steps):
        model(X)
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


@pytest.mark.parametrize("run", [linen_counts, nnx_counts])
@pytest.mark.parametrize(
    ("layer", "scheduled", "count"),
    [("BatchNorm", False, 5), ("BatchNorm", True, np.array([5, 5, 5], np.int32)), ("RenormBatchNorm", True, 5)],
    ids=["plain", "a count for each feature", "renormalized"],
)
def test_a_count_that_came_with_the_statistics_goes_on(layer, scheduled, count, run):
    """Whatever the momentum is; a schedule takes it from there."""
    options = {"momentum": bnjax.cumulative_average} if scheduled else {}
    stats = run(layer, options, count, 2)
    np.testing.assert_array_equal(stats["count"], np.add(count, 2))
    assert stats["count"].shape == np.shape(count)
    if scheduled:  # 5 updates at the initial 0 and two by this batch
        np.testing.assert_allclose(stats["mean"], 2 / 7 * X.mean(0), rtol=1e-5)


def test_recalibrated_statistics_keep_one_count_for_all_features():
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    variables = layer.init(KEY, X)
    variables = {**variables, "batch_stats": {**variables["batch_stats"], "count": jnp.int32(9)}}
    fresh = bnjax.recalibrate(layer.apply, variables, [X, X, X])["batch_stats"]
    assert (fresh["count"].shape, int(fresh["count"])) == ((), 3)
    assert "not counted" in str(bnjax.diagnose({}, {**fresh, "count": jnp.int32(0)}))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_renorm_layers_average_variances_by_option_and_by_conversion(library):
    rooms = getattr(bnjax, library)
    var = 0.9 * 1 + 0.1 * X.astype(np.float64).var(0)
    options = {"average": "var", "momentum": 0.9}
    if library == "linen":
        layer = rooms.RenormBatchNorm(use_running_average=False, **options)
        model = rooms.convert(nn.BatchNorm(use_running_average=False), to=rooms.RenormBatchNorm, **options)
        got = [m.apply(m.init(KEY, X), X, mutable=["batch_stats"])[1]["batch_stats"]["var"] for m in (layer, model)]
    else:
        layer = rooms.RenormBatchNorm(3, rngs=nnx.Rngs(0), **options)
        model = rooms.convert(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), to=rooms.RenormBatchNorm, **options)
        assert layer(X).shape == model(X).shape
        got = [layer.var[...], model.var[...]]
    for value in got:
        np.testing.assert_allclose(value, var, rtol=1e-5)
    with pytest.raises(ValueError, match=r"convert\(average='variance'\): expected \"std\""):
        rooms.convert(model, to=rooms.RenormBatchNorm, average="variance")
