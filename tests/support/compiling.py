"""Compiling quickly: nearly all of the suite's time goes to it."""

import contextlib

import jax
import pytest
from jax._src import compiler

QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "True",
    "xla_cpu_use_fusion_emitters": "False",
}


@contextlib.contextmanager
def unoptimized():
    """Half of the time to compile a small program goes to LLVM's passes and to the emitters of fusions.

    The precision is the default one by another name. JAX's caches tell it apart, but not the options: without it a
    function that was compiled before would stay as it was compiled.
    """
    compile_options = compiler.get_compile_options

    def quick(*args, env_options_overrides=None, **options):
        return compile_options(*args, env_options_overrides={**(env_options_overrides or {}), **QUICK}, **options)

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
