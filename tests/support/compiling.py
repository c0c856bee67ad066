"""Compiling quickly: nearly all of the suite's time goes to it."""

import contextlib
import functools
import re
from collections import Counter

import jax
import pytest

try:
    from jax._src import compiler
except ImportError:  # a private module: without it tests compile as users do, in twice the time
    compiler = None

QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "True",
    "xla_cpu_use_fusion_emitters": "False",
}


@functools.cache
def quick_options():
    """Of the options the ones that this release of XLA has; a program with any other does not compile."""

    def exists(name):
        try:
            jax.jit(lambda x: x, compiler_options={name: QUICK[name]}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in QUICK.items() if exists(name)}


@contextlib.contextmanager
def unoptimized():
    """Half of the time to compile a small program goes to LLVM's passes and to the emitters of fusions.

    The precision is the default one by another name. JAX's caches tell it apart, but not the options: without it a
    function that was compiled before would stay as it was compiled.
    """
    compile_options = getattr(compiler, "get_compile_options", None)
    if compile_options is None:
        yield
        return

    def quick(*args, env_options_overrides=None, **options):
        return compile_options(*args, env_options_overrides={**(env_options_overrides or {}), **found}, **options)

    found = quick_options()
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("default"):
        patch.setattr(compiler, "get_compile_options", quick)
        yield


def compilations(call):
    """How many programs a call compiles."""
    events = []

    def record(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    return len(events)


def executed(text, names):
    """How often a StableHLO program has operations of these names, those of a function once for each of its calls."""
    pieces = re.split(r"^  func\.func [^@]*@([\w.]+)\(", text, flags=re.MULTILINE)
    bodies = dict(zip(pieces[1::2], pieces[2::2], strict=True))

    @functools.cache
    def counts(function):
        total = Counter(re.findall(r"stablehlo\.(\w+)", bodies[function]))
        for called in re.findall(r"call @([\w.]+)\(", bodies[function]):
            total.update(counts(called))
        return total

    return {name: counts("main")[name] for name in names}
