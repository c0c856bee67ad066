"""The two reductions of batch normalization, as primitives with a lowering of their own on CPU and on CUDA GPUs.

    sums(g, x, mean)        = sum g, sum g (x - mean)          over the reduced axes
    spread(c, k, x, mean)   = c + k (x - mean)

Linear in g and in (c, k), each is the other's transpose: the first is the backward pass of batch normalization but for
elementwise work, the second what its forward mode adds to that. As primitives they save x for the backward pass, which
whoever made x saves anyway, and not x - mean.

Batch normalization is bound by memory traffic. XLA on CPU has fast reductions with one result; for two that share an
operand it first writes that operand, an array of x's size. So `two_sums` cuts the arrays into slabs that lie side by
side and adds these up as complex numbers, whose parts are the two sums. To XLA that is elementwise work: it reads once
and writes a fraction. Slabs of a sharded array would be communication, so this is for arrays that one device holds.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.extend.core.primitives import name_p
from jax.interpreters import ad, batching, mlir

# A name for `jax.checkpoint` changes nothing; jet has no rule for it.
jet.jet_rules.setdefault(name_p, lambda primals, terms, **params: (*primals, *terms))


def primitive(
    name: str,
    plain: Callable[..., Any],
    *,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    series: Callable[..., Any] | None = None,
    linear: int = 0,
    first_is_full: bool = False,
) -> Primitive:
    """A primitive that computes `plain(*arrays, axes=axes)`, a tuple.

    Args:
      name: of the primitive.
      plain: the computation on every platform, and what its derivative is taken of.
      cpu: the computation where one CPU device holds the arrays.
      cuda: the computation on CUDA GPUs, an elementwise one, so that it serves sharded arrays too.
      series: the same function as `plain` in operations that `jax.experimental.jet` knows; by default `plain` is.
      linear: how many of the first arguments it is linear in, together.
      first_is_full: whether the arrays broadcast against the first one. Then several models under `vmap` are one
        computation on arrays with one more axis, also if some of the arrays are the same for all models.
    """
    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(plain)

    @p.def_abstract_eval
    @functools.cache
    def _(*avals, axes):
        return jax.make_jaxpr(partial(plain, axes=axes))(*avals).out_avals

    def jvp(primals, tangents, *, axes):
        given = [not isinstance(t, ad.Zero) for t in tangents]
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        terms = []
        if any(given[:linear]):
            terms.append(p.bind(*tangents[:linear], *primals[linear:], axes=axes))
        if any(given[linear:]):
            others = partial(plain, *primals[:linear], axes=axes)
            terms.append(jax.jvp(others, primals[linear:], tangents[linear:])[1])
        return p.bind(*primals, axes=axes), [functools.reduce(jnp.add, t) for t in zip(*terms, strict=True)]

    def batch(args, dims, *, axes):
        if first_is_full:
            size = next(v.shape[d] for v, d in zip(args, dims, strict=True) if d is not None)
            first, *rest = (v[None] if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(args, dims, strict=True))
            first = jnp.broadcast_to(first, (size, *first.shape[1:]))
            out = p.bind(first, *rest, axes=tuple(a + 1 for a in axes))
        elif None in dims:
            out = jax.vmap(partial(plain, axes=axes), in_axes=tuple(dims))(*args)
        else:
            args = (jnp.moveaxis(v, d, 0) for v, d in zip(args, dims, strict=True))
            out = p.bind(*args, axes=tuple(a + 1 for a in axes))
        return out, (0,) * len(out)

    def lower_on_cpu(ctx, *args, axes):
        rule = cpu if cpu and _held_whole(ctx.module_context.axis_context) else plain
        return mlir.lower_fun(rule, multiple_results=True)(ctx, *args, axes=axes)

    def taylor(primals, terms, *, axes):
        return jet.jet(partial(series or plain, axes=axes), primals, terms, factorial_scaled=False)

    jet.jet_rules[p] = taylor
    ad.primitive_jvps[p] = jvp
    batching.primitive_batchers[p] = batch
    mlir.register_lowering(p, mlir.lower_fun(plain, multiple_results=True))
    mlir.register_lowering(p, lower_on_cpu, platform="cpu")
    if cuda is not None:
        mlir.register_lowering(p, mlir.lower_fun(cuda, multiple_results=True), platform="cuda")
    return p


def _held_whole(context):
    """Whether the arrays being lowered are on one device: the only one, or each device's own part of a shard_map."""
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    return isinstance(context, mlir.SPMDAxisContext) and context.manual_axes == frozenset(context.mesh.axis_names)


