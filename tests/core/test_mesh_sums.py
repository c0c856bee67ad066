"""Moments of devices, merged by sums of fixed size: as exact as from a gather, for every guess of the mean."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.core import mesh_sums
from bnjax.core.merging import support_of
from bnjax.core.mesh_sums import merge_over_mesh
from bnjax.core.reading import two_looks
from bnjax.core.records import Collected, Moments
from bnjax.core.weights import is_real
from tests.support import reference
from tests.support.tolerances import EPS, FACTOR

pytestmark = pytest.mark.optimized

DEVICES, ROWS, FEATURES = 8, 64, 5
# In standard deviations: inside the guard, at its edge of sqrt(8), and far outside of it; and what no mean can be.
OFFSETS = [0.0, 1.0, 2.7, 3.0, 30.0, 1e4, 1e12, 1e30, np.inf, np.nan]
FAR = [1e-36, 1e-25, 1e-12, 1.0, 1e12, 1e20, 1e35]


def mesh(*sizes):
    return jax.make_mesh(sizes, tuple("ab"[: len(sizes)]), axis_types=(AxisType.Auto,) * len(sizes))


def part_of(x, mask=None):
    """The moments and the support of one device's rows."""
    moments = two_looks(x, mask, (0,))
    return Collected(moments, support_of(moments.weight, x.shape, mask, (0,)) if is_real(mask) else None)


def merge(x, guess, mask=None, *, names=("a",), known=False):
    elements = len(x) if known else None
    return merge_over_mesh(part_of(x, mask), guess, names, elements=elements)


@functools.cache
def over_devices(check_vma=True, sizes=(DEVICES,), masked=False, **options):
    """A compiled function of the rows of all devices, the guess, and perhaps a mask."""
    names = tuple("ab"[: len(sizes)])
    return jax.jit(
        jax.shard_map(
            functools.partial(merge, names=names, **options),
            mesh=mesh(*sizes),
            in_specs=(P(names), P(), P(names))[: 3 if masked else 2],
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def batch(mean, std, rng, dtype: Any = np.float32):
    return (mean + std * rng.standard_normal((DEVICES * ROWS, FEATURES))).astype(dtype)


def guess_of(value, dtype: Any = np.float32):
    with np.errstate(over="ignore"):
        return np.full(FEATURES, value, dtype)


def assert_exact(found, x, mask=None):
    """Weight, mean and variance equal those in float64, within the bound of `test_accuracy`."""
    eps = np.finfo(x.dtype).eps
    weight, mean, var = found.moments
    want_weight, want_mean, want_var = reference.moments(x, mask=mask)
    std = np.sqrt(want_var) + eps * np.abs(want_mean) + np.finfo(x.dtype).tiny
    largest = np.where(reference.weights(x, mask) > 0, np.abs(x - want_mean), 0).max(0)
    bound = FACTOR * eps * (1 + largest / std + np.abs(want_mean) / std)
    np.testing.assert_allclose(weight, want_weight, rtol=FACTOR * eps)
    assert (np.abs(np.asarray(mean, complex) - want_mean) <= bound * std).all()
    assert (np.abs(np.asarray(var, float) - want_var) <= bound * std**2).all()
    assert (np.asarray(var) >= 0).all()


def compiled(f, x):
    """The text of the compiled program."""
    text = jax.jit(f).lower(x, guess_of(0.0)).compile().as_text()
    assert text is not None
    return text


def masks(kind, rng):
    """A mask of all rows: as many valid rows on each device, unequal numbers, devices without any, or weights."""
    device, row = np.divmod(np.arange(DEVICES * ROWS), ROWS)
    mask = {
        "known": np.ones(len(row), bool),
        "unequal": row < (device * 9 + 1),
        "empty": device % 3 == 1,
        "one row": row + device == 11,
        "weights": (device % 3 != 1) * rng.uniform(0.1, 1, len(row)),
    }[kind][:, None]
    return mask if kind != "weights" else mask.astype(np.float32)


@pytest.mark.parametrize("kind", ["known", "unequal", "empty", "weights"])
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e5])
def test_merged_moments_are_exact_wherever_the_guess_is(kind, mean, rng):
    x, mask = batch(mean, 1.0, rng), masks(kind, rng)
    for offset in OFFSETS:
        if kind == "known":
            assert_exact(over_devices(known=True)(x, guess_of(mean + offset)), x)
        else:
            assert_exact(over_devices(masked=True)(x, guess_of(mean + offset), mask), x, mask)


