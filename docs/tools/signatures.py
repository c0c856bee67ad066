"""The constructors of the public classes, with what they inherit: parameters, defaults and an explanation of each.

The parameters are those of the live class, because layers of Linen are dataclasses with fields of Flax, and layers of
NNX pass keywords on to Flax. Annotations and defaults are shown as the source writes them. Explanations come from the
docstring of the class that has the parameter, Flax's included, and for the fields of records from their comments.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from docs.tools import public

HIDDEN = {"self", "parent", "call"}
"""Parameters for code of Flax and bnjax: the scope of a Linen module, and the name of a call in errors."""
RESULTS = {"bnjax.UnboundAxisNameError", "bnjax.nnx.BatchMoments", "bnjax.nnx.Identity"}
"""Classes without a constructor of their own: users receive their values."""

_SECTION = re.compile(r"^(?:Args|Attributes):\n((?:(?:[ ]+.*)?(?:\n|\Z))+)", re.MULTILINE)
_ENTRY = re.compile(r"((?:\*{0,2}[\w.]+)(?:, \*{0,2}[\w.]+)*)(?: and the rest)?: +")
_AS_IN = re.compile(r"as in `([\w.]+)`\.?\s*")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor; `owner` is the class whose source has it, and `default` its text there."""

    name: str
    kind: Any
    owner: type
    annotation: str | None
    default: str | None


@dataclass(frozen=True)
class Entry:
    """An entry of the section `Args`: names, and the text or the name of the call whose text holds for them."""

    names: tuple[str, ...]
    text: str
    source: str | None

    @property
    def others(self) -> bool:
        """Whether the entry is about all parameters that have no entry of their own."""
        return any(name.startswith("**") or "..." in name for name in self.names)


@functools.cache
def live(path: str) -> Any:
    """The object with this public path, imported."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@functools.cache
def classes() -> dict[type, str]:
    """The public classes, with the path of each in the reference."""
    found = {name: live(name) for name in sorted(public.names(), key=lambda name: (name.count("."), name))}
    return {value: name for name, value in reversed(found.items()) if isinstance(value, type)}


@functools.cache
def constructor(cls: type) -> tuple[Parameter, ...]:
    """The parameters of the constructor; those that are passed on as keywords are replaced by what they may be."""
    owner = next((c for c in cls.__mro__ if "__init__" in vars(c)), object)
    signature = inspect.signature(cls if owner in (object, tuple) else owner.__init__)
    found = {p.name: p for p in signature.parameters.values() if p.name not in HIDDEN}
    keywords = [name for name, p in found.items() if p.kind is p.VAR_KEYWORD]
    parameters = [_parameter(cls, p) for name, p in found.items() if name not in keywords]
    if keywords:
        base = cls.__mro__[cls.__mro__.index(owner) + 1]
        parameters += [p for p in constructor(base) if p.name not in found]
    order = inspect.Parameter.KEYWORD_ONLY
    return tuple(sorted(parameters, key=lambda p: p.kind is order))


def explanations(cls: type) -> dict[str, str]:
    """By the name of a parameter, its explanation: from a docstring, or the comment of the field."""
    found = {"name": "name of the module in its parent; None lets Flax choose it."}  # every module of Linen has it
    for base in reversed(cls.__mro__[:-1]):
        short = not base.__module__.startswith("bnjax")
        found |= {name: text for name, (_, _, text) in _fields(base).items() if text}
        for entry in sorted(entries(base), key=lambda entry: entry.source is None):  # an explanation of its own wins
            if entry.source is None:
                found |= dict.fromkeys(entry.names, _first_sentence(entry.text) if short else entry.text)
            else:
                found |= _named(base, entry)
    return {p.name: found[p.name] for p in constructor(cls) if p.name in found}


def _named(cls: type, entry: Entry) -> dict[str, str]:
    """The texts for an entry such as "momentum, epsilon: as in `BatchNorm`."."""
    assert entry.source is not None
    target = live(path_of(cls, entry.source))
    if isinstance(target, type):
        texts = explanations(target)
    else:
        texts = {name: e.text for e in entries(target) for name in e.names}
    return {name: text for name, text in texts.items() if entry.others or name in entry.names}


def path_of(cls: type, name: str) -> str:
    """The whole path of what a docstring of the class calls by this name."""
    return name if "." in name else f"{'.'.join(cls.__module__.split('.')[:2])}.{name}"


@functools.cache
def entries(described: Any) -> tuple[Entry, ...]:
    """The entries of a docstring's section on arguments."""
    section = _SECTION.search(inspect.cleandoc(_docstring(described)))
    if section is None:
        return ()
    found: list[Entry] = []
    for text in re.split(r"\n(?=\S)", textwrap.dedent(section[1]).strip("\n")):
        head = _ENTRY.match(text)
        if head is None:
            continue
        body = " ".join(text[head.end() :].split())
        same = _AS_IN.match(body)
        names = tuple(name.strip() for name in head[1].split(","))
        found.append(Entry(names, body[same.end() :] if same else body, same[1] if same else None))
    return tuple(found)


