"""Recalibration against moments taken in float64."""

import itertools
import sys
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx
from tests.support.folding import drawn, numbers


class Network(nn.Module):
    """Two layers, the second of which sees what the first gives."""

    momentum: Any = 0.9
    norm: type = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        norm = partial(self.norm, use_running_average=not train, momentum=self.momentum)
        return norm(name="second")(nn.relu(norm(name="first")(x)))


def nnx_network():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(bnjax.nnx.BatchNorm(3, rngs=rngs), nnx.relu, bnjax.nnx.BatchNorm(3, rngs=rngs))


SIZES = (8, 8, 3, 1, 5)
BATCHES = [5 + 2 * x for x in np.split(numbers(sum(SIZES), 3), np.cumsum(SIZES)[:-1])]


def oracle(scale, bias, ddof=0):
    """Mean and variance of each layer's input: the batches, and the batches normalized one by one."""
    parts = [x.astype(np.float64) for x in BATCHES]
    normalized = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + bias for x in parts]
    inputs = np.concatenate(parts), np.maximum(np.concatenate(normalized), 0)
    return [(x.mean(0), x.var(0, ddof=ddof)) for x in inputs]


def check(got, want):
    np.testing.assert_allclose(got["mean"], want[0], rtol=1e-5)
    np.testing.assert_allclose(got["var"], want[1], rtol=1e-4)


def linen_network(**options):
    model = Network(**options)
    variables = drawn(jax.eval_shape(partial(model.init, train=False), jax.random.key(0), BATCHES[0]))
    return partial(model.apply, train=True), variables


@pytest.mark.parametrize("unbiased_var", [False, True])
def test_recalibrate_pools_unequal_batches_by_count(unbiased_var):
    apply, variables = linen_network()
    after = bnjax.recalibrate(apply, variables, iter(BATCHES), unbiased_var=unbiased_var)
    first = variables["params"]["first"]
    want = oracle(np.float64(first["scale"]), np.float64(first["bias"]), ddof=int(unbiased_var))
    for name, moments in zip(("first", "second"), want, strict=True):
        check(after["batch_stats"][name], moments)
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, after["params"], variables["params"])


def test_recalibrate_of_nnx():
    model = nnx_network()
    apply, variables = bnjax.nnx.functional(model)
    after = bnjax.recalibrate(apply, variables, BATCHES)
    nnx.update(model, *after.values())
    want = oracle(1.0, 0.0)
    for layer, moments in zip((model.layers[0], model.layers[2]), want, strict=True):
        check({"mean": layer.mean[...], "var": layer.var[...]}, moments)


def test_recalibrate_counts_batches_where_someone_counts():
    apply, variables = linen_network(momentum=bnjax.cumulative_average)
    after = bnjax.recalibrate(apply, variables, BATCHES)["batch_stats"]
    assert after["first"]["count"].tolist() == after["second"]["count"].tolist() == [len(SIZES)] * 3
    check(after["first"], oracle(1.0, 0.0)[0])


@pytest.mark.parametrize("norm", [bnjax.linen.RenormBatchNorm, partial(bnjax.linen.GhostBatchNorm, ghost_size=64)])
def test_recalibrate_of_variants(norm):
    apply, variables = linen_network(norm=norm)
    after = bnjax.recalibrate(apply, variables, BATCHES)["batch_stats"]
    first = variables["params"]["first"]
    for name, want in zip(
        ("first", "second"), oracle(np.float64(first["scale"]), np.float64(first["bias"])), strict=True
    ):
        check(after[name], want)


