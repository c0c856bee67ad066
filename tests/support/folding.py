"""Shared by the tests of folding: models whose numbers are not their initial ones."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Each output is a sum of fewer than 100 products of size 10 at most, once in one order and once in another.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def drawn(tree, seed=0):
    """The tree with other numbers: variances from 0.25 to 4, all else around 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").rpartition("/")[2]
        values = np.exp2(rng.uniform(-2, 2, leaf.shape)) if name == "var" else rng.standard_normal(leaf.shape)
        return jnp.asarray(values.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, tree)


def applied(model, variables, x, interceptor=None):
    """What a Linen model gives, in one program."""

    @jax.jit
    def apply(variables, x):
        with contextlib.nullcontext() if interceptor is None else nn.intercept_methods(interceptor):
            return model.apply(variables, x)

    return apply(variables, x)


called = nnx.jit(lambda model, x: model(x))  # what an NNX model gives, in one program


def numbers(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
