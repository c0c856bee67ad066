"""The table of differences in docs/migration.md: for each row, what Flax's layer does and what ours does."""

import inspect
import re
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError

import bnjax
import bnjax.linen
import bnjax.nnx
from tests.support.markdown import ROOT

pytestmark = pytest.mark.usefixtures("flax_promotion")

PAGE = ROOT / "docs" / "migration.md"
FRAMEWORKS = {"both": ("Linen", "NNX"), "Linen": ("Linen",), "NNX": ("NNX",)}
LAYERS = {
    "Linen": (nn.BatchNorm, bnjax.linen.BatchNorm),
    "NNX": (nnx.BatchNorm, bnjax.nnx.BatchNorm),
}
EPSILON = 1e-5


class Result(NamedTuple):
    """A layer's results for one training step, and then for the same data in evaluation."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    evaluated: np.ndarray


def linen_run(layer, x, mask):
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    y, updates = layer.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
    evaluated = layer.apply({**variables, **updates}, x, use_running_average=True)
    return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"], evaluated


def nnx_run(cls, options, x, mask):
    layer = cls(x.shape[-1], rngs=nnx.Rngs(0), **dict(options))
    y = layer(x, use_running_average=False, mask=mask)
    return y, layer.mean[...], layer.var[...], layer(x, use_running_average=True)


def run(framework, cls, x, *, mask=None, shards=None, **options):
    """One step of a layer; with `shards`, a mask for each index of the leading axis, under vmap over that axis."""
    call = partial(linen_run, cls(**options)) if framework == "Linen" else partial(nnx_run, cls, options)
    if shards is not None:
        call, mask = jax.vmap(call, axis_name=options["axis_name"]), shards
    return Result(*map(np.asarray, jax.jit(call)(x, mask)))


def both(framework, x, **arguments):
    """The results of Flax's layer and of ours."""
    return [run(framework, cls, x, **arguments) for cls in LAYERS[framework]]


def data(rng, shape=(64, 3), mean=3.0):
    return (mean + rng.standard_normal(shape)).astype(np.float32)


def normalized(x, mean, var):
    return (x - mean) / np.sqrt(var + EPSILON)


def fast_variance(framework, rng):
    x = data(rng, (512, 3), mean=1e4)
    exact = x.astype(np.float64).var(0)
    flax, ours = both(framework, x, momentum=0.0)
    assert np.abs(flax.var / exact - 1).max() > 0.5
    np.testing.assert_allclose(ours.var, exact, rtol=1e-2)
    flax, same = both(framework, x, momentum=0.0, use_fast_variance=False)
    np.testing.assert_allclose(flax.var, exact, rtol=1e-2)
    np.testing.assert_array_equal(same.var, ours.var)


def half_precision_reductions(framework, rng):
    x = data(rng, (4096, 3)).astype(jnp.bfloat16)
    exact = x.astype(np.float64).var(0)
    options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16, "momentum": 0.0}
    flax, ours = both(framework, x, **options)
    assert np.abs(flax.var.astype(np.float64) / exact - 1).max() > 0.03
    np.testing.assert_allclose(ours.var.astype(np.float64), exact, rtol=2**-8)  # rounded once, as it is stored
    assert flax.var.dtype == ours.var.dtype == jnp.bfloat16


def one_value(framework, rng):
    x = data(rng, (1, 3))
    flax, ours = both(framework, x, momentum=0.9)
    np.testing.assert_allclose(flax.mean, 0.1 * x[0], rtol=1e-5)
    np.testing.assert_allclose(flax.var, 0.9, rtol=1e-5)
    np.testing.assert_array_equal(ours.mean, 0)
    np.testing.assert_array_equal(ours.var, 1)


def not_finite(framework, rng):
    x = data(rng)
    x[5, 1] = np.nan
    flax, ours = both(framework, x, momentum=0.9)
    assert np.isnan([flax.mean[1], flax.var[1]]).all()
    assert (ours.mean[1], ours.var[1]) == (0, 1)
    assert np.isnan(ours.y).any(0).tolist() == [False, True, False]
    np.testing.assert_allclose(ours.mean[[0, 2]], 0.1 * x.mean(0)[[0, 2]], rtol=1e-5)


def overflow(framework, rng):
    x = data(rng, mean=0.0) * np.array([3e19, 1, 1], np.float32)
    flax, ours = both(framework, x, momentum=0.9)
    np.testing.assert_array_equal(flax.y[:, 0], 0)
    assert np.isnan(ours.y).any(0).tolist() == [True, False, False]
    assert (ours.mean[0], ours.var[0]) == (0, 1)


