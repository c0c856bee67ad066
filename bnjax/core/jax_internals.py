"""The JAX APIs without a stability guarantee that bnjax uses.

JAX guarantees the documented functions of `jax`, `jax.numpy` and `jax.lax`. The names below are outside that guarantee,
so that they are used only in this module:

`jax.extend.core.Primitive`, `jax.interpreters.ad`, `.batching`, `.mlir`
    A function with a lowering of its own on CPU and on CUDA GPUs, with a transpose that reads `x` and not `x - mean`,
    and with one conditional for several models under `vmap`.

`mlir.ShardingContext`, `mlir.SPMDAxisContext`
    They tell a lowering whether one device holds the whole array, because slabs of a sharded array would need
    communication. `jax.lax.platform_dependent` may replace them once it can tell how many devices hold an array.

`jax.experimental.jet`, `jax.extend.core.primitives.name_p`
    Importing bnjax adds a rule for each of its primitives to the table of rules of `jet`. The first Taylor series adds
    one for `jax.ad_checkpoint.checkpoint_name`, which `jet` lacks. Without `jet` there are no Taylor series.

`jax.core.Tracer`, `jax.custom_derivatives.SymbolicZero`
    Whether a value is known, and whether a tangent is zero, while a function is traced.

With the environment variable BNJAX_PLAIN=1, or if JAX lacks these APIs, the plain formula runs everywhere. Its results
are as exact. It takes more time on CPU, and moves more memory on a GPU.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero as SymbolicZero

PLAIN: bool = os.environ.get("BNJAX_PLAIN", "0") not in ("", "0")


def _module(name: str) -> Any:
    """A module of JAX, or None if JAX lacks it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


Primitive: Any = getattr(_module("jax.extend.core"), "Primitive", None)
ad: Any = _module("jax.interpreters.ad")
batching: Any = _module("jax.interpreters.batching")
mlir: Any = _module("jax.interpreters.mlir")
jet: Any = _module("jax.experimental.jet")
name_p: Any = getattr(_module("jax.extend.core.primitives"), "name_p", None)