def test_recalibrate_of_sharded_batches_is_that_of_whole_ones():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    apply, variables = linen_network()
    whole = [5 + 2 * numbers(16, 3), numbers(8, 3)]
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in whole]
    want = bnjax.recalibrate(apply, variables, whole)["batch_stats"]
    got = bnjax.recalibrate(apply, variables, sharded)["batch_stats"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


def test_recalibrate_takes_batches_of_any_form_and_models_of_flax():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return nn.BatchNorm(use_running_average=False)(x, mask=mask)

    def apply(variables, batch, mutable):
        return bnjax.linen.convert(Masked()).apply(variables, batch["x"], batch["mask"], mutable=mutable)

    batches = [{"x": x, "mask": np.arange(len(x))[:, None] > 0} for x in BATCHES]
    variables = Masked().init(jax.random.key(0), **batches[0])
    after = bnjax.recalibrate(apply, variables, batches)["batch_stats"]["BatchNorm_0"]
    valid = np.concatenate([x[1:] for x in BATCHES]).astype(np.float64)
    check(after, (valid.mean(0), valid.var(0)))


def test_recalibrate_keeps_what_has_no_information(caplog):
    apply, variables = linen_network()
    x = BATCHES[0].copy()
    x[3, 1] = np.nan
    after = bnjax.recalibrate(apply, variables, [x])["batch_stats"]["first"]
    assert "statistics of some features stay as they were: first (1 of 3), second (1 of 3). All batches" in caplog.text
    before = variables["batch_stats"]["first"]
    for name, want in zip(("mean", "var"), (x[:, [0, 2]].mean(0), x[:, [0, 2]].var(0)), strict=True):
        assert after[name][1] == before[name][1]
        np.testing.assert_allclose(after[name][np.array([0, 2])], want, rtol=1e-5)


def test_recalibrate_replaces_statistics_that_are_not_finite():
    apply, variables = linen_network()
    broken = jax.tree.map(lambda v: v * np.nan, variables["batch_stats"])
    after = bnjax.recalibrate(apply, {**variables, "batch_stats": broken}, BATCHES)["batch_stats"]
    check(after["first"], oracle(1.0, 0.0)[0])


def test_recalibrate_keeps_dtypes():
    layer = bnjax.linen.BatchNorm(use_running_average=False, param_dtype=jnp.bfloat16, force_float32_reductions=False)
    x = BATCHES[0].astype(jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    after = bnjax.recalibrate(layer.apply, variables, [x, x])
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(np.float64(after["batch_stats"]["mean"]), np.float64(x).mean(0), rtol=2**-8)


def test_recalibrate_compiles_once_for_each_shape_of_a_batch():
    apply, variables = linen_network()
    traced = []

    def counted(variables, batch, mutable):
        traced.append(batch.shape)
        return apply(variables, batch, mutable=mutable)

    bnjax.recalibrate(counted, variables, BATCHES[:3] * 2)
    assert traced == [(8, 3), (8, 3), (3, 3)]  # the first call asks only for shapes


def test_recalibrate_shows_progress_on_request(capsys, monkeypatch):
    apply, variables = linen_network()
    bnjax.recalibrate(apply, variables, BATCHES)
    assert capsys.readouterr().err == ""
    bnjax.recalibrate(apply, variables, BATCHES, progress=True)
    assert "recalibrate: 100%" in (shown := capsys.readouterr().err)
    assert "5/5" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        bnjax.recalibrate(apply, variables, BATCHES, progress=True)


def test_recalibrate_uses_so_many_batches_and_draws_no_more():
    apply, variables = linen_network()
    drawn_batches = []

    def batches():
        for i in itertools.count():
            drawn_batches.append(i)
            yield BATCHES[i % 2]

    after = bnjax.recalibrate(apply, variables, batches(), num_batches=2)["batch_stats"]["first"]
    assert drawn_batches == [0, 1]
    both = np.concatenate(BATCHES[:2]).astype(np.float64)
    check(after, (both.mean(0), both.var(0)))
    with pytest.warns(UserWarning, match=r"recalibrate\(num_batches=4\): `batches` ended after 2\."):
        fewer = bnjax.recalibrate(apply, variables, BATCHES[:2], num_batches=4)["batch_stats"]["first"]
    jax.tree.map(np.testing.assert_array_equal, fewer, after)
    for number in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=rf"recalibrate\(num_batches={number}\): expected a positive integer"):
            bnjax.recalibrate(apply, variables, BATCHES, num_batches=number)
    for wrong in (3, batches):
        with pytest.raises(TypeError, match=r"recalibrate\(batches=...\): expected an iterable of batches, got a"):
            bnjax.recalibrate(apply, variables, wrong)


class Own(nn.Module):
    """A project's own batch normalization."""

    @nn.compact
    def __call__(self, x):
        self.variable("statistics", "moving_mean", jnp.zeros, (3,))
        self.variable("statistics", "moving_variance", jnp.ones, (3,))
        return x


def test_recalibrate_names_the_layers_that_it_leaves(caplog):
    batch = BATCHES[0]

    class Mixed(nn.Module):
        own: bool = False

        @nn.compact
        def __call__(self, x):
            x = bnjax.linen.BatchNorm(name="evaluates", use_running_average=True)(x)
            x = bnjax.linen.BatchNorm(name="frozen", use_running_average=False, frozen=True)(x)
            x = bnjax.linen.BatchNorm(name="trains", use_running_average=False)(x)
            return Own(name="own")(x) if self.own else x

    variables = drawn(Mixed(True).init(jax.random.key(0), batch))
    before = variables["batch_stats"]
    with pytest.warns(UserWarning, match=r"running statistics of own stay as they were\. These layers are neither"):
        after = bnjax.recalibrate(Mixed(True).apply, variables, [batch])["batch_stats"]
    assert "statistics stay as they were: evaluates, frozen. These layers are frozen" in caplog.text
    jax.tree.map(
        np.testing.assert_array_equal,
        [after[n] for n in ("evaluates", "frozen")],
        [before[n] for n in ("evaluates", "frozen")],
    )
    del variables["statistics"]
    bnjax.recalibrate(Mixed().apply, variables, [batch])  # frozen layers cause no warning


def test_recalibrate_deletes_nothing_and_takes_other_collections():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            count = self.variable("counts", "calls", lambda: jnp.zeros(()))
            if self.is_mutable_collection("counts"):
                count.value += 1
            return bnjax.linen.BatchNorm(use_running_average=False)(x)

    variables = Counting().init(jax.random.key(0), BATCHES[0])
    new = bnjax.recalibrate(Counting().apply, variables, BATCHES[:1])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(variables))
    assert new["counts"] == variables["counts"]


