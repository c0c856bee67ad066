"""Scripts in the percent format as pages and as notebooks, so that text and code of a tutorial exist once.

A line that starts with `# %%` begins a cell. Under `# %% [markdown]` every line is text behind `# `; other cells are
code. Editors and Jupytext read the format, and the script itself is what a reader downloads.
"""

import json
import re
from typing import NamedTuple

_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


class Cell(NamedTuple):
    """A part of a script: Markdown, or code."""

    markdown: bool
    text: str


def cells(script: str) -> list[Cell]:
    """The cells of a script, without the lines that begin them."""
    first, *parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)
    if first.strip():
        raise ValueError(f"a script begins with a cell, `# %%`, but this one with {first[:40]!r}.")
    found = []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        markdown = title.strip() == "[markdown]"
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if markdown else body
        found.append(Cell(markdown, text.strip("\n")))
    return found


def page(script: str, name: str) -> str:
    """The script as a Markdown page, with links to the script and to the notebook below its title."""
    title, *rest = cells(script)
    heading, _, text = title.text.partition("\n")
    links = f"Download: [script]({name}.py){{ download }}, [notebook]({name}.ipynb){{ download }}"
    blocks = [cell.text if cell.markdown else f"```python\n{cell.text}\n```" for cell in rest]
    return "\n\n".join([heading, links, text.strip("\n"), *blocks]) + "\n"


def notebook(script: str) -> str:
    """The script as a Jupyter notebook, whose text has no links to pages that do not lie beside it."""
    found = [
        {
            "cell_type": "markdown" if cell.markdown else "code",
            "id": f"cell-{number}",
            "metadata": {},
            "source": _LINK.sub(r"\1", cell.text) if cell.markdown else cell.text,
            **({} if cell.markdown else {"execution_count": None, "outputs": []}),
        }
        for number, cell in enumerate(cells(script))
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"
