"""`bnjax.BatchNorm` and its variants: options as a value, and the same numbers as the functions with these options."""

import copy
import importlib
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import bnjax
from bnjax.core.layer import batch_norm

X = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
VALUES = {
    "plain": (bnjax.BatchNorm, bnjax.bn_apply, {}),
    "ghost": (bnjax.GhostBatchNorm, bnjax.ghost_bn_apply, {"ghost_size": 2}),
    "renorm": (bnjax.RenormBatchNorm, bnjax.renorm_bn_apply, {"r_max": 2.0, "d_max": 0.5, "average": "var"}),
    "indexed": (bnjax.IndexedBatchNorm, bnjax.indexed_bn_apply, {"num_indices": 2}),
    "adaptive": (bnjax.AdaptiveBatchNorm, bnjax.bn_apply, {"source_weight": 4.0}),
}
OPTIONS = {"momentum": 0.7, "epsilon": 1e-3, "unbiased_var": True}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_computes_what_the_function_with_its_options_computes(name):
    kind, function, own = VALUES[name]
    norm = kind(**OPTIONS, **own)
    params, state = norm.init(3, scale=2.0)
    mask = np.arange(6).reshape(6, 1, 1) < 5
    given = {k: v for k, v in own.items() if k not in ("num_indices", "source_weight")}
    extra = {"index": 1} if name == "indexed" else {}
    for train in (True, False):
        if name == "adaptive" and not train:
            given, evaluated = {"source_weight": 4.0, "epsilon": 1e-3}, bnjax.adaptive_bn_apply
            want = evaluated(params, state, X, mask=mask, **given)
        else:
            want = function(params, state, X, train, mask=mask, **OPTIONS, **given, **extra)
        got = norm.apply(params, state, X, train, mask, **extra)
        chex.assert_trees_all_equal(got, want)
        _, state = got


@pytest.mark.parametrize("name", VALUES)
def test_values_hash_compare_copy_and_pickle_by_their_options(name):
    kind, _, own = VALUES[name]
    norm = kind(**OPTIONS, **own)
    for same in (
        kind(**OPTIONS, **own),
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
        kind(**OPTIONS, **own, call="f"),
    ):
        assert same == norm
        assert hash(same) == hash(norm)
    assert kind(**{**OPTIONS, "momentum": 0.8}, **own) != norm != kind(**{**OPTIONS, "epsilon": 1e-5}, **own)
    assert all(norm != other(**OPTIONS, **options) for other, _, options in VALUES.values() if other is not kind)
    with pytest.raises(AttributeError):
        norm.momentum = 0.5


def test_equal_options_in_any_spelling_are_one_value_and_one_program():
    names = [bnjax.BatchNorm(axis_name=spelling) for spelling in ("b", ("b",), ["b"])]
    groups = [bnjax.BatchNorm(axis_name="b", axis_index_groups=g) for g in ([[0, 1]], ((0, 1),), np.array([[0, 1]]))]
    numbers = [bnjax.BatchNorm(momentum=m, epsilon=e) for m, e in ((0.5, 0.25), (np.float64(0.5), np.float32(0.25)))]
    for values in (names, groups, numbers):
        assert len(set(values)) == 1
    params, state = bnjax.bn_init(3)
    bnjax.bn_apply(params, state, X, True)
    size = batch_norm._cache_size()
    for axis in (-1, 2, (2,), [-1], np.int64(2)):
        chex.assert_trees_all_equal(
            bnjax.BatchNorm(axis=axis).apply(params, state, X, True), bnjax.bn_apply(params, state, X, True, axis=axis)
        )
    bnjax.BatchNorm(momentum=0.3).apply(params, state, X, True)
    assert batch_norm._cache_size() == size


def test_a_value_is_a_static_argument_and_may_be_closed_over():
    norm = bnjax.BatchNorm(momentum=bnjax.debiased(0.9))
    params, state = norm.init(3)
    step = jax.jit(lambda norm, *args: norm.apply(*args, train=True), static_argnums=0)
    chex.assert_trees_all_close(step(norm, params, state, X), norm.apply(params, state, X, True), rtol=1e-6)
    apply = jax.jit(norm.apply, static_argnames="train")
    chex.assert_trees_all_close(apply(params, state, X, train=True), norm.apply(params, state, X, True), rtol=1e-6)