def test_recalibrate_says_what_to_do_after_a_conversion_of_some_layers():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.BatchNorm(use_running_average=False)(x))

    def some(path):
        return path.endswith("_0")

    x = BATCHES[0]
    model = bnjax.linen.convert(Two(), frozen=True, where=some)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"no moments of the batch: BatchNorm_1\..*once more without where="):
        bnjax.recalibrate(model.apply, variables, [x])
    model = bnjax.linen.convert(model)
    after = bnjax.recalibrate(model.apply, variables, [x])["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, after["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
    np.testing.assert_allclose(after["BatchNorm_1"]["mean"], np.float64(x).mean(0) / np.sqrt(1 + 1e-5), rtol=1e-5)

    def layers():
        return nnx.Sequential(*(nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2)))

    model = bnjax.nnx.convert(layers(), frozen=True, where=lambda path: path == "layers/0")
    apply, variables = bnjax.nnx.functional(model)
    with pytest.raises(ValueError, match=r"no moments of the batch: layers/1\..*once more without where="):
        bnjax.recalibrate(apply, variables, [x])
    apply, variables = bnjax.nnx.functional(bnjax.nnx.convert(model))
    after = bnjax.recalibrate(apply, variables, [x])["batch_stats"]["layers"]
    assert after[0]["var"][...].tolist() == [1, 1, 1]
    np.testing.assert_allclose(after[1]["mean"][...], np.float64(x).mean(0) / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_recalibrate_rejects():
    apply, variables = linen_network()
    with pytest.raises(ValueError, match=r"recalibrate\(batches=...\): there is no batch"):
        bnjax.recalibrate(apply, variables, [])
    with pytest.raises(ValueError, match=r"no layer saw a value in training mode"):
        bnjax.recalibrate(partial(Network().apply, train=False), variables, BATCHES)
    flax = nn.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"recalibrate.*gave no moments of the batch: the model itself"):
        bnjax.recalibrate(flax.apply, flax.init(jax.random.key(0), BATCHES[0]), BATCHES)
    for wrong in (apply, None, nnx_network()):
        with pytest.raises(
            TypeError, match=rf"recalibrate\(variables=...\): expected.*got a {type(wrong).__name__}\. "
        ):
            bnjax.recalibrate(apply, wrong, BATCHES)
    with pytest.raises(ValueError, match=r"no layer has running statistics `mean` and `var`\.$"):
        bnjax.recalibrate(*bnjax.nnx.functional(nnx.Linear(3, 3, rngs=nnx.Rngs(0))), BATCHES)
    with pytest.raises(ValueError, match=r"It has layers of other classes: own\. Use bnjax's BatchNorm there"):
        bnjax.recalibrate(apply, {"batch_stats": {"own": {"ra_mean": np.ones(3), "ra_var": np.ones(3)}}}, BATCHES)


def test_recalibrate_rejects_what_it_would_take_apart():
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    variables, x = layer.init(jax.random.key(0), jnp.ones((4, 3))), jnp.ones((4, 3))
    for batches, word in ((x, "ArrayImpl"), (np.ones((4, 3)), "ndarray"), ({"x": x}, "dict")):
        with pytest.raises(TypeError, match=rf"recalibrate\(batches=...\): expected an iterable of batches.*{word}"):
            bnjax.recalibrate(layer.apply, variables, batches)
    with pytest.raises(ValueError, match=r"recalibrate\(variables=...\): no batch_stats among \['params'\]"):
        bnjax.recalibrate(layer.apply, {"params": variables["params"]}, [x])

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bnjax.linen.BatchNorm(use_running_average=False)(nn.Dense(2)(x))

    variables = Network().init(jax.random.key(0), x)
    for batch in ((x, x), {"image": x}):
        with pytest.raises(TypeError, match=r"recalibrate\(apply=...\).*pass a function that takes it apart: lambda"):
            bnjax.recalibrate(Network().apply, variables, [batch])


def test_recalibrate_takes_tuples_and_dictionaries_through_apply():
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    x = jnp.arange(6.0).reshape(3, 2)
    variables = layer.init(jax.random.key(0), x)
    for batch, part in (((x, 0), 0), ({"image": x}, "image")):
        new = bnjax.recalibrate(lambda v, b, part=part, **kw: layer.apply(v, b[part], **kw), variables, [batch] * 2)
        np.testing.assert_allclose(new["batch_stats"]["mean"], [2, 3])
        np.testing.assert_allclose(new["batch_stats"]["var"], [8 / 3, 8 / 3], rtol=1e-6)
