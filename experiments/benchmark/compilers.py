"""JAX's compilers for TPUs and GPUs that this machine does not have, which need only a description of the device.

libtpu contains the compiler for TPUs, the CUDA plugin and its PJRT library the compiler for GPUs. Neither needs the
device or NVIDIA's libraries. A process compiles for one target, and its environment must be set before JAX starts.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness.data import InputError

H100 = Path(__file__).with_name("h100.textproto")
"""file of a GpuTargetConfigProto, which describes the device to the compiler"""


@dataclass(frozen=True)
class Target:
    """A target of the compiler; `topology` is its name there."""

    platform: str
    topology: str

    @property
    def module(self) -> str:
        """The package that contains the compiler."""
        return {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}[self.platform]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a process that compiles for the target."""
        shared = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
        if self.platform == "tpu":
            # Several processes may load libtpu at once, because none of them opens a TPU.
            return shared | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        return shared | {
            "CUDA_VISIBLE_DEVICES": "-1",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # autotuning would need the device
        }


TARGETS = {
    "v5e": Target("tpu", "v5e:2x2"),
    "v6e": Target("tpu", "v6e:2x2"),
    "tpu7x": Target("tpu", "tpu7x:2x2x1"),
    "v5e-64": Target("tpu", "v5e:8x8"),
    "v5e-256": Target("tpu", "v5e:16x16"),
    "h100": Target("cuda", "1x1x1"),
    "h100-8": Target("cuda", "1x8x1"),
}
"""Names of targets: four chips of TPU v5e and v6e and of TPU7x (with two cores each), 64 and 256 chips of TPU v5e, one
H100, eight."""


def target(name: str) -> Target:
    """The target of that name.

    Raises:
      InputError: if there is none.
    """
    if name not in TARGETS:
        raise InputError(f"targets={name}: no compiler knows it. Expected some of {', '.join(TARGETS)}.")
    return TARGETS[name]


def installed(names: tuple[str, ...]) -> list[str]:
    """The targets whose compiler is installed."""
    return [name for name in names if importlib.util.find_spec(target(name).module)]


def lines(name: str, *arguments: str) -> Iterator[str]:
    """The lines printed by a Python process with these arguments, which can compile for the target.

    Raises:
      InputError: if the process fails, with the end of what it wrote to its standard error.
    """
    command = [sys.executable, *arguments]
    # Standard error goes to a file: the compilers' log would fill a pipe that is not read, and block the process.
    with tempfile.TemporaryFile("w+") as log:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen(command, env=target(name).environment, **pipes) as process:
            assert process.stdout is not None
            yield from process.stdout
        if process.returncode:
            log.seek(0)
            raise InputError(f"{name}: the compiler stopped. {log.read().strip()[-2000:]}")


def mesh(name: str) -> Any:
    """All devices of the target as a mesh of one axis, "data", in a process that `lines` started."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    found = target(name)
    if found.platform == "cuda":
        options = {"target_config": H100.read_text(), "topology": found.topology}
    else:
        options = {"topology_name": found.topology}
    devices = topologies.get_topology_desc(platform=found.platform, **options).devices
    jax.config.update("jax_platforms", "cpu")
    return jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
