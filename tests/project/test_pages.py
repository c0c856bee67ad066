"""The Python blocks of README and documentation run, their assertions included, and so do the commands for machines.

All blocks of a page run in order, in one namespace that the page has for itself. Pages that import another library run
in `tests/oracles/test_pages.py`.
"""

import os
import re
import shlex
import socket
import subprocess
import sys

import pytest

from tests.support import markdown
from tests.support.markdown import ROOT


@pytest.mark.parametrize(("name", "program"), [pytest.param(*page, id=page[0]) for page in markdown.pages().items()])
def test_blocks_run(name, program, tmp_path, capsys):
    markdown.run(name, program, tmp_path)
    printed = capsys.readouterr().out
    for shown in re.findall(r"^It prints:\n\n```text\n(.*?)```", (ROOT / name).read_text("utf-8"), re.M | re.S):
        assert shown in printed


def test_a_page_is_one_program_with_the_lines_of_the_page():
    block = "```python\nx = 1\n```\n"
    text = f'# Page\n\n{block}\n=== "Tab"\n\n    ```python\n    if x:\n        y = x\n    ```\n'
    program = markdown.program(text)
    assert program.split("\n").index("if x:") == text.split("\n").index("    if x:")
    assert program.count("x = 1") == 1
    assert markdown.program("# Page") == ""


def test_each_page_runs_here_or_beside_the_other_libraries():
    here, there = markdown.pages(), markdown.pages(others=True)
    assert {"docs/coming-from/own-class.md", "docs/guides/interop.md"} <= set(here)
    assert set(there) == {f"docs/coming-from/{name}.md" for name in ("jax", "keras", "pytorch")}


@pytest.mark.slow
def test_the_commands_for_two_machines_run(tmp_path):
    page = (ROOT / "docs" / "guides" / "devices.md").read_text(encoding="utf-8")
    section = page.partition("<!-- commands: two machines -->")[2].partition("```\n")[0]
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
    assert (tmp_path / "out" / "train" / "metrics.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", markdown.pytest_commands())
def test_a_pytest_command_on_a_page_selects_tests(arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *shlex.split(arguments)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-300:]  # pytest returns 5 where it selects none
