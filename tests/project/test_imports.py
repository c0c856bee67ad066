"""Imports run one way: a module imports only from the modules that its package lists above it."""

import ast
import re

import pytest

from tests.support.markdown import ROOT

PACKAGES = sorted(path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "bnjax").rglob("__init__.py"))
ROW = re.compile(r"^    ([a-z_]+(?:, [a-z_]+)*)  +\S", re.MULTILINE)  # "linen, nnx" are in one row


def listed(package):
    """The rows of names in the list of modules in a package's docstring."""
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text("utf-8")), clean=False) or ""
    return [row.split(", ") for row in ROW.findall(docstring)]


def imports(program):
    """The full paths of what a program imports, inside functions too."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def wrong(package, rows, module, program):
    """The imports of a module of the package that are neither from itself nor from a row above it."""
    (row,) = [i for i, names in enumerate(rows) if module in names]
    allowed = {module}.union(*rows[:row])
    inside = package.replace("/", ".")
    for path in imports(program):
        name = path.removeprefix(f"{inside}.").partition(".")[0]
        if path.startswith(".") or path == inside or (path.startswith(f"{inside}.") and name not in allowed):
            yield path


@pytest.mark.parametrize("package", [package for package in PACKAGES if listed(package)])
def test_modules_import_from_those_listed_above_them(package):
    rows = listed(package)
    files = [path for path in (ROOT / package).rglob("*.py") if path != ROOT / package / "__init__.py"]
    modules = {path: path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in files}
    assert sorted(name for row in rows for name in row) == sorted(set(modules.values()))
    found = {str(path): list(wrong(package, rows, name, path.read_text("utf-8"))) for path, name in modules.items()}
    assert {path: paths for path, paths in found.items() if paths} == {}


def test_the_tour_has_the_order_of_the_docstrings():
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| (`bnjax/.*?`) \|", tour, re.MULTILINE)
    assert [re.findall(r"bnjax/(\w+)", row) for row in rooms] == listed("bnjax")
    core = tour.partition("### Inside `core`")[2].partition("\n## ")[0]
    assert [[name] for name in re.findall(r"^\| `(\w+)` \|", core, re.MULTILINE)] == listed("bnjax/core")


def test_an_import_from_below_is_found():
    rows = [["limits"], ["plot", "report"], ["measure"]]
    program = """
import bnjax.p.limits, bnjax.q.measure
from bnjax.p import limits, measure
def f():
    from bnjax.p.plot import draw
    from . import limits
"""
    assert list(wrong("bnjax/p", rows, "report", program)) == ["bnjax.p.measure", "bnjax.p.plot.draw", "..limits"]
    assert list(wrong("bnjax/p", rows, "measure", "from bnjax.p.report import Finding")) == []
    assert list(wrong("bnjax/p", rows, "measure", "from bnjax import p")) == ["bnjax.p"]
