"""Folding one layer, and recalibration against moments taken in float64."""

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
from tests.support.folding import CLOSE, drawn, numbers


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (None, 0.0), (1.0, None), (None, None)])
def test_fold_is_the_formula(scale, bias):
    params, state = drawn(bnjax.bn_init((3, 4), scale=scale, bias=bias))
    x = numbers(7, 3, 4).astype(np.float64)
    mean, var = (np.asarray(v, np.float64) for v in state[:2])
    gamma, beta = (
        np.float64(d) if v is None else np.asarray(v, np.float64) for v, d in zip(params, (1, 0), strict=True)
    )
    want = (x - mean) / np.sqrt(var + 1e-3) * gamma + beta
    affine = bnjax.fold(params, state, epsilon=1e-3)
    np.testing.assert_allclose(x * np.asarray(affine.scale) + np.asarray(affine.bias), want, rtol=1e-5, atol=1e-5)


def test_fold_of_half_precision_parameters_is_float32():
    params, state = drawn(bnjax.bn_init(3, dtype=jnp.bfloat16))
    affine = bnjax.fold(params, state)
    assert {v.dtype for v in affine} == {jnp.dtype("float32")}
    want, _ = bnjax.bn_apply(params, state, numbers(5, 3), False)
    np.testing.assert_allclose(numbers(5, 3) * affine.scale[None] + affine.bias[None], want, **CLOSE)
    kernel, bias = bnjax.fold_into_previous(jnp.ones((2, 3), jnp.bfloat16), None, affine)
    assert (kernel.dtype, bias.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_fold_of_complex_layers():
    params, state = bnjax.bn_init(2, dtype=jnp.complex64)
    state = state._replace(mean=jnp.array([1 + 2j, 3j], jnp.complex64), var=jnp.array([4.0, 1.0]))
    affine = bnjax.fold(params, state)
    x = (numbers(5, 2) + 1j * numbers(5, 2)[::-1]).astype(np.complex64)
    want, _ = bnjax.bn_apply(params, state, x, False)
    np.testing.assert_allclose(x * affine.scale[None] + affine.bias[None], want, **CLOSE)
    with pytest.raises(TypeError, match=r"float32 kernel cannot hold a complex layer"):
        bnjax.fold_into_previous(jnp.ones((3, 2)), None, affine)


def test_fold_is_differentiable_and_compiles():
    params, state = drawn(bnjax.bn_init(3))
    gradient = jax.jit(jax.grad(lambda p: bnjax.fold(p, state).bias.sum()))(params)
    np.testing.assert_allclose(gradient.scale, -state.mean / np.sqrt(state.var + 1e-5), rtol=1e-5)
    np.testing.assert_array_equal(gradient.bias, np.ones(3))


def test_fold_rejects():
    params, state = bnjax.bn_init(3)
    with pytest.raises(ValueError, match=r"fold\(state=None\).*normalizes by its batch"):
        bnjax.fold(params, None)
    with pytest.raises(ValueError, match=r"params.scale has shape \(4, 1, 3\), state.mean \(3,\)"):
        bnjax.fold(bnjax.BNParams(jnp.ones((4, 1, 3)), None), state)
    with pytest.raises(ValueError, match=r"fold\(epsilon=0"):
        bnjax.fold(params, state, epsilon=0)
    affine = bnjax.fold(params, state)
    with pytest.raises(ValueError, match=r"fold_into_previous.*shape \(3, 2\) and so 2 features.*\(3,\)"):
        bnjax.fold_into_previous(jnp.ones((3, 2)), None, affine)
    with pytest.raises(ValueError, match=r"fold_into_next.*shape \(2, 4\) and so 4 features.*\(3,\)"):
        bnjax.fold_into_next(jnp.ones((2, 4)), None, affine, groups=2)


@pytest.mark.parametrize(
    ("function", "kernel", "bias", "options", "message"),
    [
        ("previous", np.ones((2, 3)), np.ones(2), {}, r"\(bias=...\): expected shape \(3,\), .* got \(2,\)"),
        ("previous", np.ones((2, 3)), [0.0] * 3, {}, r"\(bias=...\): expected a floating or complex array, got list"),
        ("previous", [[1.0] * 3], None, {}, r"\(kernel=...\): expected a floating or complex array, got list"),
        ("previous", np.ones((2, 3)), None, {"axis": 7}, r"\(axis=7\): kernel has shape \(2, 3\).*axis of kernel that"),
        ("previous", np.ones((2, 3)), None, {"axis": (1, -1)}, r".*repeated, since kernel has shape \(2, 3\)"),
        ("next", np.ones((3, 2)), np.ones(3), {}, r"\(bias=...\): expected shape \(2,\), .* got \(3,\)"),
        ("next", np.ones((3, 2)), None, {"groups": 0}, r"\(groups=0\): expected a positive integer"),
        ("next", np.ones(3), None, {}, r"\(kernel=...\): expected shape \(..., inputs / groups, outputs\), got \(3,\)"),
        ("next", np.ones((1, 4)), None, {"groups": 3}, r"\(groups=3\): .* 4 outputs, which are no multiple of groups"),
    ],
)
def test_fold_into_a_neighbour_rejects(function, kernel, bias, options, message):
    affine = bnjax.fold(*bnjax.bn_init(3))
    kernel, bias = (v.astype(np.float32) if isinstance(v, np.ndarray) else v for v in (kernel, bias))
    with pytest.raises((TypeError, ValueError), match=rf"fold_into_{function}{message}"):
        getattr(bnjax, f"fold_into_{function}")(kernel, bias, affine, **options)


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
    """Mean and variance of what each layer gets: of the batches, and of the batches normalized one by one."""
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
        with nn.intercept_methods(bnjax.linen.exact_batch_norm):
            return Masked().apply(variables, batch["x"], batch["mask"], mutable=mutable)

    batches = [{"x": x, "mask": np.arange(len(x))[:, None] > 0} for x in BATCHES]
    variables = Masked().init(jax.random.key(0), **batches[0])
    after = bnjax.recalibrate(apply, variables, batches)["batch_stats"]["BatchNorm_0"]
    valid = np.concatenate([x[1:] for x in BATCHES]).astype(np.float64)
    check(after, (valid.mean(0), valid.var(0)))


def test_recalibrate_keeps_what_has_no_information():
    apply, variables = linen_network()
    x = BATCHES[0].copy()
    x[3, 1] = np.nan
    after = bnjax.recalibrate(apply, variables, [x])["batch_stats"]["first"]
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
    assert traced == [(8, 3), (8, 3), (3, 3)]  # the first of them asks for shapes alone


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


def test_recalibrate_rejects():
    apply, variables = linen_network()
    with pytest.raises(ValueError, match=r"recalibrate\(batches=...\): there is no batch"):
        bnjax.recalibrate(apply, variables, [])
    with pytest.raises(ValueError, match=r"no layer saw a value in training mode"):
        bnjax.recalibrate(partial(Network().apply, train=False), variables, BATCHES)
    flax = nn.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"recalibrate.*gave no moments of the batch: the model itself"):
        bnjax.recalibrate(flax.apply, flax.init(jax.random.key(0), BATCHES[0]), BATCHES)


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
