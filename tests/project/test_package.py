"""What a user installs: the wheel's contents, and an import that needs neither flax nor anything of the extras."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What `pip install bnjax` does not bring.
EXTRAS = ("flax", "optax", "chex", "sklearn", "matplotlib", "tqdm", "tyro", "hypothesis", "pytest")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]  # with the hatchling that is here
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, ROOT], check=True)
    (path,) = folder.glob("bnjax-*.whl")
    return path


def test_the_wheel_holds_the_package_its_types_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "bnjax").rglob("*.py")}
    assert modules | {"bnjax/py.typed"} == {name for name in names if name.startswith("bnjax/")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "experiments"))]


def test_the_wheel_imports_without_flax(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # None: importing one of them is an ImportError
sys.path.insert(0, {str(tmp_path)!r})
import bnjax
assert bnjax.__file__.startswith({str(tmp_path)!r}), bnjax.__file__
y, state = bnjax.bn_apply(*bnjax.bn_init(2), __import__("numpy").ones((3, 2), "f"), True)
print(bnjax.__version__, float(y.sum()), int(state.count[0]))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == [wheel.name.split("-")[1], "0.0", "1"]
