"""Trees of arrays compared: shapes, dtypes and values."""

import jax
import numpy as np


def described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_same(ours, flax, rtol=2e-5, atol=2e-5):
    assert described(ours) == described(flax)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.complex128), (ours, flax))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), *exact)
