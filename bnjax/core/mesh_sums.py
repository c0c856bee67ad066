"""Moments of all devices of named mesh axes, from each device's moments, in sums of fixed size.

With weight w, mean m and variance v of each device's part, and a guess c of the mean, such as the running mean:

    W = sum w        mean = c + sum w (m - c) / W        var = sum w (v + |m - c|^2) / W - |mean - c|^2

One psum sends three rows of the features' shape, or two if all devices have the same number of elements. A gather sends
three rows for each device. With r = |mean - c|^2 / var, the relative error of `var` is about eps (1 + r), as for one
look at an array around a known shift (`reading.py`), and the same guard keeps r to at most 8 for each feature. If a
feature has more, a psum of w m gives a plain mean, and another psum the sums around it. No device reads `x` again.

* TPU and CPU: a conditional on the guard.
* GPU: no conditional, because the host would wait for it. The sums are in float64, which has enough digits for sums
  around 0, so that no guess is needed. On TPUs a sum in float64 would be a gather.

The guess never changes the result. If the types of `shard_map` say that it may differ between devices, 0 is used.
Without such types (`check_vma=False`, `pmap`), the bits of a checksum are summed with the first psum, and a guess on
which devices do not agree is not used.

This module does not know `x`. The derivative of the merge is one psum too; the derivative of the moments has its own.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from bnjax.core.collectives import sum_over
from bnjax.core.jax_internals import mesh_axes
from bnjax.core.reading import is_near
from bnjax.core.records import Collected, Moments, Support
from bnjax.core.residuals import named
from bnjax.core.weights import abs_square, divided, nonzero, relative, weigh

Names = tuple[Hashable, ...]


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def merge_over_mesh(part: Collected, guess: Array, names: Names, elements: int | None = None) -> Collected:
    """The moments and the support of all devices of mesh axes.

    Args:
      part: the moments and the support of this device's elements; `mean` and `var` are 0 where the weight is.
      guess: a guess of the mean, which broadcasts to it. It changes the number of collectives, never the result.
      names: axes of a mesh.
      elements: the number of elements on each device, if it is the same on all, 1 or more, and all weights are 1.
    """
    (weight, mean, var), support = part
    typed = _may_differ(lax.axis_index(names), names)
    if typed and _may_differ(guess, names):
        guess = jnp.zeros(mean.shape, mean.dtype)
    guess = jnp.broadcast_to(guess.astype(mean.dtype), mean.shape)
    # A collective in a conditional is legal only if all devices that run the program decide alike.
    alike = mesh_axes() <= set(names)
    default = partial(_guarded, names=names, typed=typed) if alike else partial(_summed_twice, names=names)
    on_gpu = partial(_in_float64 if jnp.finfo(var.dtype).bits == 32 else _summed_twice, names=names)
    merge = _elementwise(partial(lax.platform_dependent, cuda=on_gpu, default=default))
    if support is not None:
        # Products with weights far from 1 may leave the floating range. Those with relative weights do not.
        total, valid = sum_over([weight, support.valid], names, None)
        _, unit = relative(total, ())
        total, mean, var, mean_weight = merge(guess, mean, var, weight / unit, support.mean_weight)
        return Collected(Moments(total * unit, mean, var), Support(valid, mean_weight))
    total, mean, var = merge(guess, mean, var, *([weight] if elements is None else []))
    return Collected(Moments(total * (1 if elements is None else elements), mean, var), None)


@merge_over_mesh.defjvp
def _merge_over_mesh_jvp(names, elements, primals, tangents):
    # dmean = E[dm] and dvar = E[dv + 2 Re(conj(m - mean) dm)], in one psum. Neither the guess nor the conditional is
    # differentiated: JAX has no reverse mode for `custom_vmap`.
    whole = named(merge_over_mesh(*primals, names, elements))
    (weight, mean, _), (_, dm, dv) = primals[0].moments, tangents[0].moments
    share = (weight / nonzero(whole.moments.weight)).astype(dm.dtype)
    dsquare = dv + 2 * jnp.real(jnp.conj(mean - whole.moments.mean) * dm)
    dmean, dvar = sum_over([share * dm, share * dsquare], names, None)
    zeros = jax.tree.map(jnp.zeros_like, whole)
    return whole, zeros._replace(moments=Moments(zeros.moments.weight, dmean, dvar.real))


def _may_differ(values, names):
    """Whether the type of an array says that it may differ between devices; without check_vma no type does."""
    for name in names:
        try:
            lax.pcast(values, name, to="varying")
        except ValueError:  # the type says so already
            return True
    return False


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays of one shape, elementwise but for one decision, that `vmap` calls once for all models.

    Mapped by `vmap`, its conditional would become a select, which runs both branches.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _(size, batched, *arrays):
        models = [v if b else jnp.broadcast_to(v, (size, *v.shape)) for v, b in zip(arrays, batched, strict=True)]
        results = _elementwise(function)(*models)
        return results, (True,) * len(results)

    return mapped


def _guarded(guess, mean, var, *weights, names, typed):
    """All devices' moments in one psum around the guess, and in two more where it is too far from the mean."""
    total, found, variance, *own, offset = _around(guess, mean, var, *weights, names=names)
    near = is_near(offset, found, variance)
    agreed = True if typed else _agreed(guess, names)

    def second_look(*_):
        return _summed_twice(guess, mean, var, *weights, names=names)[1:3]

    # One branch does nothing, so that XLA keeps the conditional.
    found, variance = lax.cond(
        jnp.all(near) & agreed, lambda *first: first, second_look, found, jnp.maximum(variance, 0)
    )
    return total, found, variance, *own


