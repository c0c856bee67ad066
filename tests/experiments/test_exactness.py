"""The comparison of errors far from zero, and its committed run."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.benchmark import exactness
from experiments.harness.data import InputError

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "exactness"
EPS = float(np.finfo(np.float32).eps)


def test_oracle_matches_autodiff_in_float64(rng, flax_promotion):
    x, g = rng.standard_normal((2, 16, 3))
    with jax.enable_x64(True):
        y, pullback = jax.vjp(lambda x: (x - x.mean(0)) / jax.numpy.sqrt(x.var(0) + 1e-5), jax.numpy.asarray(x))
        np.testing.assert_allclose(exactness.oracle(x, g)[0], y, atol=1e-12)
        np.testing.assert_allclose(exactness.oracle(x, g)[1], pullback(jax.numpy.asarray(g))[0], atol=1e-12)


@pytest.mark.optimized
def test_a_small_run_finds_this_library_exact_and_flax_not(tmp_path, capsys, flax_promotion):
    flags = ["--ratios", "1", "1000", "--rows", "64", "--features", "2", "--seeds", "1"]
    main(["exactness", *flags, "--libraries", "bnjax", "Flax Linen", "--out", str(tmp_path)])
    errors = exactness.by_library(exactness.read(tmp_path / "exactness"), "y")
    assert list(errors) == ["bnjax", "Flax Linen", exactness.ROUNDING]
    assert 100 * errors["bnjax"][1000] < errors["Flax Linen"][1000]
    assert (tmp_path / "exactness" / "exactness.png").stat().st_size > 10_000
    assert "Flax Linen" in capsys.readouterr().out


def test_a_library_that_is_not_known_is_an_error():
    with pytest.raises(InputError, match=r"libraries=\('Theano',\): expected some of"):
        exactness.Exactness(libraries=("Theano",))


@pytest.mark.results
def test_the_committed_errors_of_this_library_grow_no_faster_than_the_bound():
    entries = exactness.read(RESULTS)
    assert json.loads((RESULTS / "config.json").read_text())["config"]["rows"] == 4096
    for ratio, error in exactness.by_library(entries, "y")["bnjax"].items():
        assert error <= 8 * EPS * (1 + 6 + ratio)  # the values lie within 6 standard deviations of their mean
