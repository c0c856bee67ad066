"""Where an experiment runs: its devices, the processes it is spread over, and how a process of several ends.

The processes are those of JAX's own distributed runtime: process 0 is the coordinator, all run the same program, and
each holds a part of every batch. If one stops, none can go on. JAX then ends the others by abort() from C++, past
anything that Python could catch, so what is to be said at the end is told in advance to a child that outlives them.
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
"""The one axis of the mesh, along which a batch is divided."""


@dataclass(frozen=True)
class Runtime:
    """Devices, processes and checkpoints of a run; nothing here changes its result by more than rounding."""

    parallel: Literal["jit", "shard_map"] = "jit"
    """how a batch is divided over the devices: by the compiler, or by shard_map and a named axis"""
    devices: int | None = None
    """devices to use of each process, by default all"""
    platform: Literal["cpu"] | None = None
    """of the devices; by default the best that JAX finds"""
    checkpoint_dir: Path | None = None
    """folder for checkpoints, from which a stopped run goes on; shared by all processes"""
    checkpoint_every: int = 1000
    """steps between checkpoints; the last step has one too"""
    checkpoint_keep: int = 3
    """newest checkpoints to keep"""
    coordinator: str | None = None
    """HOST:PORT where process 0 is reached by all others"""
    num_processes: int | None = None
    """processes that the run is spread over"""
    process_id: int | None = None
    """number of this process, from 0"""
    distributed: bool = False
    """find out coordinator, num_processes and process_id, where not given, from SLURM, Kubernetes, MPI or a TPU pod"""
    process_timeout: int = 60
    """seconds to wait for the other processes at the start, and for a sign of life later, before giving up"""

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
        """Join the other processes, if there are to be any; before any JAX computation.

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
        """The devices in use, of all processes, along one axis.

        Raises:
          InputError: if a process has fewer devices than asked for.
        """
        devices = []
        for process in range(jax.process_count()):
            local = jax.local_devices(process_index=process, backend=self.platform)
            if len(local) < (self.devices or 0):
                raise InputError(f"devices={self.devices}: expected at most {len(local)}, those of process {process}.")
            devices += local[: self.devices]
        return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


SEVERAL = 4
"""Devices that experiments on synchronized statistics compute on."""


def provide_devices() -> None:
    """Let the CPU be `SEVERAL` devices to JAX, if it is not used yet and no number is set."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # it is in use
            jax.config.update("jax_num_cpu_devices", SEVERAL)


def several(parallel: Literal["jit", "shard_map"]) -> Runtime:
    """`SEVERAL` devices: those of the CPU, where there are fewer of a better kind.

    Raises:
      InputError: if the CPU was in use before `provide_devices`, or is set to be fewer devices.
    """
    enough = jax.local_device_count() >= SEVERAL
    if not enough and jax.local_device_count("cpu") < SEVERAL:
        raise InputError(f"{jax.local_device_count('cpu')} CPU devices: expected {SEVERAL}. Set jax_num_cpu_devices.")
    return Runtime(parallel, devices=SEVERAL, platform=None if enough else "cpu")


def put(array: np.ndarray, mesh: Mesh, *spec: str | None) -> Array:
    """An array which every process has whole, divided over the mesh along the axes with a name, else replicated."""
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def is_primary() -> bool:
    """Whether this process is the one that writes results and speaks to the user."""
    return jax.process_index() == 0


def same_everywhere(value: bytes) -> bool:
    """Whether all processes have this value, of one length."""
    everyone = multihost_utils.process_allgather(np.frombuffer(value, np.uint8))
    return bool((np.reshape(everyone, (jax.process_count(), -1)) == np.frombuffer(value, np.uint8)).all())


def exit_with(main: Callable[[], int]) -> NoReturn:
    """End the program with main's status. A process of several that fails does not wait for the others to end."""
    try:
        status = main()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)
    if jax.distributed.is_initialized():
        if status:
            _last_words("")  # main has said why
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
    """What is to stand on stderr if this process ends from now on, however it ends; nothing if empty."""
    global _speaker
    if _speaker is None:
        if not line:
            return
        # In a session of its own, so that an interrupt from the keyboard ends this process and not its speaker.
        _speaker = subprocess.Popen(
            [sys.executable, "-c", _SPEAKER], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
    assert _speaker.stdin is not None
    _speaker.stdin.write(line + "\n")
    _speaker.stdin.flush()
