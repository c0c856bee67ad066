"""The reductions of batch normalization, for which XLA's own are not always the fastest.

    sums(g, x, mean)        = sum g, sum g (x - mean)          over the axes
    spread(c, k, x, mean)   = c + k (x - mean)

They are linear in g and in (c, k), and each is the other's transpose: the first is the whole backward pass of batch
normalization but for elementwise work, the second all of its forward mode that depends on x. As primitives of JAX they
save x alone for the backward pass, not x - mean, and each platform may have its own lowering.

Batch normalization is bound by memory traffic. XLA on CPU has fast reductions with one result; two that share an
operand make it write that operand, an array of x's size, to memory first. Here the operand is seen as `SLABS` slabs
that lie side by side, and both sums are the real and imaginary part of one complex sum over them: elementwise work to
XLA, which reads once and writes a result of 1 / SLABS of the size. Slices of that kind would be communication for a
sharded array, so this is the lowering for arrays that one device holds whole.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# As many terms as LLVM unrolls to straight code; twice as many made the second sum three times as slow.
SLABS = 16


def primitive(name: str, plain: Callable[..., Any], cpu: Callable[..., Any], linear: int = 0) -> Primitive:
    """A primitive that computes `plain(*arrays, axes=axes)`, a tuple, by `cpu` where one CPU device holds the arrays.

    It is jointly linear in its first `linear` arguments. For derivatives in the others it is `plain`.
    """
    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(jax.jit(p.bind, static_argnames="axes"))
    p.def_abstract_eval(lambda *avals, axes: jax.make_jaxpr(partial(plain, axes=axes))(*avals).out_avals)

    def jvp(primals, tangents, *, axes):
        given = [not isinstance(t, ad.Zero) for t in tangents]
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        terms = []
        if any(given[:linear]):
            terms.append(p.bind(*tangents[:linear], *primals[linear:], axes=axes))
        if any(given[linear:]):
            others = partial(plain, *primals[:linear], axes=axes)
            terms.append(jax.jvp(lambda *args: tuple(others(*args)), primals[linear:], tangents[linear:])[1])
        return p.bind(*primals, axes=axes), [functools.reduce(jnp.add, t) for t in zip(*terms, strict=True)]

    def batch(args, dims, *, axes):
        if any(d is None for d in dims):
            out = jax.vmap(partial(plain, axes=axes), in_axes=tuple(dims))(*args)
        else:
            args = (jnp.moveaxis(v, d, 0) for v, d in zip(args, dims, strict=True))
            out = p.bind(*args, axes=tuple(a + 1 for a in axes))
        return out, (0,) * len(out)

    def lower_on_cpu(ctx, *args, axes):
        rule = cpu if _held_whole(ctx.module_context.axis_context) else plain
        return mlir.lower_fun(rule, multiple_results=True)(ctx, *args, axes=axes)

    ad.primitive_jvps[p] = jvp
    batching.primitive_batchers[p] = batch
    mlir.register_lowering(p, mlir.lower_fun(plain, multiple_results=True))
    mlir.register_lowering(p, lower_on_cpu, platform="cpu")
    return p


def _held_whole(context):
    """Whether what is being lowered sees arrays that one device holds: of one device, or of one device's own part."""
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    return isinstance(context, mlir.SPMDAxisContext) and context.manual_axes == frozenset(context.mesh.axis_names)


def slabs(axes: tuple[int, ...], *arrays: Array) -> Any:
    """`arrays` as `SLABS` slabs and what is left over, or None where there are too few places to reduce over.

    The first of the arrays is full; others may have size 1 on the axes. The first run of adjacent reduced axes that is
    long enough becomes one axis, which is cut.

    Returns:
      The arrays with an axis of `SLABS` before that axis, that axis' position, what is left over of the arrays (None
      if nothing is), and the axes to reduce over once the axis of slabs is gone.
    """
    shape = arrays[0].shape
    for start in axes:
        stop = next(a for a in range(start, len(shape) + 1) if a not in axes)
        places = math.prod(shape[start:stop])
        if start - 1 not in axes and places >= SLABS:
            break
    else:
        return None

    def cut(v, begin, end, *lengths):
        full = v.shape[start:stop] == shape[start:stop]
        v = v.reshape(*v.shape[:start], places if full else 1, *v.shape[stop:])
        v = lax.slice_in_dim(v, begin, end, axis=start) if full else v
        return v.reshape(*v.shape[:start], *(lengths if full else (1,) * len(lengths)), *v.shape[start + 1 :])

    each, over = divmod(places, SLABS)
    heads = [cut(v, 0, places - over, SLABS, each) for v in arrays]
    tails = [cut(v, places - over, places, over) for v in arrays] if over else None
    rest = (start, *(a - (stop - start) + 1 for a in axes if a >= stop))
    return heads, start, tails, tuple(a for a in axes if a < start) + rest


def _plain_sums(g, x, mean, *, axes):
    return jnp.sum(g, axes, keepdims=True), jnp.sum(jnp.real(jnp.conj(x - mean) * g), axes, keepdims=True)


def _cpu_sums(g, x, mean, *, axes):
    cut = slabs(axes, x, g, mean)
    if cut is None:
        return _plain_sums(g, x, mean, axes=axes)
    (xs, gs, means), axis, tails, rest = cut
    both = jnp.sum(lax.complex(gs, gs * (xs - means)), axis)
    parts = [jnp.sum(v, rest) for v in (both.real, both.imag)]
    if tails is not None:
        x_, g_, mean_ = tails
        parts = [a + jnp.sum(b, rest) for a, b in zip(parts, (g_, g_ * (x_ - mean_)), strict=True)]
    return tuple(jnp.expand_dims(v, axes) for v in parts)


def _plain_spread(c, k, x, mean, *, axes):
    return (c + k * (x - mean),)


_sums = primitive("bnjax_sums", _plain_sums, _cpu_sums, linear=1)
_spread = primitive("bnjax_spread", _plain_spread, _plain_spread, linear=2)


def _transposes(p, other, linear):
    def transpose(cotangents, *args, axes):
        cotangents = map(ad.instantiate_zeros, cotangents)
        out = other.bind(*cotangents, *args[linear:], axes=axes)
        out = [ct if ad.is_undefined_primal(v) else None for v, ct in zip(args[:linear], out, strict=True)]
        return out + [None] * (len(args) - linear)

    ad.primitive_transposes[p] = transpose


_transposes(_sums, _spread, 1)
_transposes(_spread, _sums, 2)


def sums(g: Array, x: Array, mean: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """sum g and sum Re(conj(x - mean) g) over the axes, which stay with size 1; g of x's shape, mean of x's rank."""
    apply = partial(_plain_sums, axes=axes) if jnp.iscomplexobj(x) else partial(_sums.bind, axes=axes)
    total, product = apply(g, x, mean)
    return total, product


def spread(c: Array | None, k: Array | None, x: Array, mean: Array) -> Array | None:
    """c + (x - mean) k for c and k of x's rank, each None for 0."""
    if k is None:
        return c
    c, k = jnp.broadcast_arrays(jnp.zeros_like(k) if c is None else c, k)
    if jnp.iscomplexobj(x):
        return c + k * (x - mean)
    axes = tuple(a for a in range(x.ndim) if c.shape[a] != x.shape[a])
    return _spread.bind(c, k, x, mean, axes=axes)[0]