def _docstring(described: Any) -> str:
    """The docstring of a function, or of a class but not of its bases."""
    return (vars(described).get("__doc__") if isinstance(described, type) else described.__doc__) or ""


def _first_sentence(text: str) -> str:
    """The first sentence of Flax's text, in Markdown."""
    return re.split(r"(?<=[^.\W]\))?(?<=\w|\))\.\s+(?=[A-Z])", text.replace("``", "`"), maxsplit=1)[0].rstrip(".") + "."


def _parameter(cls: type, parameter: inspect.Parameter) -> Parameter:
    for owner in cls.__mro__[:-1]:
        fields = _fields(owner)
        if parameter.name in fields:
            annotation, default, _ = fields[parameter.name]
            has = parameter.default is not parameter.empty
            return Parameter(parameter.name, parameter.kind, owner, annotation, default if has else None)
    # Linen adds `name` to every module, which no source has.
    default = None if parameter.default is parameter.empty else repr(parameter.default)
    return Parameter(parameter.name, parameter.kind, cls, "str | None", default)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[str | None, str | None, str]]:
    """Annotation, default and comment of the fields of a class, or of the arguments of its `__init__`, as written."""
    try:
        lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    except (OSError, TypeError):
        return {}
    (node,) = ast.parse("\n".join(lines)).body
    assert isinstance(node, ast.ClassDef)
    found: dict[str, tuple[str | None, str | None, str]] = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = (_type(item.annotation), _default(cls, item.value), _comment(lines, item))
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = item.args
            plain = arguments.posonlyargs + arguments.args
            padded = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
            pairs = [*zip(plain, padded, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
            found |= {a.arg: (_type(a.annotation), _default(cls, default), "") for a, default in pairs}
    return found


def _type(node: ast.expr | None) -> str | None:
    """An annotation without the names of modules."""
    return None if node is None else re.sub(r"\b(?:\w+\.)+(?=\w)", "", ast.unparse(node))


def _default(cls: type, node: ast.expr | None) -> str | None:
    """A default as it is written, a private name of the module as the expression that it is given there."""
    if node is None:
        return None
    if isinstance(node, ast.Name) and node.id.startswith("_"):
        return _globals(cls.__module__)[node.id]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "struct.field":
        made = [f"{ast.unparse(k.value)}()" for k in node.keywords if k.arg == "default_factory"]
        return made[0] if made else None
    return re.sub(r"^(?:renorm\.)?(RENORM_\w+)$", r"bnjax.\1", _written(node))


def _written(node: ast.expr) -> str:
    """An expression as source; numbers in the shortest form, such as 1e-5."""
    return re.sub(r"(?<=\de-)0+", "", ast.unparse(node))


@functools.cache
def _globals(module: str) -> dict[str, str]:
    """What the names of a module are given by plain assignments."""
    found: dict[str, str] = {}
    for item in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(item, ast.Assign):
            (target,) = item.targets
            several = isinstance(target, ast.Tuple) and isinstance(item.value, ast.Tuple)
            pairs = zip(target.elts, item.value.elts, strict=True) if several else [(target, item.value)]
            found |= {name.id: _written(value) for name, value in pairs if isinstance(name, ast.Name)}
    return found


def _comment(lines: list[str], item: ast.AnnAssign) -> str:
    """The comment behind a field, or in the lines before it, without the remarks for type checkers."""
    behind = lines[(item.end_lineno or item.lineno) - 1][item.end_col_offset :].partition("#")[2]
    before: list[str] = []
    for line in reversed(lines[: item.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        before.insert(0, line.strip().lstrip("# "))
    text = re.split(r"\s*#?\s*pyright:", behind)[0].strip()
    return text or " ".join(before)