@functools.cache
def _say_that_plain_formulas_run(reason: str) -> None:
    warnings.warn(
        f"bnjax: jax {jax.__version__} does not accept the lowerings of bnjax ({reason}), so plain formulas run. "
        "Results are as exact, but take more time on CPU and more memory traffic on a GPU. Set BNJAX_PLAIN=1 to choose "
        "them without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )


class PlatformFunction:
    """A function of arrays with a lowering of its own on some platforms, which every transformation of JAX knows.

    `function(*arrays, axes=axes)` returns the same as `plain(*arrays, axes=axes)`, a tuple of arrays.

    Args:
      name: the primitive's name in compiled programs.
      plain: the computation on every other platform, and the one that is differentiated.
      cpu: the computation where one CPU device holds the arrays.
      cuda: the computation on CUDA GPUs. It is elementwise, so that it serves sharded arrays too.
      one_gpu: the computation where one CUDA GPU holds the arrays.
      several: the computation where several CPU devices hold the arrays; `devices` says how many.
      several_gpus: the computation where several CUDA GPUs hold the arrays, with `devices`.
      taylor: the same function in operations that `jax.experimental.jet` knows; by default `plain`.
      linear: the number of leading arguments in which the function is jointly linear.
      first_is_full: whether the arrays broadcast against the first one. Several models under `vmap` are then one
        computation on arrays with one more axis, even if the models share some of the arrays.
    """

    def __init__(
        self,
        name: str,
        plain: Callable[..., Any],
        *,
        cpu: Callable[..., Any] | None = None,
        cuda: Callable[..., Any] | None = None,
        one_gpu: Callable[..., Any] | None = None,
        several: Callable[..., Any] | None = None,
        several_gpus: Callable[..., Any] | None = None,
        taylor: Callable[..., Any] | None = None,
        linear: int = 0,
        first_is_full: bool = False,
    ):
        self.plain: Callable[..., Any] = plain
        self.cpu: Callable[..., Any] = cpu or plain
        self.cuda: Callable[..., Any] = cuda or plain
        self.one_gpu: Callable[..., Any] = one_gpu or self.cuda
        self.several: Callable[..., Any] | None = several
        self.several_gpus: Callable[..., Any] | None = several_gpus
        self.taylor: Callable[..., Any] = taylor or plain
        self.linear = linear
        self.first_is_full = first_is_full
        self.primitive: Any = None
        if not PLAIN:
            try:
                self.primitive = self._registered(Primitive(name))
            except (AttributeError, TypeError) as error:  # also for a name that is None above
                _say_that_plain_formulas_run(str(error))

    def __call__(self, *arrays: Any, axes: tuple[int, ...]) -> tuple[Any, ...]:
        if self.primitive is None:
            return tuple(self.plain(*arrays, axes=axes))
        return tuple(self.primitive.bind(*arrays, axes=axes))

    def _registered(self, primitive):
        """The primitive with its rules: shapes, derivative, batching, lowering, Taylor series."""
        primitive.multiple_results = True
        primitive.def_impl(self.plain)
        primitive.def_abstract_eval(functools.cache(self._abstract))
        ad.primitive_jvps[primitive] = self._jvp
        batching.primitive_batchers[primitive] = self._batch
        plain, cpu, cuda, one_gpu = map(_shared, (self.plain, self.cpu, self.cuda, self.one_gpu))
        mlir.register_lowering(primitive, plain)
        lowerings = {"cpu": (cpu, self.several, plain), "cuda": (one_gpu, self.several_gpus, cuda)}
        for platform, (one, several, others) in lowerings.items():
            mlir.register_lowering(primitive, partial(_lower, one, several, others), platform=platform)
        if jet is not None:
            jet.jet_rules[primitive] = self._jet
        return primitive

    def _abstract(self, *avals, axes):
        return jax.make_jaxpr(partial(self.plain, axes=axes))(*avals).out_avals

    def _jvp(self, primals, tangents, *, axes):
        """The function at the tangents of its linear arguments, plus the plain derivative in the others."""
        given = [not isinstance(t, ad.Zero) for t in tangents]
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        linear, others = primals[: self.linear], primals[self.linear :]
        terms = []
        if any(given[: self.linear]):
            terms.append(self(*tangents[: self.linear], *others, axes=axes))
        if any(given[self.linear :]):
            of_others = partial(self.plain, *linear, axes=axes)
            terms.append(jax.jvp(of_others, others, tangents[self.linear :])[1])
        return self(*primals, axes=axes), [functools.reduce(jnp.add, t) for t in zip(*terms, strict=True)]

    def _batch(self, arrays, dims, *, axes):
        """One call on arrays with one more leading axis, of size 1 where an array is not batched.

        Size 1 needs arrays that broadcast against the first one (`first_is_full`). Without that, and if not all arrays
        are batched, `jax.vmap` maps the plain function.
        """
        if None in dims and not self.first_is_full:
            out = jax.vmap(partial(self.plain, axes=axes), in_axes=tuple(dims))(*arrays)
            return out, (0,) * len(out)
        size = next(v.shape[d] for v, d in zip(arrays, dims, strict=True) if d is not None)
        first, *rest = (v[None] if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(arrays, dims, strict=True))
        if dims[0] is None:
            first = jnp.broadcast_to(first, (size, *first.shape[1:]))
        out = self(first, *rest, axes=tuple(a + 1 for a in axes))
        return out, (0,) * len(out)

    def _jet(self, primals, terms, *, axes):
        # `checkpoint_name` is the identity, so that its result has the Taylor series of its argument. Whatever we name
        # was computed from a result of these functions, so that the rule is added in time without an import.
        jet.jet_rules.setdefault(name_p, lambda primals, terms, **params: (*primals, *terms))
        return jet.jet(partial(self.taylor, axes=axes), primals, terms, factorial_scaled=False)


@functools.cache
def _shared(rule, static=("axes",), shardings=None):
    """The lowering of a function that all layers of one shape share in a program, which makes it half as long.

    If the shardings of the results are given, the function is traced without explicit sharding.
    """

    def without_explicit_sharding(*arrays, **options):
        return jax.sharding.auto_axes(partial(rule, **options), out_sharding=shardings)(*arrays)

    traced = rule if shardings is None else without_explicit_sharding
    return mlir.lower_fun(jax.jit(traced, static_argnames=static), multiple_results=True)


def _lower(one, several, others, context, *arrays, axes):
    where = context.module_context.axis_context
    if _on_one_device(where):
        return one(context, *arrays, axes=axes)
    if several is None or not isinstance(where, mlir.ShardingContext):
        return others(context, *arrays, axes=axes)
    # Under explicit sharding a slice or a reshape of a divided axis is an error, which it is not for the compiler.
    explicit = any(jax.sharding.AxisType.Explicit in v.sharding.mesh.axis_types for v in context.avals_in)
    shardings = tuple(v.sharding for v in context.avals_out) if explicit else None
    lowering = _shared(several, ("axes", "devices"), shardings)
    return lowering(context, *arrays, axes=axes, devices=where.num_devices)


def transpose_each_other(first: PlatformFunction, second: PlatformFunction) -> None:
    """Make each of two functions the transpose of the other; they share the arguments in which they are not linear."""
    for function, transposed in (first, second), (second, first):
        if function.primitive is not None:
            ad.primitive_transposes[function.primitive] = partial(_transpose, function.linear, transposed)


def _transpose(linear, transposed, cotangents, *arguments, axes):
    results = transposed(*map(ad.instantiate_zeros, cotangents), *arguments[linear:], axes=axes)
    wanted = [ct if ad.is_undefined_primal(v) else None for v, ct in zip(arguments[:linear], results, strict=True)]
    return wanted + [None] * (len(arguments) - linear)


def _on_one_device(context):
    """Whether the arrays being lowered are on one device: the only one, or each device's own part of a shard_map."""
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    return isinstance(context, mlir.SPMDAxisContext) and context.manual_axes == frozenset(context.mesh.axis_names)


def mesh_axes() -> frozenset[Hashable]:
    """The mesh axes that `shard_map` or `pmap` maps where this is called."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def is_traced(value: Any) -> bool:
    """Whether a value is traced by a transformation of JAX, so that Python does not know its numbers."""
    return isinstance(value, Tracer)
