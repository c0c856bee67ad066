"""The documentation: every public name is in the API reference, and the reference shows what the docstrings say."""

import pytest

pytest.importorskip("griffe", reason="the documentation is built by the extra `docs`")

from docs.tools import docstrings, public


def test_every_public_name_has_a_docstring_and_an_entry_in_the_reference():
    assert public.problems() == []


def test_a_public_name_that_the_reference_lacks_is_a_problem(monkeypatch):
    monkeypatch.setattr(public, "documented", lambda: sorted(public.names() - {"bnjax.bn_apply"}))
    assert public.problems() == ["bnjax.bn_apply is public, but no page of docs/reference has it."]


def test_sections_of_a_docstring_become_lists():
    text = """One line.

        y = x

Args:
  params, state: of the layer,
    as in `bnjax.bn_apply`.
  *args: others.

Returns:
  y: of x's shape.

Raises:
  ValueError: for nothing.

Example:
  >>> 1 + 1
  2
"""
    assert docstrings.markdown(text).split("\n\n")[2:] == [
        "**Arguments**",
        "- `params`, `state`: of the layer,\n    as in [`bnjax.bn_apply`][bnjax.bn_apply].\n- `*args`: others.",
        "**Returns**",
        "- `y`: of x's shape.",
        "**Raises**",
        "- `ValueError`: for nothing.",
        "**Example**",
        "```pycon\n>>> 1 + 1\n2\n```",
        "",
    ]


def test_names_link_to_the_reference_outside_of_blocks():
    text = "`bnjax.fold(params)` and `bnjax.nothing`\n\n```python\n`bnjax.fold`\n```\n\n# `bnjax.fold`"
    linked = "[`bnjax.fold(params)`][bnjax.fold] and `bnjax.nothing`"
    assert docstrings.linked(text) == text.replace("`bnjax.fold(params)` and `bnjax.nothing`", linked)
