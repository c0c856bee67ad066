"""Edges of what is accepted: weights far from 1, masked elements that are not finite, momenta out of range, names."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.core.records import Collected
from tests.support import reference
from tests.support.collecting import apply_and_collect
from tests.support.compiling import compilations
from tests.support.pairwise import pairwise

RNG = np.random.default_rng(5)
X = (RNG.standard_normal((12, 3)) * 2 + 5).astype(np.float32)
G = RNG.standard_normal((12, 3)).astype(np.float32)
WEIGHTS = (RNG.random((12, 1)) + 0.1).astype(np.float32) * (np.arange(12) % 4 != 1).reshape(12, 1)
PARAMS = bnjax.BNParams(jnp.array([0.5, -2.0, 3.0]), jnp.array([1.0, 0.0, -1.0]))
STATE = bnjax.bn_init(3)[1]
OPTIONS = {"axis": -1, "momentum": 0.0, "epsilon": 1e-5, "axis_name": None, "axis_index_groups": None}
FAR = [1e-36, 1e-25, 1e-12, 1.0, 1e12, 1e20, 1e35, 4e37]

# Weights far from 1


def assert_matches(y, state, weights=WEIGHTS, tolerance=2e-6):
    want = reference.train(X, *PARAMS, 0, 1, momentum=0.0, mask=weights, unbiased=True)
    for got, expected in zip((y, state.mean, state.var), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(state.count, 1)


@jax.jit
def weighted(x, weights):
    return bnjax.bn_apply(PARAMS, STATE, x, True, mask=weights, unbiased_var=True, momentum=0.0)


@jax.jit
@partial(jax.vmap, out_axes=(0, None), axis_name="i")
def weighted_parts(x, weights):
    options = {"axis_name": "i", "unbiased_var": True, "momentum": 0.0}
    return bnjax.bn_apply(PARAMS, STATE, x, True, mask=weights, **options)


@pytest.mark.parametrize("factor", FAR)
@pytest.mark.parametrize("name", ["one device", "many devices", "vmap", "examples", "ghost", "features"])
def test_only_ratios_of_weights_count(name, factor):
    weights = WEIGHTS * np.float32(factor)
    options = {"unbiased_var": True, "momentum": 0.0}
    if name == "ghost":
        _, state = bnjax.ghost_bn_apply(PARAMS, STATE, X, True, ghost_size=5, mask=weights, **options)
        y = bnjax.bn_apply(PARAMS, None, X, True, mask=weights)[0]
    elif name in ("vmap", "examples"):
        rows = 4 if name == "vmap" else 1
        y, state = weighted_parts(*(v.reshape(-1, rows, v.shape[1]) for v in (X, weights)))
        y = y.reshape(X.shape)
    elif name == "many devices":
        mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
        y, state = weighted(*jax.device_put((X, weights), jax.NamedSharding(mesh, jax.P("a"))))
    else:
        weights = weights if name == "one device" else np.broadcast_to(weights, X.shape)
        y, state = bnjax.bn_apply(PARAMS, STATE, X, True, mask=weights, **options)
    assert_matches(y, state)


@jax.jit
def differentiated(params, x, weights):
    """Gradients of a loss, and its derivative along G."""

    def loss(params, x):
        return jnp.sum(bnjax.bn_apply(params, None, x, True, mask=weights)[0] * G)

    return jax.grad(loss, (0, 1))(params, x), jax.jvp(lambda x: loss(params, x), (x,), (G,))[1]


@pytest.mark.parametrize("factor", FAR)
def test_only_ratios_of_weights_count_for_derivatives(factor):
    (dparams, dx), tangent = differentiated(PARAMS, X, WEIGHTS * np.float32(factor))
    want_dx, dscale, dbias = reference.gradients(X, G, PARAMS.scale, mask=WEIGHTS)
    np.testing.assert_allclose(dx, want_dx, atol=1e-5)
    np.testing.assert_allclose(dparams.scale, dscale, atol=2e-5)
    np.testing.assert_allclose(dparams.bias, dbias, atol=2e-5)
    np.testing.assert_allclose(tangent, np.sum(want_dx * G), rtol=1e-5)


@pytest.mark.parametrize("factor", FAR)
def test_only_ratios_of_weights_count_over_an_accumulation(factor):
    weights = WEIGHTS * np.float32(factor)
    earlier, state = None, STATE
    for part in (slice(0, 5), slice(5, 12)):
        options = OPTIONS | {"mask": weights[part], "unbiased_var": True, "earlier": earlier}
        _, state, earlier = apply_and_collect(PARAMS, STATE, X[part], **options)
    assert isinstance(earlier, Collected)
    y = bnjax.bn_apply(PARAMS, None, X, True, mask=weights)[0]
    assert_matches(y, state)
    np.testing.assert_allclose(earlier.moments.weight, factor * WEIGHTS.sum(), rtol=1e-6)
    effective = WEIGHTS.astype(float).sum() ** 2 / (WEIGHTS.astype(float) ** 2).sum()
    np.testing.assert_allclose(earlier.moments.weight / earlier.support.mean_weight, effective, rtol=1e-6)
    np.testing.assert_array_equal(earlier.support.valid, 9)


@jax.jit
def moments(x, weights):
    return bnjax.batch_moments(x, mask=weights)


@jax.jit
def merged(*parts):
    return bnjax.merge_moments(*(moments(*part) for part in parts))


@pytest.mark.parametrize("factor", FAR)
def test_the_weight_of_moments_is_the_sum_of_the_mask_and_merges_are_by_ratios(factor):
    weights = WEIGHTS * np.float32(factor)
    whole = moments(X, weights)
    parts = merged(*((X[i::3], weights[i::3]) for i in range(3)))
    total, mean, var = reference.moments(X, mask=weights)
    for got in (whole, parts):
        np.testing.assert_allclose(got.weight, total, rtol=1e-6)
        np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(got.var, var, rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int8, jnp.int32])
def test_weights_of_other_dtypes_are_taken_in_float32(dtype):
    largest = 60000 if dtype == jnp.float16 else 100  # their sum, and that of their squares, leave the dtype
    weights = jnp.asarray(np.round(WEIGHTS * largest), dtype)
    y, state = bnjax.bn_apply(PARAMS, STATE, X, True, mask=weights, unbiased_var=True, momentum=0.0)
    assert_matches(y, state, np.asarray(weights, np.float64))


# Masked elements that are not finite

VARIANTS = {
    "bn_apply": bnjax.bn_apply,
    "ghost_bn_apply": lambda *args, **options: bnjax.ghost_bn_apply(*args, ghost_size=5, **options),
    "renorm_bn_apply": lambda *args, **options: bnjax.renorm_bn_apply(*args, r_max=3.0, d_max=3.0, **options),
}
MASK = (np.arange(12) % 5 != 2).reshape(12, 1)


def masked_loss(apply, train, mask, dtype):
    def loss(params, stats, x):
        y, new = apply(params, STATE._replace(mean=stats[0], var=stats[1]), x.astype(dtype), train, mask=mask)
        kept = jnp.where(mask.astype(bool), jax.nn.relu(y) ** 2, 0)
        return jnp.sum(kept.astype(jnp.float32)) + jnp.sum(new.mean) + jnp.sum(new.var)

    return loss


@cache
def second_derivative(name, train):
    """The derivative of gradients along a direction that is 0 at masked elements; a function of x and the mask."""

    @jax.jit
    def second(x, mask):
        first = jax.grad(masked_loss(VARIANTS[name], train, mask, jnp.float32), (0, 1, 2))
        return jax.jvp(first, (PARAMS, STATE[:2], x), (PARAMS, STATE[:2], np.where(MASK, G, 0)))

    return second


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_not_finite_at_a_masked_place_enters_no_derivative(name, train, value):
    second = second_derivative(name, train)
    for mask in (MASK, MASK.astype(np.float32)):
        got, want = (second(np.where(MASK, X, np.float32(there)), mask) for there in (value, 0))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            keep = MASK if a.shape == X.shape else True
            np.testing.assert_allclose(np.where(keep, a, 0), np.where(keep, b, 0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_what_overflows_in_half_precision_at_a_masked_place_enters_no_derivative(train):
    params = PARAMS._replace(scale=np.full(3, 100, np.float32))
    gradients = jax.jit(jax.grad(masked_loss(bnjax.bn_apply, train, MASK, jnp.float16), (0, 1)))
    filled = (np.where(MASK, X / 16, np.float32(value)) for value in (60000, 0))
    got, want = (gradients(params, STATE[:2], x) for x in filled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3), got, want)


def test_what_is_not_finite_at_a_masked_place_shows_there_alone():
    bad = np.where(MASK, X, np.float32(np.inf))
    y, state = bnjax.bn_apply(PARAMS, STATE, bad, True, mask=MASK, momentum=0.0)
    want, mean, var = reference.train(X, *PARAMS, 0, 1, momentum=0.0, mask=MASK)
    np.testing.assert_allclose(np.where(MASK, y, 0), np.where(MASK, want, 0), atol=1e-5)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.var, var, rtol=2e-6)
    assert not np.isfinite(np.asarray(y)[~MASK[:, 0]]).any()
    shown = bnjax.bn_apply(PARAMS, STATE, bad, True)[0]
    assert np.isnan(shown).all()  # at valid places


# Momenta and limits


@pytest.mark.parametrize("value", [1.5, -0.5, np.nan, np.array([0.5, 2.0, 0.5])])
def test_a_known_momentum_out_of_range_is_an_error(value):
    for call in (jnp.asarray(value, jnp.float32), lambda count: jnp.asarray(value, jnp.float32)):
        with pytest.raises(ValueError, match=r"bn_apply\(momentum=...\): expected numbers in \[0, 1\]"):
            bnjax.bn_apply(PARAMS, STATE, X, True, momentum=call)
    with pytest.raises(TypeError, match=r"bn_apply\(momentum=...\): expected real numbers, got complex64"):
        bnjax.bn_apply(PARAMS, STATE, X, True, momentum=jnp.array(0.5 + 0j))


@pytest.mark.parametrize(("value", "clamped"), [(1.5, 1.0), (-0.5, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_a_momentum_that_only_run_time_knows_is_clamped(value, clamped):
    step = jax.jit(lambda m: bnjax.bn_apply(PARAMS, STATE, X, True, momentum=m)[1])
    scheduled = jax.jit(lambda m: bnjax.bn_apply(PARAMS, STATE, X, True, momentum=lambda count: m)[1])
    want = bnjax.bn_apply(PARAMS, STATE, X, True, momentum=clamped)[1]
    for got in (step(value), scheduled(value)):
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-6)
        np.testing.assert_allclose(got.var, want.var, rtol=1e-6)
    # Within the range, bounds included, the derivative is that of the average.
    slope = jax.grad(lambda m: jnp.sum(bnjax.bn_apply(PARAMS, STATE, X, True, momentum=m)[1].mean))(value)
    inside = 0 <= value <= 1
    np.testing.assert_allclose(slope, -np.sum(X.astype(float).mean(0)) if inside else 0, rtol=1e-6)


def test_limits_of_renormalization_are_checked_where_known_and_clamped_where_not():
    def renorm(r_max, d_max):
        return bnjax.renorm_bn_apply(PARAMS, STATE, X, True, r_max=r_max, d_max=d_max)

    with pytest.raises(ValueError, match=r"renorm_bn_apply\(r_max=.*expected a number of 1 or more"):
        renorm(jnp.array(0.5), 1.0)
    with pytest.raises(ValueError, match=r"renorm_bn_apply\(d_max=.*expected a number of 0 or more"):
        renorm(2.0, jnp.array([1.0, -1.0, 1.0]))
    got, want = jax.jit(renorm)(0.5, -1.0), renorm(1.0, 0.0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_lambda_written_at_each_call_is_not_compiled_each_time(name):
    def step():
        limits = {"r_max": lambda count: 2.0, "d_max": 1.0} if name == "renorm_bn_apply" else {}
        apply = bnjax.renorm_bn_apply if limits else VARIANTS[name]
        apply(PARAMS, STATE, jnp.asarray(X), True, momentum=lambda count: count / (count + 1), **limits)

    step()
    assert [compilations(step) for _ in range(2)] == [0, 0]
    assert compilations(lambda: jax.jit(lambda x: x + 1)(X)) == 1  # which it sees


# Names and spellings


@pytest.mark.parametrize("axis", [[[1]], slice(0, 1), "1", 1.0, None, [True]])
def test_an_axis_that_is_no_integer_is_named(axis):
    calls = {
        "bn_apply": lambda: bnjax.bn_apply(PARAMS, STATE, X, True, axis=axis),
        "batch_moments": lambda: bnjax.batch_moments(X, axis=axis),
        "ghost_bn_apply": lambda: VARIANTS["ghost_bn_apply"](PARAMS, STATE, X, True, axis=axis),
        "conditional_params": lambda: bnjax.conditional_params(PARAMS, np.arange(12), X, axis=axis),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"{name}\(axis=.*expected an integer or several"):
            call()
    with pytest.raises(TypeError, match=r"GhostBatchNorm\(axis=.*expected an integer or several"):
        bnjax.nnx.GhostBatchNorm(3, ghost_size=2, axis=axis, rngs=nnx.Rngs(0))(jnp.asarray(X))


def test_a_set_of_names_is_refused():
    for call, apply in {"bn_apply": bnjax.bn_apply, "ghost_bn_apply": VARIANTS["ghost_bn_apply"]}.items():
        for names in ({"i"}, frozenset("ij")):
            with pytest.raises(TypeError, match=rf"{call}\(axis_name=.*order of a set differs.*tuple"):
                apply(PARAMS, STATE, X, True, axis_name=names)
    with pytest.raises(TypeError, match=r"batch_moments\(axis_name="):
        bnjax.batch_moments(X, axis_name={"i"})


def test_keywords_that_are_not_there_are_named_with_their_call():
    params, state = bnjax.indexed_bn_init(3, 2)
    with pytest.raises(TypeError, match=r"indexed_bn_apply\(\) got an unexpected keyword argument 'momentun'"):
        bnjax.indexed_bn_apply(params, state, X, True, index=0, momentun=0.9)
    with pytest.raises(ValueError, match=r"indexed_bn_apply\(momentum=1.5\)"):
        bnjax.indexed_bn_apply(params, state, X, True, index=0, momentum=1.5)
    lstm, lstm_state = bnjax.bn_lstm_init(jax.random.key(0), 3, 2, 4)
    carry = bnjax.bn_lstm_carry(12, 2)
    for name in ("momentun", "mask"):
        with pytest.raises(TypeError, match=rf"bn_lstm_apply\(\) got an unexpected keyword argument '{name}'"):
            bnjax.bn_lstm_apply(lstm, lstm_state, carry, jnp.asarray(X), True, **{name: None})
    with pytest.raises(ValueError, match=r"bn_lstm_apply\(momentum=1.5\)"):
        bnjax.bn_lstm_apply(lstm, lstm_state, carry, jnp.asarray(X), True, momentum=1.5)


LAYERS = {
    "BatchNorm": ({}, {}),
    "AdaptiveBatchNorm": ({"source_weight": 2}, {}),
    "GhostBatchNorm": ({"ghost_size": 2}, {}),
    "RenormBatchNorm": ({}, {}),
    "IndexedBatchNorm": ({"num_indices": 2}, {"index": 1}),
    "ConditionalBatchNorm": ({"num_classes": 2}, {"label": np.arange(12) % 2}),
}


def linen(name, x=X, options=None, **call):
    own, extra = LAYERS[name]
    layer = getattr(bnjax.linen, name)(use_running_average=False, **own, **(options or {}))
    extra = extra | call
    return layer.init_with_output(jax.random.key(0), x, **extra)[0]


def of_nnx(name, x=X, options=None, **call):
    own, extra = LAYERS[name]
    layer = getattr(bnjax.nnx, name)(3, rngs=nnx.Rngs(0), **own, **(options or {}))
    return layer(x, **extra | call)


@pytest.mark.parametrize("layer", [linen, of_nnx])
@pytest.mark.parametrize("name", LAYERS)
def test_errors_of_a_layer_name_its_class(name, layer):
    with pytest.raises(ValueError, match=rf"^{name}\(momentum=1.5\)"):
        layer(name, options={"momentum": 1.5})
    with pytest.raises(ValueError, match=rf"^{name}\(epsilon=0.0\)"):
        layer(name, options={"epsilon": 0.0})
    with pytest.raises(ValueError, match=rf"^{name}\(mask=...\)"):
        layer(name, mask=np.ones((5, 3), bool))
    with pytest.raises(TypeError, match=rf"^{name}\(mask=...\)"):
        layer(name, mask=np.ones((12, 3), complex))
    with pytest.raises(ValueError, match=rf"^{name}\(axis=7\)"):
        layer(name, options={"axis": 7})
    if name == "ConditionalBatchNorm":
        with pytest.raises(ValueError, match=r"^ConditionalBatchNorm\(label=...\)"):
            layer(name, label=np.arange(5))
    if name == "IndexedBatchNorm":
        with pytest.raises(ValueError, match=r"^IndexedBatchNorm\(index=7\)"):
            layer(name, index=7)


# Dtypes under strict promotion, which conftest.py sets; the standard rules are the oracle.


HALVES = [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}]


@pytest.mark.parametrize(
    ("name", "options", "layer", "dtype"),
    pairwise(tuple(LAYERS), HALVES, [linen, of_nnx], [jnp.bfloat16, jnp.float16]),
)
def test_layers_need_no_promotion_of_dtypes(name, options, layer, dtype):
    x = X.astype(dtype)
    strict = layer(name, x, options)
    with jax.numpy_dtype_promotion("standard"):
        standard = layer(name, x, options)
        flax = nn.BatchNorm(use_running_average=False, **options).init_with_output(jax.random.key(0), x)[0]
    assert strict.dtype == standard.dtype == (flax.dtype if layer is linen else standard.dtype)
    np.testing.assert_array_equal(np.asarray(strict, np.float32), np.asarray(standard, np.float32))