@pytest.mark.parametrize("name", ["sorted", "one device is far off", "one feature jumps", "one row"])
def test_merged_moments_are_exact_where_devices_differ(name, rng):
    x, mask = batch(1e3, 1.0, rng), masks("one row" if name == "one row" else "unequal", rng)
    if name == "sorted":
        x = np.sort(x, axis=0)
    elif name == "one device is far off":
        x[3 * ROWS : 4 * ROWS] += 1e5
    elif name == "one feature jumps":
        x[:, 2] += 1e6
    for guess in 0.0, 1e3, 1.35e4, 1e6, 1e12:
        assert_exact(over_devices(masked=True)(x, guess_of(guess), mask), x, mask)


def test_a_guess_at_the_edge_of_the_guard_is_exact_over_means_that_differ(rng):
    # All variance lies between the devices, so that all of it is what the sums around the guess cancel to.
    x = np.repeat(rng.standard_normal((DEVICES, FEATURES)), ROWS, 0).astype(np.float32)
    _, mean, var = reference.moments(x)
    for r in 7.9, 8.1:
        assert_exact(over_devices(known=True)(x, (mean + np.sqrt(r * var)).astype(np.float32)), x)


@pytest.mark.parametrize("guess", [0.0, 1e4, 1e4 + 1 / 1024, 1e4 * (1 + 50 * EPS), 1e4 * (1 + 900 * EPS), -1e4])
def test_a_constant_feature_has_no_variance(guess):
    x = np.full((DEVICES * ROWS, FEATURES), 1e4, np.float32)
    for known in True, False:
        _, mean, var = over_devices(known=known)(x, guess_of(guess)).moments
        np.testing.assert_array_equal(mean, 1e4)
        assert (var <= (EPS * 1e4) ** 2).all()  # what rounding the mean does to it


@pytest.mark.parametrize("guess", [0.0, 3.0, 1e30, np.nan])
def test_no_valid_element_has_moments_of_zero(guess, rng):
    x = batch(3.0, 1.0, rng)
    for mask in np.zeros((len(x), 1), bool), np.zeros((len(x), 1), np.float32):
        for leaf in over_devices(masked=True)(x, guess_of(guess), mask).moments:
            np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("factor", FAR)
def test_only_ratios_of_weights_count(factor, rng):
    x, weights = batch(30.0, 1.0, rng), masks("weights", rng)
    for guess in 0.0, 30.0:
        one, far = (
            over_devices(masked=True)(x, guess_of(guess), weights * np.float32(factor)) for factor in (1, factor)
        )
        assert_exact(far, x, weights * np.float32(factor))
        np.testing.assert_array_equal(far.support.valid, np.sum(weights > 0))
        np.testing.assert_allclose(
            far.moments.weight / far.support.mean_weight, one.moments.weight / one.support.mean_weight, rtol=1e-6
        )


def test_a_value_that_is_not_finite_shows_in_its_feature_alone(rng):
    x = batch(0.0, 1.0, rng)
    x[5, 1], x[100, 3] = np.nan, np.inf
    for guess in 0.0, 1e6, np.inf:
        found = over_devices()(x, guess_of(guess))
        np.testing.assert_array_equal(np.isnan(found.moments.var), [False, True, False, True, False])
        np.testing.assert_array_equal(np.isfinite(found.moments.mean), [True, False, True, False, True])
        others = jax.tree.map(lambda v: v[np.array([0, 2, 4])], found)
        assert_exact(others, x[:, ::2])


def test_a_masked_value_that_is_not_finite_has_no_effect(rng):
    x, mask = batch(1e3, 1.0, rng), masks("empty", rng)
    spoilt = np.where(mask, x, np.nan).astype(np.float32)
    for guess in 0.0, 1e3, 1e30:
        assert_exact(over_devices(masked=True)(spoilt, guess_of(guess), mask), x, mask)


@pytest.mark.parametrize("guess", [0.0, 1e20])
def test_overflow_is_not_finite_in_its_feature_alone(guess, rng):
    for mean in 1e18, 1e20:  # around 0 the sum of the squares overflows, and the squares do; around the mean neither
        x = batch(mean, 1e15, rng)
        assert_exact(over_devices()(x, guess_of(guess)), x)
    x[:, 0] = 1e20 * rng.standard_normal(len(x))
    found = over_devices()(x, guess_of(guess))
    np.testing.assert_array_equal(np.isfinite(found.moments.var), [False, True, True, True, True])
    assert_exact(jax.tree.map(lambda v: v[1:], found), x[:, 1:])