def no_valid_value(framework, rng):
    x = data(rng)
    flax, ours = both(framework, x, mask=np.zeros((64, 1), bool))
    assert np.isnan(flax.y).all()
    np.testing.assert_allclose(ours.y, normalized(x, 0, 1), rtol=1e-5)


def unequal_shards(framework, rng):
    x = data(rng, (2, 8, 3)) + np.array([0, 9], np.float32)[:, None, None]
    mask = (np.arange(8) < np.array([[8], [2]]))[..., None]
    flax, ours = both(framework, x, shards=mask, axis_name="data", momentum=0.0)
    np.testing.assert_allclose(flax.mean[0], (x[0].mean(0) + x[1, :2].mean(0)) / 2, rtol=1e-5)
    valid = np.concatenate([x[0], x[1, :2]])
    np.testing.assert_allclose(ours.mean[0], valid.mean(0), rtol=1e-5)
    np.testing.assert_allclose(ours.var[1], valid.var(0), rtol=1e-4)
    assert (np.abs(flax.mean - ours.mean) > 1).all()


def weights(framework, rng):
    """The data, weights of 0, 1 and 3, and the weighted mean."""
    x, weight = data(rng), np.resize([0, 1, 3], (64, 1)).astype(np.float32)
    return x, weight, (weight * x).sum(0) / weight.sum()


def mask_that_is_true_unless_0(framework, rng):
    x, weight, mean = weights(framework, rng)
    for mask in weight, weight.astype(np.int32):
        flax, ours = both(framework, x, mask=mask, momentum=0.0)
        np.testing.assert_allclose(flax.mean, x[weight[:, 0] > 0].mean(0), rtol=1e-5)
        np.testing.assert_allclose(ours.mean, mean, rtol=1e-5)
    flax, ours = both(framework, x, mask=np.minimum(weight, 1), momentum=0.0)
    np.testing.assert_allclose(ours.mean, flax.mean, rtol=1e-5)


def mask_that_is_an_error(framework, rng):
    flax, ours = LAYERS[framework]
    x, weight, mean = weights(framework, rng)
    for mask in weight, weight.astype(np.int32):
        with pytest.raises(ValueError, match="where must be None or a boolean array"):
            run(framework, flax, x, mask=mask)
        np.testing.assert_allclose(run(framework, ours, x, mask=mask, momentum=0.0).mean, mean, rtol=1e-5)


def cast(framework, rng, narrow, wide):
    """Flax casts the running statistics with the options `narrow`, with none of `wide`; ours never does."""
    x = data(rng, mean=1002.0)  # bfloat16 has 1000 and 1004
    for options in [narrow, *wide]:
        for library, result in zip(("Flax", "bnjax"), both(framework, x, momentum=0.0, **options), strict=True):
            assert result.mean.dtype == np.float32
            shift = np.abs(result.evaluated.astype(np.float32).mean(0)).min()
            assert shift > 0.5 if (library, options) == ("Flax", narrow) else shift < 0.01, (library, options)


def cast_to_param_dtype(framework, rng):
    half = {"param_dtype": jnp.bfloat16}
    cast(framework, rng, {**half, "force_float32_reductions": False}, [half, {"dtype": jnp.bfloat16}])


def cast_to_dtype(framework, rng):
    cast(framework, rng, {"dtype": jnp.bfloat16}, [{"param_dtype": jnp.bfloat16}])


def complex_data(rng):
    return (data(rng) + 1j * data(rng)).astype(np.complex64)


