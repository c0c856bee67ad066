"""Constructors: what the built pages of the reference show, and what the live classes have."""

import ast
import html
import inspect
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

import bnjax
from bnjax.variants.lstm import orthogonal

NAMES = {"MappingProxyType": MappingProxyType, "bnjax": bnjax, "dtypes": dtypes, "jnp": jnp, "nn": nn, "nnx": nnx}
NAMES |= {"initializers": nn.initializers, "orthogonal": orthogonal, "dict": dict}
FOR_CODE = {"self", "parent", "call"}  # the scope of a Linen module, and the name of a call in errors


def shown(folder: Path) -> dict[str, str]:
    """The signature of each class in the reference of the built site, by the class's path, as source."""
    heading = r'<h3 id="([\w.]+)" class="doc doc-heading">\s*<span class="doc doc-object-name doc-class-name">'
    found = {}
    for page in sorted((folder / "reference").glob("*.html")):
        for entry in re.split(r"(?=<h3 id=)", page.read_text(encoding="utf-8")):
            if name := re.match(heading, entry):
                box = re.search(r'</h3>\s*<div class="doc-signature highlight"><pre>(.*?)</pre>', entry, re.S)
                found[name[1]] = html.unescape(re.sub("<[^>]+>", "", box[1])) if box else ""
    return found


def parsed(text: str) -> dict[str, tuple[bool, Any]]:
    """By the name of a parameter, whether it is taken by keyword only, and its default as a value."""
    (function,) = ast.parse(f"def {text.strip()}: ...").body
    assert isinstance(function, ast.FunctionDef)
    a = function.args
    assert a.vararg is None
    assert a.kwarg is None
    padded = [None] * (len(a.args) - len(a.defaults)) + a.defaults
    pairs = [(False, *pair) for pair in zip(a.args, padded, strict=True)]
    pairs += [(True, *pair) for pair in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return {
        argument.arg: (keyword, inspect.Parameter.empty if default is None else eval(ast.unparse(default), dict(NAMES)))
        for keyword, argument, default in pairs
    }


def live(cls: type) -> dict[str, tuple[bool, Any]]:
    """The same of the class itself, where `**options` are the parameters of the class after it that takes them."""
    found: dict[str, tuple[bool, Any]] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) and not issubclass(cls, tuple):
            continue
        parameters = inspect.signature(cls if issubclass(cls, tuple) else owner.__init__).parameters.values()
        for p in parameters:
            if p.kind is not p.VAR_KEYWORD and p.name not in FOR_CODE:
                found.setdefault(p.name, (p.kind is p.KEYWORD_ONLY, p.default))
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def same(shown: Any, default: Any) -> bool:
    """Whether a default is the one that is shown. Initializers and factories are made anew by each call."""
    if repr(default) == "<factory>":
        return shown == {}
    if callable(default) and hasattr(default, "__qualname__"):
        return (shown.__module__, shown.__qualname__) == (default.__module__, default.__qualname__)
    return type(shown) is type(default) and shown == default
