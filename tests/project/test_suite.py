"""What the suite itself relies on: its options to compile, and fewer cases that lose no pair."""

import itertools

import jax
import numpy as np
import pytest
from jax._src import compiler

from tests.support.compiling import compilations, quick_options, unoptimized
from tests.support.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(3, 2), (3, 3, 3), (4, 2, 2), (5, 3, 4, 2), (2, 2, 2, 2, 2)])
def test_pairwise_has_every_pair_in_no_more_rows_than_the_product(sizes):
    factors = [[f"{f}{i}" for i in range(size)] for f, size in enumerate(sizes)]
    rows = pairwise(*factors)
    assert rows == pairwise(*factors)
    assert all(value in factor for row in rows for value, factor in zip(row, factors, strict=True))
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(factors[a], factors[b]))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(rows) <= 2 * largest[0] * largest[1]


def test_pairwise_of_many_factors_is_far_smaller_than_the_product():
    assert len(pairwise(*[range(3)] * 6)) <= 20  # of 729


def options():
    return dict(compiler.get_compile_options(1, 1).env_option_overrides)


def test_tests_compile_without_optimization():
    assert options() == quick_options()
    assert quick_options()["xla_backend_optimization_level"] == "0"


@pytest.mark.optimized
def test_marked_tests_compile_as_users_do_whatever_was_compiled_before():
    f, x = jax.jit(lambda x: 2 * x), np.ones(3, np.float32)
    assert options() == {}
    found = []
    for _ in range(2):
        with unoptimized():
            found.append(compilations(lambda: f(x)))
        found.append(compilations(lambda: f(x)))
    assert found == [1, 1, 0, 0]
    assert options() == {}
