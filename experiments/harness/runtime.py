"""The devices and processes of an experiment, and the end of a process.

The processes form JAX's distributed runtime: process 0 is the coordinator, all run the same program, and each has a
shard of every batch. If one stops, none can continue. JAX then ends the others by abort() in C++, which Python cannot
catch. Therefore a child process, which outlives them, is told in advance what to print at the end.
"""

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.harness.data import InputError

AXIS = "data"
"""The axis of the mesh along which batches are sharded."""
RUNS = "runs"
"""The axis of the mesh along which independent runs are divided."""


@dataclass(frozen=True)
class Runtime:
    """Devices, processes and checkpoints of a run. They change its result only by rounding."""

    parallel: Literal["jit", "shard_map"] = "jit"
    """how a batch is sharded over the devices: by the compiler, or by shard_map and a named axis"""
    devices: int | None = None
    """number of devices to use in each process; by default all"""
    platform: Literal["cpu"] | None = None
    """platform of the devices; by default the best that JAX finds"""
    checkpoint_dir: Path | None = None
    """folder for checkpoints, from which a stopped run continues; all processes must share it"""
    checkpoint_every: int = 1000
    """steps between checkpoints; the last step has one too"""
    checkpoint_keep: int = 3
    """number of newest checkpoints to keep"""
    coordinator: str | None = None
    """HOST:PORT at which all processes reach process 0"""
    num_processes: int | None = None
    """number of processes of the run"""
    process_id: int | None = None
    """number of this process, from 0"""
    distributed: bool = False
    """take coordinator, num_processes and process_id, unless given, from SLURM, Kubernetes, MPI or a TPU pod"""
    process_timeout: int = 60
    """seconds to wait for the other processes at the start, and for their heartbeats later"""

    def __post_init__(self) -> None:
        for name in ("devices", "checkpoint_every", "checkpoint_keep", "num_processes", "process_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name}={value}: expected a positive number.")
        given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(self, name) is not None]
        if given and len(given) < 3 and not self.distributed:
            raise InputError(
                f"{', '.join(f'{name}={getattr(self, name)}' for name in given)}: expected coordinator, num_processes "
                "and process_id together, or distributed, which finds out the others."
            )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise InputError(f"coordinator={self.coordinator}: expected HOST:PORT.")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or np.inf):
            raise InputError(
                f"process_id={self.process_id}: expected 0 to {(self.num_processes or np.inf) - 1}, "
                f"as num_processes={self.num_processes}."
            )

    def start(self) -> None:
        """Join the other processes, if there are any. It must run before any JAX computation.

        Raises:
          InputError: if no cluster is found, or process 0 cannot listen at the coordinator's port.
        """
        if not self.distributed and self.coordinator is None:
            return
        if self.process_id == 0:
            missing = f"not all of the {self.num_processes} processes came to this one at {self.coordinator}"
        else:
            missing = f"no answer from {self.coordinator or 'the coordinator'}, or not all processes came to it,"
        _last_words(
            f"error: {missing} within process_timeout={self.process_timeout} s. Start every process, process 0 on the "
            "coordinator's host, with one coordinator, num_processes and program, and let nothing block its port."
        )
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.num_processes,
                self.process_id,
                initialization_timeout=self.process_timeout,
                heartbeat_timeout_seconds=self.process_timeout,
                shutdown_timeout_seconds=self.process_timeout,
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"coordinator={self.coordinator}, num_processes={self.num_processes}, process_id={self.process_id}, "
                f"distributed={self.distributed}: JAX could not start ({error}). Pass the first three, process 0 on "
                "the coordinator's host and at a free port, or start under SLURM, Kubernetes, MPI or on a TPU pod."
            ) from error
        resume = f"go on from {self.checkpoint_dir}" if self.checkpoint_dir else "start anew (no checkpoint_dir is set)"
        _last_words(
            f"error: process {jax.process_index()} of {jax.process_count()} stopped before the end: by an error shown "
            f"above, or because another process stopped or gave no sign of life for {self.process_timeout} s. "
            f"Run the same commands again: they {resume}."
        )

    def mesh(self) -> Mesh:
        """The used devices of all processes, as a mesh of one axis.

        Raises:
          InputError: if a process has fewer devices than `devices`.
        """
        devices = []
        for process in range(jax.process_count()):
            local = jax.local_devices(process_index=process, backend=self.platform)
            if len(local) < (self.devices or 0):
                raise InputError(f"devices={self.devices}: expected at most {len(local)}, those of process {process}.")
            devices += local[: self.devices]
        return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


SEVERAL = 4
"""The number of devices of experiments on synchronized statistics."""


def provide_devices() -> None:
    """Divide the CPU into devices for JAX, one for each core and at least `SEVERAL`, unless it is in use or a number is
    set."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX is in use already
            jax.config.update("jax_num_cpu_devices", max(SEVERAL, os.cpu_count() or 1))


def runs_mesh() -> Mesh:
    """The local devices, of which the CPU has at most one for each core, as a mesh that runs are divided over."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        devices = devices[: os.cpu_count()]
    return jax.make_mesh((len(devices),), (RUNS,), axis_types=(AxisType.Auto,), devices=devices)


def several(parallel: Literal["jit", "shard_map"]) -> Runtime:
    """A runtime of `SEVERAL` devices, of the CPU if the default platform has fewer.

    Raises:
      InputError: if the CPU was in use before `provide_devices`, or has been set to fewer devices.
    """
    enough = jax.local_device_count() >= SEVERAL
    if not enough and jax.local_device_count("cpu") < SEVERAL:
        raise InputError(f"{jax.local_device_count('cpu')} CPU devices: expected {SEVERAL}. Set jax_num_cpu_devices.")
    return Runtime(parallel, devices=SEVERAL, platform=None if enough else "cpu")


def put(array: np.ndarray, mesh: Mesh, *spec: str | None) -> Array:
    """An array, which every process has completely, sharded over the mesh by `spec`, as in `PartitionSpec`."""
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def is_primary() -> bool:
    """Whether this process writes results and prints."""
    return jax.process_index() == 0


def same_everywhere(value: bytes) -> bool:
    """Whether all processes have the same value. Its length must be the same in all."""
    everyone = multihost_utils.process_allgather(np.frombuffer(value, np.uint8))
    return bool((np.reshape(everyone, (jax.process_count(), -1)) == np.frombuffer(value, np.uint8)).all())


def exit_with(main: Callable[[], int]) -> NoReturn:
    """End the program with main's status. If one of several processes fails, it does not wait for the others."""
    try:
        status = main()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)
    if jax.distributed.is_initialized():
        if status:
            _last_words("")  # main has printed the reason
            _leave(status)
        jax.distributed.shutdown()
    _last_words("")
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_SPEAKER = "import sys; *_, last = sys.stdin.read().split('\\n')[:-1]; last and print(last, file=sys.stderr)"
_speaker: subprocess.Popen[str] | None = None


def _last_words(line: str) -> None:
    """Set the line that is printed to stderr when this process ends in any way; an empty line prints nothing."""
    global _speaker
    if _speaker is None:
        if not line:
            return
        # A new session: otherwise an interrupt from the keyboard would end the child as well, before it prints.
        _speaker = subprocess.Popen(
            [sys.executable, "-c", _SPEAKER], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
    assert _speaker.stdin is not None
    _speaker.stdin.write(line + "\n")
    _speaker.stdin.flush()