@pytest.mark.parametrize("offset", [0.0, 2.7, 1e3, 1e12])
def test_complex_moments_are_exact(offset, rng):
    x = (batch(0.0, 1.0, rng) + 1j * batch(0.0, 2.0, rng) + 40 - 30j).astype(np.complex64)
    found = over_devices()(x, guess_of((40 - 30j) + offset * 1j, np.complex64))
    assert found.moments.mean.dtype == np.complex64
    assert_exact(found, x)


@pytest.mark.parametrize("offset", [0.0, 2.7, 1e3, 1e12])
def test_moments_of_float64_are_exact(offset, rng):
    with jax.enable_x64(True):
        x = batch(1e6, 1.0, rng, np.float64)
        for check_vma in True, False:
            found = over_devices(check_vma)(x, guess_of(1e6 + offset, np.float64))
            assert found.moments.var.dtype == np.float64
            # Float64 cannot judge itself to its own last digits: the oracle has the same x less 1e6, which is exact.
            _, mean, var = reference.moments(x - 1e6)
            np.testing.assert_allclose(found.moments.mean - 1e6, mean, atol=1e-8)
            np.testing.assert_allclose(found.moments.var, var, rtol=1e-8)


@pytest.mark.parametrize("mapping", ["checked", "unchecked", "two axes", "two axes unchecked", "pmap"])
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_mappings_and_models_under_vmap_agree(mapping, rng):
    if mapping == "pmap":
        mapped = jax.pmap(merge, "a", in_axes=(0, None), out_axes=None)

        def f(x, guess):
            return mapped(x.reshape(DEVICES, ROWS, FEATURES), guess)
    else:
        f = over_devices("unchecked" not in mapping, (2, 4) if "two" in mapping else (8,))
    xs = np.stack([batch(1e3, 1.0, rng), batch(-5.0, 3.0, rng)])
    guesses = np.stack([guess_of(1e3), guess_of(1e6)])
    for x, guess in zip(xs, guesses, strict=True):
        assert_exact(f(x, guess), x)
    for axes in (0, 0), (0, None), (None, 0):
        arguments = xs if axes[0] == 0 else xs[0], guesses if axes[1] == 0 else guesses[0]
        found = jax.vmap(f, axes)(*arguments)
        for i in range(2):
            assert_exact(jax.tree.map(lambda v, i=i: v[i], found), xs[i] if axes[0] == 0 else xs[0])


@pytest.mark.parametrize("check_vma", [True, False])
def test_models_under_vmap_inside_shard_map_agree(check_vma, rng):
    xs = np.stack([batch(1e3, 1.0, rng), batch(-5.0, 3.0, rng)])
    f = jax.shard_map(
        jax.vmap(merge, (0, None)), mesh=mesh(8), in_specs=(P(None, "a"), P()), out_specs=P(), check_vma=check_vma
    )
    found = jax.jit(f)(xs, guess_of(1e3))
    for i in range(2):
        assert_exact(jax.tree.map(lambda v, i=i: v[i], found), xs[i])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e6])
def test_a_guess_that_differs_between_devices_changes_nothing(check_vma, spread, rng):
    x = batch(10.0, 1.0, rng)
    guess = (10 + spread * np.arange(DEVICES)[:, None] * np.ones(FEATURES)).astype(np.float32)
    f = jax.shard_map(
        lambda x, guess: merge(x, guess[0]), mesh=mesh(8), in_specs=P("a"), out_specs=P(), check_vma=check_vma
    )
    assert_exact(jax.jit(f)(x, guess), x)
    guess[:] = guess[0]
    guess[3, 2] += spread  # one number of one device
    assert_exact(jax.jit(f)(x, guess), x)


