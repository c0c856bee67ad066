"""A Griffe extension: the project's docstrings as Markdown.

A docstring has a line, text with indented formulas, and sections `Args:`, `Returns:`, `Raises:` and `Example:`. The
parser of Griffe for this style expects one parameter an entry and one type an exception. The project's docstrings
group them ("params, state: as in `bnjax.bn_apply`"), so the sections are rewritten here as lists.
"""

import itertools
import re
import textwrap
from typing import Any

import griffe

from docs.tools import public

_TITLES = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Example": "Example"}
_SECTION = re.compile(r"^(Args|Returns|Raises|Example):\n((?:(?:[ ]+.*)?(?:\n|\Z))+)", re.MULTILINE)
# `x:`, `r_max, d_max:`, `*args, **kwargs:`, `params, x and the rest:`, at the start of an entry.
_ENTRY = re.compile(r"((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*)( and the rest)?: +")


class Markdown(griffe.Extension):
    """Rewrites every docstring of the package as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that was read from source."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """The docstring's sections as Markdown, and public names as links."""
    text = _SECTION.sub(lambda match: _section(match[1], textwrap.dedent(match[2]).strip("\n")), docstring)
    return linked(text)


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
    previous = ""
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        # Four spaces make code after an empty line or code, and go on with a list's entry elsewhere.
        code = line.startswith("    ") and (code or not previous.strip())
        plain = not (fenced or code or line.startswith(("#", ":::")))
        lines.append(_NAME.sub(_link, line) if plain else line)
        previous = line
    return "\n".join(lines)


_NAME = re.compile(r"(?<!\[)`(bnjax(?:\.\w+)+)((?:\([^`]*\))?)`(?!\])")


def _link(match):
    return f"[`{match[1]}{match[2]}`][{match[1]}]" if match[1] in public.names() else match[0]
