"""Eight CPU devices, and no silent promotion of dtypes or ranks in any test."""

import contextlib
import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest

from bnjax.core.jax_internals import PLAIN
from tests.support.compiling import unoptimized

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling dominates a first example, so a deadline would measure the machine.
hypothesis.settings.register_profile("bnjax", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("bnjax")


def pytest_collection_modifyitems(items):
    """Leave out tests of what is missing: lowerings if plain formulas were chosen, results in a source distribution."""
    absent = ["lowerings"] * PLAIN + ["results"] * (not (Path(__file__).parents[1] / "experiments/results").is_dir())
    for name in absent:
        items[:] = [item for item in items if item.get_closest_marker(name) is None]


def pytest_collection_finish(session):
    """Spare the garbage collector what lives as long as the tests: modules, and the programs that JAX traced."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Compile without optimization, in half the time, except in tests with the marker `optimized`.

    Nearly all of the suite's time is compiling. Tests that assert accuracy or compiled text need the marker.
    """
    with unoptimized() if item.get_closest_marker("optimized") is None else contextlib.nullcontext():
        return (yield)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def flax_promotion():
    """Flax's layers need JAX's own promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