def cut(most: int, axes: tuple[int, ...], *arrays: Array) -> Any:
    """`arrays` as `most` slabs or a few less, and what is left over; None where there are fewer places to reduce over.

    The first of the arrays is full, others may have size 1 on the axes. The first run of adjacent reduced axes that is
    long enough becomes one axis, and that is cut.

    Returns:
      The arrays with an axis of slabs before that axis, the position of the axis of slabs, the arrays of what is left
      over, and the axes to reduce over once the axis of slabs is gone.
    """
    shape = arrays[0].shape
    for start in axes:
        stop = next(a for a in range(start, len(shape) + 1) if a not in axes)
        places = math.prod(shape[start:stop])
        if start - 1 not in axes and _at_least(places, most):
            break
    else:
        return None
    # A count that divides the places leaves nothing over.
    count = next((n for n in range(most, most // 2, -1) if places % n == 0), most)
    each, over = divmod(places, count)

    def part(v, begin, end, *lengths):
        full = v.shape[start:stop] == shape[start:stop]
        v = v.reshape(*v.shape[:start], places if full else 1, *v.shape[stop:])
        v = lax.slice_in_dim(v, begin, end, axis=start) if full else v
        return v.reshape(*v.shape[:start], *(lengths if full else (1,) * len(lengths)), *v.shape[start + 1 :])

    slabs = [part(v, 0, places - over, count, each) for v in arrays]
    left = [part(v, places - over, places, over) for v in arrays] if over else None
    rest = (start, *(a - (stop - start) + 1 for a in axes if a >= stop))
    return slabs, start, left, tuple(a for a in axes if a < start) + rest


def _at_least(places, most):
    """Whether so many places are known to be there; a symbolic dimension of `jax.export` is not known."""
    return isinstance(places, int) and places >= most


def two_sums(
    pair: Callable[..., tuple[Array, Array]], most: int, axes: tuple[int, ...], *arrays: Array
) -> tuple[Array, Array]:
    """The sums over `axes`, which stay with size 1, of the two arrays that `pair` makes of `arrays` elementwise.

    `most` is the number of slabs. LLVM must unroll their sum for it to be vectorized, and does so up to about 300
    instructions, those of `pair` and of whatever XLA fuses into it counted.
    """

    def total(values, most, least, axes, *arrays):
        places = math.prod(arrays[0].shape[a] for a in axes)
        parts = cut(most, axes, *arrays) if _at_least(places, least) else None
        if parts is None:
            return jnp.sum(values(*arrays), axes)
        slabs, axis, left, rest = parts
        # The conjugate keeps XLA from making one sum of this and the next, too long to be unrolled. A few rows that
        # remain are soon added, but another sum takes as long to compile as the first.
        z = jnp.conj(total(jnp.conj, 16, 64, rest, jnp.sum(values(*slabs), axis)))
        return z if left is None else z + jnp.sum(values(*left), rest)

    z = total(lambda *arrays: lax.complex(*pair(*arrays)), most, most, axes, *arrays)
    return jnp.expand_dims(z.real, axes), jnp.expand_dims(z.imag, axes)


def _plain_sums(g, x, mean, *, axes):
    return jnp.sum(g, axes, keepdims=True), jnp.sum(jnp.real(jnp.conj(x - mean) * g), axes, keepdims=True)


def _cpu_sums(g, x, mean, *, axes):
    # XLA fuses an activation's derivative into it: of 8 slabs even that of hard_swish is unrolled, of 12 it was not.
    return two_sums(lambda x, g, mean: (g, g * (x - mean)), 8, axes, x, g, mean)


def _plain_spread(c, k, x, mean, *, axes):
    return (c + k * (x - mean),)


def _cuda_spread(c, k, x, mean, *, axes):
    # One operation less for each value. XLA's cost model for GPUs then computes the derivative of an activation again
    # in both passes of the backward, where it would write it and read it twice. The rounding of k x and k mean is no
    # larger than that of rounding x, and where x is its mean k is 0.
    return ((c - k * mean) + k * x,)


_sums = primitive("bnjax_sums", _plain_sums, cpu=_cpu_sums, linear=1)
_spread = primitive("bnjax_spread", _plain_spread, cuda=_cuda_spread, linear=2)


def _transpose(other, linear, cotangents, *args, axes):
    out = other.bind(*map(ad.instantiate_zeros, cotangents), *args[linear:], axes=axes)
    wanted = [ct if ad.is_undefined_primal(v) else None for v, ct in zip(args[:linear], out, strict=True)]
    return wanted + [None] * (len(args) - linear)


ad.primitive_transposes[_sums] = partial(_transpose, _spread, 1)
ad.primitive_transposes[_spread] = partial(_transpose, _sums, 2)


def sums(g: Array, x: Array, mean: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """sum g and sum Re(conj(x - mean) g) over `axes`, which stay with size 1; g of x's shape, mean of x's rank."""
    if jnp.iscomplexobj(x):
        return _plain_sums(g, x, mean, axes=axes)
    return tuple(_sums.bind(g, x, mean, axes=axes))


def spread(c: Array | None, k: Array | None, x: Array, mean: Array) -> Array | None:
    """c + k (x - mean) for c and k of x's rank, None for 0."""
    if k is None:
        return c
    c, k = jnp.broadcast_arrays(jnp.zeros_like(k) if c is None else c, k)
    axes = tuple(a for a in range(x.ndim) if k.shape[a] != x.shape[a])
    apply = partial(_plain_spread, axes=axes) if jnp.iscomplexobj(x) else partial(_spread.bind, axes=axes)
    return apply(c, k, x, mean)[0]
