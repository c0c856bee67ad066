"""What a program over several devices allows: meshes that differ, an export, and a cache that other processes find."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax

STEP = """
import jax, numpy as np, bnjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
params, state = jax.device_put(bnjax.bn_init(4), NamedSharding(mesh, P()))
x = jax.device_put(np.ones((64, 4), "f"), NamedSharding(mesh, P("data")))
hits.clear()
jax.block_until_ready(jax.jit(lambda params, state, x: bnjax.bn_apply(params, state, x, True))(params, state, x))
print(len(hits))
"""


def test_arguments_on_two_meshes_and_an_export_give_the_numbers_of_one_device(rng):
    x = rng.standard_normal((64, 4)).astype(np.float32) + 5
    params, state = bnjax.bn_init(4)
    f = jax.jit(lambda state, x: bnjax.bn_apply(params, state, x, True)[1])
    want = f(state, x)
    one = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    other = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    there = jax.device_put(state, NamedSharding(other, P())), jax.device_put(x, NamedSharding(one, P("data")))
    restored = jax.export.deserialize(jax.export.export(f)(*there).serialize())
    for found in f(*there), jax.jit(restored.call)(*there):
        for got, expected in zip(found, want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_same_program_is_compiled_once_by_two_processes(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    found = [
        subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert [int(text.split()[-1]) for text in found] == [0, 1]
