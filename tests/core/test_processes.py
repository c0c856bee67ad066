"""Training over several processes gives the numbers of one, and ends in bounded time with a message if one is lost."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.harness import records
from experiments.harness.data import InputError
from experiments.harness.runtime import Runtime

FLAGS = shlex.split("train --steps 40 --seeds 2 --eval-every 10 --hidden 16 --batch-size 50 --checkpoint-every 5")
ENVIRONMENT = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")
TIMEOUT = 8


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def start(tmp_path_factory):
    """Starts a process of a run; none outlives the test."""
    started = []
    # What one test has compiled no other needs to: most of the time is spent on that.
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def start(address, process, *flags):
        where = ["--coordinator", address, "--num-processes", "2", "--process-id", process]
        words = [*FLAGS, *where, "--process-timeout", TIMEOUT, *flags]
        command = [sys.executable, "-m", "experiments", *map(str, words)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=ENVIRONMENT | compiled, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    """Exit status, output and messages."""
    output, messages = process.communicate(timeout=120)
    return process.returncode, output, messages


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    assert main([*FLAGS, "--devices", "1", "--out", str(out)]) == 0
    return out / "train" / "metrics.jsonl"


def assert_same_metrics(folder, one_process):
    many = records.read_metrics(folder)
    for network, one in records.read_metrics(one_process.parent).items():
        np.testing.assert_array_equal(many[network].steps, one.steps)
        np.testing.assert_allclose(many[network]["test_accuracy"], one["test_accuracy"], atol=2.1 / 360)
    losses = [
        [record["loss"] for record in map(json.loads, path.read_text().splitlines()) if record["step"]]
        for path in (folder / "metrics.jsonl", one_process)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(start, one_process, tmp_path):
    address = free_address()
    running = [start(address, i, "--out", tmp_path) for i in (0, 1)]
    ended = [finish(process) for process in running]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "final test accuracy" in ended[0][1]
    assert "final test accuracy" not in ended[1][1]
    assert "error" not in ended[0][2] + ended[1][2]
    assert records.read_config(tmp_path / "train")["processes"] == 2
    assert_same_metrics(tmp_path / "train", one_process)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "sent"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_stops_the_other_with_a_message(victim, sent, start, one_process, tmp_path):
    address = free_address()
    flags = ["--out", tmp_path, "--checkpoint-dir", tmp_path / "saved", "--parallel", "shard_map"]
    running = [start(address, i, *flags) for i in (0, 1)]
    while not list(tmp_path.glob("saved/train/plain/*/sha256.json")):
        assert all(process.poll() is None for process in running), [finish(process) for process in running]
        time.sleep(0.01)
    running[victim].send_signal(sent)
    lost = time.monotonic()
    status, _, messages = finish(running[1 - victim])
    assert time.monotonic() - lost < 3 * TIMEOUT
    assert status not in (0, 2)
    assert messages.splitlines()[-1] == (
        f"error: process {1 - victim} of 2 stopped before the end: by an error shown above, or because another process "
        f"stopped or gave no sign of life for {TIMEOUT} s. Run the same commands again: they go on from "
        f"{tmp_path / 'saved'}."
    )
    if (victim, sent) == (1, signal.SIGKILL):
        address = free_address()
        assert [finish(process)[0] for process in [start(address, i, *flags) for i in (0, 1)]] == [0, 0]
        assert_same_metrics(tmp_path / "train", one_process)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_peer_is_absent_stops_with_a_message(process, start, tmp_path):
    address = free_address()
    begun = time.monotonic()
    status, _, messages = finish(start(address, process, "--out", tmp_path))
    assert time.monotonic() - begun < 5 * TIMEOUT
    assert status not in (0, 2)
    missing = f"no answer from {address}" if process else f"not all of the 2 processes came to this one at {address}"
    assert messages.splitlines()[-1].startswith(f"error: {missing}")
    assert f"within process_timeout={TIMEOUT} s" in messages
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(start, tmp_path):
    address = free_address()
    running = [start(address, i, "--out", tmp_path, "--learning-rate", 1 + i) for i in (0, 1)]
    for status, _, messages in [finish(process) for process in running]:
        assert status != 0
        assert "The processes of this run have different configurations or data" in messages
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_automatic_detection_without_a_cluster_is_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments", *FLAGS, "--distributed", "--out", str(tmp_path)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: coordinator=None, num_processes=None, process_id=None, distributed=True: JAX could")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "a:1"}, "coordinator=a:1: expected coordinator, num_processes and process_id together"),
        ({"num_processes": 2, "process_id": 0}, "num_processes=2, process_id=0: expected coordinator"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator=a: expected HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id=2: expected 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "process_id=-1: expected 0 to 1"),
    ],
)
def test_runtime_rejects_settings_that_do_not_fit(settings, message):
    with pytest.raises(InputError, match=message):
        Runtime(**settings)
