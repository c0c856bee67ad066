"""The package that a user installs: the contents of the wheel and of the source distribution, and an import of the
wheel, which needs only jax and numpy."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Distributions that `pip install bnjax` does not install.
EXTRAS = ("flax", "optax", "chex", "sklearn", "matplotlib", "tqdm", "tyro", "hypothesis", "pytest")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]  # with the installed hatchling
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, ROOT], check=True)
    (path,) = folder.glob("bnjax-*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from hatchling import build; print(build.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=ROOT)
    (path,) = folder.glob("bnjax-*.tar.gz")
    return path


def package_files():
    """The files of the package in this checkout: its modules, and the marker of its types."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / "bnjax").rglob("*.py")} | {"bnjax/py.typed"}


def test_the_wheel_holds_the_package_its_types_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert package_files() == {name for name in names if name.startswith("bnjax/")}
    parts = {path.parent.name for path in (ROOT / "bnjax").glob("*/__init__.py")}
    assert {name.split("/")[1] for name in names if name.count("/") == 2 and name.startswith("bnjax/")} == parts
    others = {name for name in names if not name.startswith("bnjax/")}
    assert {name.partition("/")[2] for name in others} == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert len({name.partition("/")[0] for name in others}) == 1


def test_the_wheel_imports_without_flax(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # None: importing one of them is an ImportError
sys.path.insert(0, {str(tmp_path)!r})
import jax, numpy
before = set(sys.modules)
import bnjax
assert bnjax.__file__.startswith({str(tmp_path)!r}), bnjax.__file__
added = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert added - set(sys.stdlib_module_names) <= {{"bnjax", "jax", "jaxlib", "numpy", "ml_dtypes"}}, added
y, state = bnjax.bn_apply(*bnjax.bn_init(2), numpy.ones((3, 2), "f"), True)
print(bnjax.__version__, float(y.sum()), int(state.count[0]))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == [wheel.name.split("-")[1], "0.0", "1"]


@pytest.mark.slow
def test_the_source_distribution_holds_its_tests_and_what_they_read(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
    for folder in ("tests", "experiments", "docs"):
        wanted = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        left_out = {name for name in wanted - names if "__pycache__" not in name}
        assert {name for name in left_out if not name.startswith("experiments/results/")} == set()
    present = [
        *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
        *("constraints.txt", "mkdocs.yml", "pyproject.toml", ".ci/run"),
    ]
    assert {name for name in present if (ROOT / name).is_file()} <= names
    assert not {name for name in names if name.startswith((".venv", "dist", "results", "site", ".git/"))}


def test_the_versions_agree():
    """The citation names the version of the package, and the environments the bounds on jax that are tested."""
    version = next(
        line.split('"')[1] for line in (ROOT / "bnjax/__init__.py").read_text().splitlines() if "__version__" in line
    )
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax,) = (name for name in project["dependencies"] if name.startswith("jax"))
    oldest = jax.partition(">=")[2].partition(",")[0]
    assert f"OLDEST_JAX := {oldest}\n" in (ROOT / "Makefile").read_text()
