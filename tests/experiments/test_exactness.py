"""The comparison of errors far from zero, and its committed run."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.benchmark import exactness
from experiments.harness import plot
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
    figures = [tmp_path / "exactness" / f"{name}.png" for name in exactness.FIGURES]
    assert all(figure.stat().st_size > 10_000 for figure in figures)
    printed = capsys.readouterr().out.partition("\n")[2]
    assert "Flax Linen" in printed

    drawn = [figure.read_bytes() for figure in figures]
    before = {path.name: path.read_text() for path in tmp_path.glob("exactness/*.json*")}
    for figure in figures:
        figure.unlink()
    main(["exactness", "--redraw", "--out", str(tmp_path)])
    assert [figure.read_bytes() for figure in figures] == drawn
    assert {path.name: path.read_text() for path in tmp_path.glob("exactness/*.json*")} == before
    assert printed in capsys.readouterr().out


def test_redraw_without_a_run_is_one_line(tmp_path, capsys):
    assert main(["exactness", "--redraw", "--out", str(tmp_path)]) == 2
    assert "errors.jsonl" in capsys.readouterr().err


def test_a_library_that_is_not_known_is_an_error():
    with pytest.raises(InputError, match=r"libraries=\('Theano',\): expected some of"):
        exactness.Exactness(libraries=("Theano",))


@pytest.mark.results
def test_the_committed_errors_of_this_library_grow_no_faster_than_the_bound():
    entries = exactness.read(RESULTS)
    assert json.loads((RESULTS / "config.json").read_text())["config"]["rows"] == 4096
    for ratio, error in exactness.by_library(entries, "y")["bnjax"].items():
        assert error <= 8 * EPS * (1 + 6 + ratio)  # the values lie within 6 standard deviations of their mean


def test_names_of_lines_that_end_at_one_point_do_not_overlap(tmp_path):
    ends = {f"library {i}": 1e-3 for i in range(6)} | {"low": 1e-6, "lower": 1e-6, "high": 1e3}
    with plot.figure(tmp_path / "figure.png", "title", width=5.2, height=4.4) as axes:
        axes.set(yscale="log", ylim=(1e-6, 1e3))
        plot.line_labels(axes, ends, {name: {"color": "0.3"} for name in ends})
        axes.figure.canvas.draw()
        boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == sorted(ends, key=lambda name: -ends[name])
    assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
    assert axes.get_window_extent().y0 <= boxes[-1].y0
    assert boxes[0].y1 <= axes.figure.bbox.y1
