"""Eight CPU devices, and no silent promotion of dtypes or ranks in any test."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling dominates a first example, so a deadline would measure the machine.
hypothesis.settings.register_profile("bnjax", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("bnjax")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def flax_promotion():
    """Flax's layers need JAX's own promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
