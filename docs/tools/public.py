"""The public names of the package, and which of them the API reference lacks."""

import re
from functools import cache
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
MODULES = ("bnjax", "bnjax.linen", "bnjax.nnx", "bnjax.interop", "bnjax.training", "bnjax.diagnosis")
"""Modules whose `__all__` is the public interface."""


@cache
def package() -> griffe.Module:
    """The package as Griffe reads it, without importing it."""
    loaded = griffe.load("bnjax", search_paths=[ROOT], submodules=True)
    assert isinstance(loaded, griffe.Module)
    return loaded


@cache
def names() -> frozenset[str]:
    """The public names, by full path."""
    found = set()
    for module in MODULES:
        exports = _get(module).exports
        if exports is None:
            raise LookupError(f"{module} has no __all__, which states its public names.")
        found |= {f"{module}.{name}" for name in map(str, exports)}
    return frozenset(found - set(MODULES))  # bnjax.interop is a name of bnjax and a module with a page of its own


def documented() -> list[str]:
    """The paths that the pages of the reference have an entry for."""
    pages = sorted(REFERENCE.glob("*.md"))
    return [
        path for page in pages for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def problems() -> list[str]:
    """What is missing from the reference, in sentences; empty where nothing is."""
    entries = documented()
    shown = {_get(entry).canonical_path for entry in entries}  # a name may be public in two modules
    missing = [
        f"{name} is public, but no page of docs/reference has it."
        for name in sorted(names())
        if _get(name).canonical_path not in shown
    ]
    twice = [f"{name} is in docs/reference more than once." for name in sorted(set(entries)) if entries.count(name) > 1]
    bare = [
        f"{name} is public and has no docstring."
        for name in sorted(names())
        if not (docstring := _get(name).docstring) or not docstring.value.strip()
    ]
    return missing + twice + bare


def _get(path: str) -> griffe.Object | griffe.Alias:
    _, _, inner = path.partition(".")
    return package()[inner] if inner else package()
