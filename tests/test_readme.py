"""The README's code blocks run, their own assertions included."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
MATCHES = list(re.finditer(r"```python\n(.*?)```", README, re.DOTALL))
BLOCKS = {f"line_{README.count(chr(10), 0, m.start()) + 1}": m[1] for m in MATCHES}


@pytest.mark.parametrize("name", BLOCKS)
def test_readme_block_runs(name):
    # As a user has it: with JAX's own promotion of dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(BLOCKS[name], f"README.md {name}", "exec"), {})
