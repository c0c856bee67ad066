"""The Python blocks of Markdown pages, to be run as a reader would run them."""

import re
import textwrap
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).parents[2]
OTHERS = ("torch", "keras", "haiku", "equinox")  # libraries that the extra `oracles` installs
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^(?P<indent>[ ]*)```python\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


_IMPORT = re.compile(rf"^import ({'|'.join(OTHERS)})\b", re.M)


def program(text: str) -> str:
    """All Python blocks of a page as one program, each on the lines on which the page has it."""
    lines: list[str] = []
    for match in _BLOCK.finditer(text):
        lines += [""] * (text.count("\n", 0, match.start("code")) - len(lines))
        lines += textwrap.dedent(match["code"]).rstrip("\n").split("\n")
    return "\n".join(lines) + "\n" if lines else ""


def pages(*, others: bool = False) -> dict[str, str]:
    """The program of each page that has one, by the page's path; those which import `others`, or which do not."""
    programs = {str(path.relative_to(ROOT)): program(path.read_text(encoding="utf-8")) for path in PAGES}
    return {name: text for name, text in programs.items() if text and others == bool(_IMPORT.search(text))}


def run(name: str, text: str, folder: Path) -> dict[str, Any]:
    """The names that a page's program defines, run as a user has it: with JAX's promotion of dtypes and ranks."""
    names: dict[str, Any] = {"__name__": "page"}
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(folder)  # a block may write a file
        exec(compile(text, str(ROOT / name), "exec"), names)
    return names


def pytest_commands() -> list[str]:
    """The arguments of each `pytest` command that a page names as evidence."""
    texts = (path.read_text(encoding="utf-8") for path in PAGES)
    return sorted({arguments for text in texts for arguments in re.findall(r"`pytest ([^`]+)`", text)})
