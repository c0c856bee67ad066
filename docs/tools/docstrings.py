"""A Griffe extension: the project's docstrings as Markdown.

A docstring has a line, text with indented formulas, and sections `Args:`, `Returns:`, `Raises:` and `Example:`. The
parser of Griffe for this style expects one parameter an entry and one type an exception. The project's docstrings
group them ("params, state: as in `bnjax.bn_apply`"), so the sections are rewritten here as lists.
"""

import inspect
import itertools
import re
import textwrap
from typing import Any

import griffe

from docs.tools import public, signatures

_TITLES = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Example": "Example"}
_SECTION = re.compile(r"^(Args|Returns|Raises|Example):\n((?:(?:[ ]+.*)?(?:\n|\Z))+)", re.MULTILINE)
# `x:`, `r_max, d_max:`, `*args, **kwargs:`, `params, x and the rest:`, at the start of an entry.
_ENTRY = re.compile(r"((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*)( and the rest)?: +")


class Markdown(griffe.Extension):
    """Rewrites every docstring of the package as Markdown, and gives each public class its constructor."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when the whole package was read from source."""
        for cls, path in signatures.classes().items():
            if path not in signatures.RESULTS:
                pkg[_within(cls)].set_member("__init__", _constructor(cls))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that was read from source."""
        if obj.docstring is not None:
            cls = _PUBLIC.get(obj.path) if obj.is_class else None
            obj.docstring.value = markdown(obj.docstring.value, None if cls is None else arguments(cls))


def _within(cls):
    """The path of a class in the package."""
    return f"{cls.__module__}.{cls.__qualname__}".partition(".")[2]


_PUBLIC = {f"bnjax.{_within(cls)}": cls for cls, path in signatures.classes().items() if path not in signatures.RESULTS}


def _constructor(cls):
    """The constructor of a class, for Griffe."""
    kinds = {inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only}
    plain = griffe.ParameterKind.positional_or_keyword
    found = [
        griffe.Parameter(p.name, annotation=p.annotation, kind=kinds.get(p.kind, plain), default=p.default)
        for p in signatures.constructor(cls)
    ]
    return griffe.Function("__init__", parameters=griffe.Parameters(griffe.Parameter("self"), *found))


def markdown(docstring: str, given: str | None = None) -> str:
    """The docstring's sections as Markdown, and public names as links; `given` takes the place of its arguments."""
    head = f"**{_TITLES['Args']}**\n\n"

    def section(match):
        if match[1] == "Args" and given is not None:
            return f"{head}{given}\n\n"
        return _section(match[1], textwrap.dedent(match[2]).strip("\n"))

    text = _SECTION.sub(section, docstring)
    if given and head not in text:
        before, example, after = text.partition("**Example**")
        text = f"{before.rstrip()}\n\n{head}{given}\n\n{example}{after}"
    return linked(text)


def arguments(cls: type) -> str:
    """The explanations of a constructor's parameters, with those folded that are as in another class of bnjax."""
    entries, texts = signatures.entries(cls), signatures.explanations(cls)
    own = [entry for entry in entries if entry.source is None]
    named = {name for entry in own for name in entry.names}
    items = [_listed(entry.names, entry.text) for entry in own]
    others = [_listed([name], text) for name, text in texts.items() if name not in named]
    same = next((entry for entry in entries if entry.source), None)
    if same is None or not others:
        return "\n".join(items + others)
    of = signatures.path_of(cls, str(same.source))
    title = f"As in `{of}`"
    if of.startswith("bnjax"):
        others = [f'??? note "{title}"\n', *(f"    {line}" for line in others)]
    else:
        others = [f"{title}:\n", *others]
    return "\n".join([*items, "", *([same.text, ""] if same.text else []), *others])


def _listed(names, text):
    text = text.replace("(*features,)", "`(*features,)`")
    return f"- {', '.join(f'`{name}`' for name in names)}: {text}"


def _section(name: str, body: str) -> str:
    title = f"**{_TITLES[name]}**"
    if name == "Example":
        content = f"```pycon\n{body}\n```"
    else:
        entries = re.split(r"\n(?=\S)", body) if name != "Returns" or _ENTRY.match(body) else []
        whole = all(_ENTRY.match(entry) for entry in entries)
        content = "\n".join(map(_item, entries)) if entries and whole else _paragraphs(name, body)
    return f"{title}\n\n{content}\n\n"


def _paragraphs(name, body):
    """A section that is text, or entries of which one goes on at the same indentation."""
    if name == "Returns":
        return body
    starts = [0, *(match.end() for match in re.finditer(rf"\n(?={_ENTRY.pattern})", body)), len(body)]
    entries = [body[start:stop].rstrip("\n") for start, stop in itertools.pairwise(starts)]
    return "\n".join(_item(entry) if _ENTRY.match(entry) else f"- {_indented(entry)}" for entry in entries)


def _item(entry):
    head = _ENTRY.match(entry)
    names = ", ".join(f"`{name}`" for name in head[1].split(", "))
    return f"- {names}{head[2] or ''}: {_indented(textwrap.dedent(entry[head.end() :]))}"


def _indented(text):
    first, _, rest = text.partition("\n")
    return "\n".join([first, *(f"    {line.strip()}" for line in rest.splitlines())])


def linked(text: str) -> str:
    """The text, in which a public name such as `bnjax.bn_apply` links to the reference where it stands as code."""
    lines, fenced, code = [], False, False
    previous, inside = "", 0
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        indent = len(line) - len(line.lstrip())
        if line.strip():
            inside = min(inside, indent)
        # Four spaces make code after an empty line or code, and go on with a list's entry elsewhere.
        code = line.startswith(" " * (inside + 4)) and (code or not previous.strip())
        if _BLOCK.match(line):  # a fold, an admonition or a tab, whose content is indented
            inside = indent + 4
        plain = not (fenced or code or line.startswith(("#", ":::")))
        lines.append(_NAME.sub(_link, line) if plain else line)
        previous = line
    return "\n".join(lines)


_BLOCK = re.compile(r" *(?:\?\?\?\+?|!!!|===) ")
_NAME = re.compile(r"(?<!\[)`(bnjax(?:\.\w+)+)((?:\([^`]*\))?)`(?!\])")


def _link(match):
    return f"[`{match[1]}{match[2]}`][{match[1]}]" if match[1] in public.names() else match[0]