@pytest.mark.parametrize("check_vma", [True, False])
def test_rows_of_a_mesh_sums_each_with_a_decision_of_their_own(check_vma, rng):
    # Over one of two axes there is no conditional, because only some devices would run a collective in it.
    x = batch(0.0, 1.0, rng)
    x[: len(x) // 2] += 1e6
    f = jax.jit(
        jax.shard_map(
            lambda x, guess: jax.tree.map(lambda v: v[None], merge(x, guess, names=("b",))),
            mesh=mesh(2, 4),
            in_specs=(P(("a", "b")), P()),
            out_specs=P("a"),
            check_vma=check_vma,
        )
    )
    assert " conditional(" not in compiled(f, x)
    found = f(x, guess_of(0.0))
    for i, rows in enumerate(np.split(x, 2)):
        assert_exact(jax.tree.map(lambda v, i=i: v[i], found), rows)


@pytest.mark.parametrize("kind", ["unequal", "empty", "weights"])
@pytest.mark.parametrize("way", ["_in_float64", "_summed_twice"])
def test_the_ways_of_gpus_are_exact(way, kind, rng):
    mask = masks(kind, rng)

    def on_gpu(x, guess, mask):
        (weight, mean, var), support = part_of(x, mask)
        weights = (weight,) if support is None else (weight, support.mean_weight)
        found = getattr(mesh_sums, way)(guess, mean, var, *weights, names=("a",))
        return Collected(Moments(*found[:3]), None)

    f = jax.jit(jax.shard_map(on_gpu, mesh=mesh(8), in_specs=(P("a"), P(), P("a")), out_specs=P()))
    for mean in 0.0, 1e4, 1e6:
        x = batch(mean, 1.0, rng)
        assert_exact(f(x, guess_of(0.0), mask), x, mask)


# A choice by platform leaves two cases of a constant in the StableHLO, which XLA removes.
CASES_OF_THE_CHOICE = 2


def lowered(platform, f, *shape):
    traced = jax.jit(f).trace(np.zeros((*shape, DEVICES * ROWS, FEATURES), "f"), guess_of(0.0))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("check_vma", "known", "rows"), [(True, True, 2), (True, False, 3), (False, False, 3)])
def test_tpus_decide_on_more_than_one_sum_and_gpus_sum_once_in_float64(check_vma, known, rows):
    f = over_devices(check_vma, known=known)
    tpu, gpu = (lowered(platform, f) for platform in ("tpu", "cuda"))
    assert tpu.count('"stablehlo.case"') == CASES_OF_THE_CHOICE + 1
    usual, decision = tpu.rsplit('"stablehlo.case"', 1)
    assert usual.count('"stablehlo.all_reduce"') == 1 + (not check_vma)  # and the checksum, which XLA sends with it
    assert decision.count('"stablehlo.all_reduce"') == 2
    assert f"(tensor<{rows}x{FEATURES}xf32>) -> tensor<{rows}x{FEATURES}xf32>" in usual
    assert gpu.count('"stablehlo.all_reduce"') == 1
    assert f"(tensor<{rows}x{FEATURES}xf64>) -> tensor<{rows}x{FEATURES}xf64>" in gpu
    assert gpu.count('"stablehlo.case"') == CASES_OF_THE_CHOICE


@pytest.mark.parametrize("check_vma", [True, False])
def test_xla_keeps_one_conditional_and_sends_the_checksum_with_the_sums(check_vma):
    f, x = over_devices(check_vma), np.zeros((2, DEVICES * ROWS, FEATURES), "f")
    for text in compiled(f, x[0]), compiled(jax.vmap(f, (0, None)), x):
        assert text.count(" conditional(") == 1
        assert text[text.index("\nENTRY") :].count(" all-reduce(") == 1
        assert text.count(" all-reduce(") == 3


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("constant", [True, False])
def test_merged_moments_of_groups_have_derivatives_of_the_whole_batch(constant, check_vma, rng):
    # A ghost batch merges outside the derivative rule of the moments.
    x = np.full((DEVICES * 4, FEATURES), 3, np.float32) if constant else batch(3, 1, rng)[: DEVICES * 4]
    params, state = bnjax.bn_init(FEATURES)

    def loss(x, axis_name):
        _, new = bnjax.ghost_bn_apply(params, state, x, True, ghost_size=2, axis_name=axis_name)
        return 100 * (new.mean * new.var).sum()

    over_mesh = jax.shard_map(
        functools.partial(loss, axis_name="a"), mesh=mesh(DEVICES), in_specs=P("a"), out_specs=P(), check_vma=check_vma
    )
    whole = functools.partial(loss, axis_name=None)
    for found, wanted in (over_mesh, whole), (square_of_gradient(over_mesh), square_of_gradient(whole)):
        np.testing.assert_allclose(jax.jit(jax.grad(found))(x), jax.jit(jax.grad(wanted))(x), rtol=1e-5, atol=1e-6)


def square_of_gradient(f):
    """A function whose gradient needs the second derivatives of `f`."""
    return lambda x: ((jax.grad(f)(x) - 1) ** 2).sum()
