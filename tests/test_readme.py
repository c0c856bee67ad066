"""The README's code blocks run, and what they claim in comments holds."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = {
    f"line_{README[: m.start()].count(chr(10)) + 1}": m[1]
    for m in re.finditer(r"```python\n(.*?)```", README, re.DOTALL)
}


@pytest.mark.parametrize("name", BLOCKS)
def test_readme_block_runs(name):
    # As a user has it: with JAX's own promotion of dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(BLOCKS[name], f"README.md {name}", "exec"), {})