def _summed_twice(guess, mean, var, *weights, names):
    """All devices' moments in two psums: plain sums, and sums around the plain mean."""
    _, (plain,) = _means([mean], *weights[:1], names=names)
    total, mean, var, *own, _ = _around(plain, mean, var, *weights, names=names)
    return total, mean, jnp.maximum(var, 0), *own


def _in_float64(guess, mean, var, *weights, names):
    """All devices' moments in float32, from one psum in float64."""
    # Without the barrier XLA may compute a mean twice, for itself and for its square, and round it in two ways.
    mean, var = lax.optimization_barrier((mean, var))
    with jax.enable_x64(True):
        wide = [v.astype(jnp.complex128 if jnp.iscomplexobj(v) else jnp.float64) for v in (mean, var, *weights)]
        total, center, variance, *own, _ = _around(jnp.zeros((), wide[0].dtype), *wide, names=names)
        found = total, center, jnp.maximum(variance, 0), *own
        return tuple(v.astype(like.dtype) for v, like in zip(found, (var, mean, var, *weights[1:]), strict=True))


def _around(center, mean, var, *weights, names):
    """Weight, mean and variance of all devices, the means of further values, and mean - center; in one psum.

    Rounding may leave the variance a little below 0.
    """
    distance = mean - center
    values = [distance, var + abs_square(distance), *weights[1:]]
    total, (offset, square, *own) = _means(values, *weights[:1], names=names)
    return total, jnp.where(total > 0, center + offset, 0), square - abs_square(offset), *own, offset


def _means(values, weight=None, *, names):
    """The sum of the devices' weights, each 1 by default, and the weighted means of values; in one psum."""
    rows = [weigh(weight, v) for v in values]
    rows = [row for v in rows for row in ((v.real, v.imag) if jnp.iscomplexobj(v) else (v,))]
    sums = list(sum_over(rows if weight is None else [*rows, weight], names, None))
    total = lax.full_like(sums[0], lax.axis_size(names)) if weight is None else sums.pop()
    row = iter(sums)
    whole = [lax.complex(next(row), next(row)) if jnp.iscomplexobj(v) else next(row) for v in values]
    return total, [divided(v, total) for v in whole]


def _agreed(guess, names):
    """Whether all devices have the same guess: whether each bit of a checksum is set on all devices or on none."""
    numbers = jnp.stack([guess.real, guess.imag]) if jnp.iscomplexobj(guess) else guess
    words = lax.bitcast_convert_type(numbers, jnp.uint32).ravel()
    # Each word has an odd factor of its own, so that an exchange of two numbers shows too.
    factors = (2 * lax.iota(jnp.uint32, words.size) + 1) * jnp.uint32(0x9E3779B1)
    checksum = jnp.sum(factors * words, dtype=jnp.uint32)
    bits = (checksum >> lax.iota(jnp.uint32, 32)) & 1
    (number,) = sum_over([bits.astype(jnp.float32)], names, None)
    return jnp.all((number == 0) | (number == lax.axis_size(names)))
