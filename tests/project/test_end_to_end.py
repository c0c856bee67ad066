"""The scripts of docs/end-to-end, run as a reader runs them, and the pages and notebooks that are made of them."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from docs.tools import scripts
from tests.support import markdown

FOLDER = markdown.ROOT / "docs" / "end-to-end"
NAMES = ("linen", "nnx")

SERVER = """
import sys
for name in ("bnjax", "flax", "optax", "orbax"):
    sys.modules[name] = None  # an import of it is an error
import jax.export, numpy as np
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
assert program.nr_devices == 1
for size in (1, 7):
    answer = np.asarray(program.call(np.zeros((size, 8, 8, 1), np.float32)))
    assert answer.shape == (size, 10)
    np.testing.assert_allclose(answer.sum(1), 1, rtol=1e-5)
"""


def script(name):
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def run(folder, devices, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_in_an_empty_folder_and_goes_on_with_another_number_of_devices(name, tmp_path):
    shutil.copy(FOLDER / f"{name}.py", tmp_path)
    done = run(tmp_path, 8, f"{name}.py")
    assert "starting from the beginning\n" in done.stdout
    assert "Warning" not in done.stderr
    run(tmp_path, 1, "-c", SERVER, f"digits-{name}.bin")
    assert (
        done.stdout.replace("the beginning", "the checkpoint of step 100", 1) == run(tmp_path, 1, f"{name}.py").stdout
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_page_and_the_notebook_have_the_code_of_the_script(name):
    source = script(name)
    code = ast.dump(ast.parse(source))
    page = scripts.page(source, name)
    assert ast.dump(ast.parse(markdown.program(page))) == code
    assert re.match(rf"# End to end: \w+\n\nDownload: \[script\]\({name}\.py\).*\[notebook\]\({name}\.ipynb\)", page)
    made = json.loads(scripts.notebook(source))
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    cells = {kind: [cell for cell in made["cells"] if cell["cell_type"] == kind] for kind in ("code", "markdown")}
    assert ast.dump(ast.parse("\n".join(cell["source"] for cell in cells["code"]))) == code
    assert all(cell["source"] in page for cell in cells["code"])
    assert all(set(cell) == {"cell_type", "id", "metadata", "source"} for cell in cells["markdown"])
    keys = {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}
    assert all(set(cell) == keys for cell in cells["code"])
    ids = [cell["id"] for cell in made["cells"]]
    assert len(set(ids)) == len(ids) == source.count("# %%")


def test_a_script_is_divided_into_text_and_code():
    text = "# %% [markdown]\n# # Title\n#\n# See [here](../page.md) or [there](https://a.b).\n"
    source = f"{text}\n# %%\nx = 1  # %% no cell\n"
    title = "# Title\n\nSee [here](../page.md) or [there](https://a.b)."
    assert scripts.cells(source) == [(True, title), (False, "x = 1  # %% no cell")]
    assert "See [here](../page.md) or" in scripts.page(source, "a")
    text, code = (cell["source"] for cell in json.loads(scripts.notebook(source))["cells"])
    assert text == "# Title\n\nSee here or [there](https://a.b)."
    assert code == "x = 1  # %% no cell"


def test_code_before_the_first_cell_is_rejected():
    with pytest.raises(ValueError, match=r"a script begins with a cell.*'import jax"):
        scripts.cells("import jax\n# %%\nx = 1\n")
