"""The results of `device` as they are measured, and the clocks that the driver of an NVIDIA GPU reports meanwhile.

A device may be available for only a few minutes. Results are therefore written after each measurement, a measurement
that fails does not end the others, and what exceeds the time limit is named in the results.
"""

import json
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

DRIVER = ("name", "driver_version", "memory.total", "power.limit")
"""facts that nvidia-smi reports once"""
READINGS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu")
"""what nvidia-smi reports in the course of a run: MHz, MHz, degrees Celsius, watts, per cent"""
INTERVAL = 2.0  # seconds between two readings


def driver(fields: tuple[str, ...]) -> dict[str, str] | None:
    """Fields that nvidia-smi reports of the first GPU; None where there is no such program or GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    values = answer.splitlines()[0].split(", ") if answer else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


class Record:
    """The results, in a file that is rewritten after each change, and the time that is left.

    Args:
      path: the file. Parts that an earlier run left in it stay until they are measured again.
      limit_seconds: the time after which `late` is true.
    """

    def __init__(self, path: Path, limit_seconds: float):
        self.path, self.limit = path, limit_seconds
        self.begun = time.perf_counter()
        self.part = "start"
        self.results: dict[str, Any] = {"parts": {}, "left_out": {}, "clocks": {}}
        if path.is_file():
            self.results |= json.loads(path.read_text())
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read_clocks, daemon=True)

    def __enter__(self) -> "Record":
        self._sample()
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._reader.join()
        self.part = "end"
        self._sample()
        self.write()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.begun

    def say(self, text: str) -> None:
        """Print a line about the progress."""
        print(f"{self.seconds:6.1f} s  {text}", flush=True)

    def begin(self, part: str) -> None:
        """Begin a part, and forget what an earlier run left of it."""
        self.part = part
        self.results["parts"].pop(part, None)
        self.results["clocks"].pop(part, None)
        for name in [name for name in self.results["left_out"] if name.partition(":")[0] == part]:
            del self.results["left_out"][name]
        self._sample()
        self.say(part)

    def keep(self, entry: Mapping[str, Any]) -> None:
        """Add an entry to the part, and write the file."""
        self.results["parts"].setdefault(self.part, []).append(dict(entry))
        self.write()

    def leave_out(self, name: str, reason: str) -> None:
        """Name what was not measured, and why."""
        self.results["left_out"][f"{self.part}: {name}"] = reason
        self.say(f"left out: {self.part}: {name}: {reason}")
        self.write()

    def late(self, name: str) -> bool:
        """Whether the time is up; the name of what is next is then left out."""
        if self.seconds > self.limit:
            self.leave_out(name, f"the limit of {self.limit:g} s")
            return True
        return False

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a call; None if it is late or fails, which is recorded."""
        if self.late(name):
            return None
        try:
            return call()
        except Exception as error:  # whatever it is, the measurements after it run
            traceback.print_exc()
            self.leave_out(name, f"{type(error).__name__}: {error}"[:500])
            return None

    def compiled(self, lowered: Mapping[Any, Any], threads: int) -> dict[Any, Any]:
        """The compiled programs, by name. Several are compiled at once; one that fails is left out."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            waiting = {name: pool.submit(program.compile) for name, program in lowered.items()}
        done = {name: self.attempt(f"compiling {name}", future.result) for name, future in waiting.items()}
        self.say(f"compiled {len(done)} programs in {time.perf_counter() - begun:.1f} s")
        return {name: program for name, program in done.items() if program is not None}

    def write(self) -> None:
        """Write the whole file."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.results, indent=1) + "\n")
        draft.replace(self.path)

    def _sample(self) -> bool:
        found = driver(READINGS)
        if found is not None:
            self.results["clocks"].setdefault(self.part, []).append({"seconds": round(self.seconds, 1), **found})
        return found is not None

    def _read_clocks(self):
        while not self._ended.wait(INTERVAL) and self._sample():
            pass


def times(calls: Mapping[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """The seconds of each call, with the calls in turn.

    A timing issues `repeats` calls, waits for the last one, and is divided by their number, so that the time to issue a
    call overlaps with the work of the call before it. A device does the work of one process in the order of issue.
    """
    for call in calls.values():
        for _ in range(3):
            jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            out = None
            for _ in range(repeats):
                out = call()
            jax.block_until_ready(out)
            seconds[name].append(round((time.perf_counter() - begun) / repeats, 9))
    return seconds


class Pending:
    """The results of PyTorch's call, which `jax.block_until_ready` can wait for."""

    def __init__(self, results: Any, wait: Callable[[], None]):
        self.results, self.block_until_ready = results, wait