def complex_mean(framework, rng):
    flax, ours = LAYERS[framework]
    x = complex_data(rng)
    with pytest.warns(FutureWarning, match="incompatible types"), pytest.warns(np.exceptions.ComplexWarning):
        result = run(framework, flax, x, momentum=0.0)
    np.testing.assert_allclose(result.mean, x.mean(0).real, rtol=1e-5)
    assert (np.abs(result.evaluated.mean(0).imag) > 1).all()
    result = run(framework, ours, x, momentum=0.0)
    np.testing.assert_allclose(result.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(result.evaluated.mean(0), 0, atol=1e-5)


def bad_arguments(framework, rng):
    flax, ours = LAYERS[framework]
    x = data(rng)
    for name, value in {"momentum": 1.5, "epsilon": -2.0, "axis": 2}.items():
        with pytest.raises(ValueError, match=rf"BatchNorm\({name}={value}\)"):
            run(framework, ours, x, **{name: value})
    np.testing.assert_allclose(run(framework, flax, x, momentum=1.5).mean, -0.5 * x.mean(0), rtol=1e-5)
    assert np.isnan(run(framework, flax, x, epsilon=-2.0).y).all()
    with pytest.raises((IndexError, TypeError, ValueError)) as raised:
        run(framework, flax, x, axis=2)
    assert "axis=2" not in str(raised.value)


def training_without_an_update(framework, rng):
    x = data(rng)
    for number, cls in enumerate(LAYERS[framework]):
        layer = cls()
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        if number == 0:
            with pytest.raises(ModifyScopeVariableError, match="batch_stats"):
                layer.apply(variables, x, use_running_average=False)
            continue
        y = layer.apply(variables, x, use_running_average=False)
        np.testing.assert_allclose(y, normalized(x, x.mean(0), x.var(0)), atol=1e-5)


def momentum_as_a_function(framework, rng):
    flax, ours = LAYERS[framework]
    x = data(rng)
    with pytest.raises(TypeError, match=r"unsupported operand type.*function"):
        run(framework, flax, x, momentum=bnjax.cumulative_average)
    np.testing.assert_allclose(run(framework, ours, x, momentum=bnjax.cumulative_average).mean, x.mean(0), rtol=1e-5)


def mask_of_lower_rank(framework, rng):
    flax, ours = LAYERS[framework]
    x, mask = data(rng, (8, 8)), np.arange(8) < 6
    result = run(framework, flax, x, mask=mask, momentum=0.0)
    np.testing.assert_allclose(result.mean[:6], x.mean(0)[:6], rtol=1e-5)
    assert np.isnan(result.mean[6:]).all()
    with pytest.raises(ValueError, match=r"has shape \(8,\), which could mask features.*mask\[:, None\]"):
        run(framework, ours, x, mask=mask)
    result = run(framework, ours, x, mask=mask[:, None], momentum=0.0)
    np.testing.assert_allclose(result.mean, x[:6].mean(0), rtol=1e-5)
    with pytest.raises((TypeError, ValueError), match="broadcast"):  # the same call with an example less
        run(framework, flax, x[1:], mask=mask[1:])


# The test of each row, by words of its first cell.
CASES = {
    "The variance is E[x²] - E[x]²": fast_variance,
    "rounds squares and means to half precision": half_precision_reductions,
    "A batch of one value": one_value,
    "Non-finite batch statistics": not_finite,
    "Finite values whose squares overflow": overflow,
    "A feature without a valid value": no_valid_value,
    "merged by the mean of means": unequal_shards,
    "not boolean is True where it is not 0": mask_that_is_true_unless_0,
    "A mask of lower rank than `x`": mask_of_lower_rank,
    "not boolean is an error": mask_that_is_an_error,
    "cast to `param_dtype`": cast_to_param_dtype,
    "cast to `dtype`": cast_to_dtype,
    "complex `x` loses its imaginary part": complex_mean,
    "A momentum outside [0, 1]": bad_arguments,
    "is an error unless `batch_stats` is mutable": training_without_an_update,
    "Momentum is a number": momentum_as_a_function,
}


def departures():
    """The first cell of each row of the table, and the frameworks that its third cell names."""
    text = PAGE.read_text(encoding="utf-8").partition("## Each departure, and why")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [(flax.strip(), FRAMEWORKS[where.strip()]) for flax, _, where, _ in rows[1:]]


def test_every_row_has_one_case_and_every_case_has_one_row():
    found = [[words for words in CASES if words in row] for row, _ in departures()]
    assert sorted(found) == sorted([words] for words in CASES)


@pytest.mark.parametrize(
    ("words", "framework"),
    [
        (words, framework)
        for row, frameworks in departures()
        for words in CASES
        if words in row
        for framework in frameworks
    ],
)
def test_flax_does_what_the_row_says_and_bnjax_what_it_should(words, framework, rng):
    CASES[words](framework, rng)


def test_the_mean_of_complex_data_is_complex_in_both_linen_layers(rng):
    x = complex_data(rng)
    for result in both("Linen", x, momentum=0.0):
        np.testing.assert_allclose(result.mean, x.mean(0), rtol=1e-5)


def test_only_linen_has_the_option_to_reduce_in_half_precision():
    assert "force_float32_reductions" not in inspect.signature(nnx.BatchNorm.__init__).parameters