def test_dtype_is_that_of_the_output():
    norm = bnjax.BatchNorm(dtype=jnp.bfloat16)
    params, state = norm.init(3)
    y, new = norm.apply(params, state, X, train=True)
    want, exact = bnjax.bn_apply(params, state, X, True)
    chex.assert_trees_all_equal((y, new), (want.astype(jnp.bfloat16), exact))


@pytest.mark.parametrize(
    ("kind", "options", "error", "match"),
    [
        (bnjax.BatchNorm, {"momentum": 1.5}, ValueError, r"^BatchNorm\(momentum=1.5\): expected a number in \[0, 1\]"),
        (
            bnjax.BatchNorm,
            {"momentum": bnjax.debiased},
            TypeError,
            r"BatchNorm\(momentum=debiased\): .*the class itself",
        ),
        (bnjax.BatchNorm, {"epsilon": 0}, ValueError, r"BatchNorm\(epsilon=0\)"),
        (bnjax.BatchNorm, {"axis": 1.0}, TypeError, r"BatchNorm\(axis=1.0\)"),
        (bnjax.BatchNorm, {"axis_name": {"a"}}, TypeError, r"BatchNorm\(axis_name=\{'a'\}\)"),
        (bnjax.BatchNorm, {"unbiased_var": 1}, TypeError, r"BatchNorm\(unbiased_var=...\): expected a Python bool"),
        (bnjax.BatchNorm, {"dtype": jnp.int32}, TypeError, r"BatchNorm\(dtype=int32\)"),
        (bnjax.BatchNorm, {"axis": np.array(1.0)}, TypeError, r"BatchNorm\(axis=1.0\): expected an integer"),
        (
            bnjax.BatchNorm,
            {"use_running_average": True},
            TypeError,
            r"BatchNorm\(use_running_average\): .*bnjax.linen.Ba",
        ),
        (
            bnjax.GhostBatchNorm,
            {"rngs": None, "ghost_size": 2},
            TypeError,
            r"by keyword. The .* bnjax.nnx.GhostBatchNorm",
        ),
        (bnjax.GhostBatchNorm, {"ghost_size": 0}, ValueError, r"GhostBatchNorm\(ghost_size=0\)"),
        (bnjax.RenormBatchNorm, {"r_max": 0.5}, ValueError, r"RenormBatchNorm\(r_max=0.5\): expected a number of 1 or"),
        (bnjax.RenormBatchNorm, {"average": "mean"}, ValueError, r"RenormBatchNorm\(average='mean'\)"),
        (bnjax.IndexedBatchNorm, {"num_indices": 0}, ValueError, r"IndexedBatchNorm\(num_indices=0\)"),
        (bnjax.AdaptiveBatchNorm, {"source_weight": -1}, ValueError, r"AdaptiveBatchNorm\(source_weight=-1\)"),
    ],
)
def test_options_are_checked_when_the_value_is_made(kind, options, error, match):
    with pytest.raises(error, match=match):
        kind(**options)


def test_parts_of_a_batch_are_absorbed_together():
    norm = bnjax.BatchNorm(momentum=0.0)
    params, state = norm.init(3)
    _, _, first = norm.apply_part(params, state, X[:2], True)
    _, state, both = norm.apply_part(params, state, X[2:], True, earlier=first)
    x = X.astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(both.moments.mean, x.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state.var, x.var(0), rtol=1e-6)
    assert both.support is None
    assert norm.apply_part(params, state, X, False)[2] is None


def test_a_number_of_features_is_no_option():
    with pytest.raises(
        TypeError, match=r"^BatchNorm\(64\): expected the options axis, .*dtype, by keyword. The layers of"
    ):
        bnjax.BatchNorm(64)  # pyright: ignore[reportCallIssue]


def test_a_real_dtype_does_not_cut_off_complex_numbers():
    norm = bnjax.BatchNorm(dtype=jnp.float32)
    with pytest.raises(TypeError, match=r"BatchNorm\(dtype=float32\): x is complex64.*Pass dtype=None"):
        norm.apply(*norm.init(3, dtype=jnp.complex64), jnp.asarray(X + 1j), train=True)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_convert_names_the_layer_of_options(library):
    convert = importlib.import_module(f"bnjax.{library}").convert
    model = {"linen": linen.BatchNorm(), "nnx": None}[library] or nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=rf"to=bnjax.GhostBatchNorm\): .*Pass bnjax.{library}.GhostBatchNorm"):
        convert(model, to=bnjax.GhostBatchNorm, ghost_size=2)
