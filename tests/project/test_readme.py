"""The README's code blocks run, their own assertions included, and so do its commands for several machines."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MATCHES = list(re.finditer(r"```python\n(.*?)```", README, re.DOTALL))
BLOCKS = {f"line_{README.count(chr(10), 0, m.start()) + 1}": m[1] for m in MATCHES}


@pytest.mark.parametrize("name", BLOCKS)
def test_readme_block_runs(name):
    # As a user has it: with JAX's own promotion of dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(BLOCKS[name], f"README.md {name}", "exec"), {})


def test_readme_commands_for_two_machines_run(tmp_path):
    section = README.partition("### Many processes")[2].partition("###")[0]
    commands = re.findall(r"^\.venv/bin/python (-m experiments .*)$", section, re.MULTILINE)
    assert len(commands) == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    small = f" --steps 4 --eval-every 4 --seeds 1 --hidden 8 --out {tmp_path / 'out'}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    running = []
    for command in commands:
        local = command.replace("10.0.0.1:1234", address).replace("/shared", str(tmp_path)) + small
        running.append(subprocess.Popen([sys.executable, *shlex.split(local)], env=environment, cwd=ROOT))
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert (tmp_path / "run").is_dir()
    assert (tmp_path / "out" / "convergence" / "metrics.jsonl").is_file()
