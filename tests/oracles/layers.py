"""A layer of any library behind one call, and the comparison of two of them over training and evaluation."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bnjax

STEPS = 3
FEATURES = 5
LAST = ((16, 5), (8, 6, 5), (4, 3, 6, 5), (4, 2, 3, 4, 5))
FIRST = ((16, 5), (8, 5, 6), (4, 5, 3, 6), (4, 5, 2, 3, 4))
SCALE = np.array([0.5, -1.0, 2.0, 1.5, 0.0])
BIAS = np.array([0.1, 0.2, -0.3, 2.0, -1.0])


@contextmanager
def promotion(dtypes="standard", ranks="allow"):
    """JAX's own defaults, around what calls another library."""
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
        yield


class Seen(NamedTuple):
    """What a layer gives for a batch, with the gradients of sum(cotangent * output) and the running statistics after
    it; None for what the layer does not have."""

    output: Any
    dx: Any
    dscale: Any
    dbias: Any
    mean: Any
    var: Any


QUANTITY = Seen("output", *["gradient"] * 3, "running mean", "running var")


class JaxLayer:
    """A layer of a library of JAX.

    `apply(params, kept, x, train)` gives the output and what the layer keeps, with `params` its scale and bias, and
    `statistics(kept)` the running mean and variance. `over` maps the first axis of x, under that name.
    """

    def __init__(self, apply: Callable, params: Any, kept: Any, statistics: Callable, over: str | None = None):
        self.params, self.kept, self.promotion = tuple(params), kept, promotion

        def mapped(params, kept, x, train):
            if over is None:
                return apply(params, kept, x, train)
            return jax.vmap(lambda x: apply(params, kept, x, train), axis_name=over, out_axes=(0, None))(x)

        @partial(jax.jit, static_argnames="train")
        def seen(params, kept, x, cotangent, train):
            output, pullback, kept = jax.vjp(lambda params, x: mapped(params, kept, x, train), params, x, has_aux=True)
            (dscale, dbias), dx = pullback(cotangent)
            return Seen(output, dx, dscale, dbias, *statistics(kept)), kept

        self.seen = seen

    def __call__(self, x, cotangent, train):
        with self.promotion():
            seen, self.kept = self.seen(self.params, self.kept, x, cotangent, train)
        return seen


def ours(params, state, function=bnjax.bn_apply, over=None, **options):
    layer = JaxLayer(
        lambda params, state, x, train: function(bnjax.BNParams(*params), state, x, train, **options),
        params,
        state,
        lambda state: (None, None) if state is None else state[:2],
        over,
    )
    layer.promotion = nullcontext
    return layer


def affine(dtype, scale=True, bias=True):
    """Initial scale and bias that are not those of a new layer."""
    return [jnp.asarray(v, dtype) if wanted else None for v, wanted in ((SCALE, scale), (BIAS, bias))]


def batch(step, shape, dtype):
    """x and a cotangent."""
    rng = np.random.default_rng(step)
    return jnp.asarray(rng.normal(2, 3, shape), dtype), jnp.asarray(rng.normal(0, 1, shape), dtype)


def compare(agree, ours, theirs, shape, dtype="float32", growth=1.0, fields=Seen._fields):
    """The same batches for both: some steps of training, then evaluation, which leaves the statistics as they are."""
    for step in range(STEPS + 1):
        seen = [layer(*batch(step, shape, dtype), step < STEPS) for layer in (ours, theirs)]
        for field in fields:
            our, their = (getattr(s, field) for s in seen)
            assert (our is None) == (their is None), field
            if their is not None:
                agree(getattr(QUANTITY, field), our, their, growth)
