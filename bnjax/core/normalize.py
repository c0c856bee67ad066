"""The formula of batch normalization, and its derivative.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias

It takes any mean and variance. With the batch's, its derivative and the derivative of the moments compose to the
gradient of Ioffe & Szegedy (2015, section 3).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.core.jax_internals import SymbolicZero, mesh_axes
from bnjax.core.reductions import spread
from bnjax.core.weights import valid


def formula(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
    epsilon: float,
    dtype: Any = None,
) -> Array:
    """scale * (x - mean) / sqrt(var + epsilon) + bias, of x's dtype; all arguments have x's rank or are None.

    The mask and `dtype` affect only the derivatives of `normalize`.
    """
    y = (x - mean.astype(x.dtype)) * slopes(x, var, scale, epsilon)[1]
    return y if bias is None else y + bias.astype(x.dtype)


# The formula with the derivative rule below. Tests compare it with plain autodiff of `formula`. A masked element whose
# y is not finite in `dtype`, the output's, is treated as a constant when differentiating: a loss that leaves it out may
# return 0 * inf as its cotangent, a NaN for the whole feature.
normalize: "jax.custom_jvp[Array]" = jax.custom_jvp(formula, nondiff_argnums=(6, 7))


@partial(normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(epsilon, dtype, primals: Any, tangents: Any):
    # With slope = scale / sqrt(var + epsilon):
    #
    #     dy = slope dx + (x - mean) dslope + dshift        dslope = dscale / std - slope dvar / (2 std^2)
    #                                                       dshift = dbias - slope dmean
    #
    # Transposed, this is one elementwise pass and the two reductions sum g and sum g (x - mean), which serve scale,
    # bias, mean and var alike. Written in any other form, each of the four has a reduction of its own.
    x, mean, var, scale, _, mask = primals
    y = normalize(*primals, epsilon, dtype)
    rstd, slope = slopes(x, var, scale, epsilon)
    dx, dmean, dvar, dscale, dbias = (
        None if t is None or isinstance(t, SymbolicZero) else t.astype(x.dtype) for t in tangents[:5]
    )
    # dvar is multiplied by one factor at a time: the product of the factors is about std^-3, which would leave the
    # floating range first.
    dslope = _add(
        None if dscale is None else rstd * dscale, None if dvar is None else -0.5 * slope * (rstd * (rstd * dvar))
    )
    dshift = _add(dbias, None if dmean is None else -slope * dmean)
    if mesh_axes():
        dslope, dshift = _varying_like(x, dslope, dshift)
    mean = mean.astype(x.dtype)
    kept = None if mask is None else valid(mask, x) | jnp.isfinite(y.astype(dtype or y.dtype))
    if kept is not None:
        x = jnp.where(kept, x, mean)
    dy: Any = _add(None if dx is None else slope * dx, spread(dshift, dslope, x, mean))
    if dx is None and dslope is None:  # dy is None, or of the features' shape
        dy = jnp.zeros_like(x) if dy is None else jnp.zeros_like(x) + dy
    return y, dy if kept is None else jnp.where(kept, dy, 0)


def _varying_like(x: Array, *terms: Array | None) -> list[Any]:
    """The terms, which shard_map may hold replicated, typed as varying over the mesh like `x`.

    They are typed before they are broadcast, and together, so that they transpose to one psum of a few numbers per
    feature. Left to itself, shard_map would sum the broadcast terms, which are arrays of x's size.
    """
    some = [t for t in terms if t is not None]
    if not some:
        return list(terms)
    stack = jnp.stack(jnp.broadcast_arrays(*some))
    parts = iter(stack + lax.full_like(x, 0, stack.dtype, shape=stack.shape))
    return [None if t is None else next(parts) for t in terms]


def slopes(x: Array, var: Array, scale: Array | None, epsilon: float) -> tuple[Array, Array]:
    """1 / sqrt(var + epsilon), and scale times it, in x's dtype."""
    rstd = lax.rsqrt(var.astype(jnp.finfo(x.dtype).dtype) + epsilon).astype(x.dtype)
    return rstd, rstd if scale is None else scale.astype(x.dtype) * rstd


def _add(a, b):
    """a + b, where None is 0."""
    return a if b is None else b if a is None else a + b
