"""What MkDocs calls while it builds the site (`hooks` in mkdocs.yml).

The addresses of repository and site are those of pyproject.toml. Files from outside of docs/ become part of the site:
the figures and the report of the committed results, the changelog and the guide for contributors. Scripts under
docs/end-to-end become pages and notebooks. Comments such as `<!-- table: verdicts -->` become tables of the committed
results, so that no page can state a number that the results do not have. Public names in text become links to the
reference, and a public name that the reference lacks is a warning, which `mkdocs build --strict` makes an error.
"""

import logging
import re
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from docs.tools import docstrings, public, scripts, tables  # noqa: E402  found by the line above

RESULTS = ROOT / "experiments" / "results"
SCRIPTS = ROOT / "docs" / "end-to-end"
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

_log = logging.getLogger("mkdocs.hooks.bnjax")


def on_config(config: Any, pyproject: Path = ROOT / "pyproject.toml") -> Any:
    """Set the addresses of repository and site, which only a project that has them links to."""
    urls = addresses(pyproject)
    if repository := urls.get("Repository"):
        config.repo_url, config.repo_name = repository, urlsplit(repository).path.strip("/")
    if site := urls.get("Documentation"):
        config.site_url = site.rstrip("/") + "/"
    return config


def addresses(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, str]:
    """The addresses of the project, by their names in the metadata of the package; empty where it has none."""
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})


def on_pre_build(config: Any) -> None:
    """Warn of every public name that the reference lacks."""
    for problem in public.problems():
        _log.warning(problem)


def on_files(files: Any, config: Any) -> Any:
    """Add the files from outside of docs/, and what is made of scripts."""
    for path in [RESULTS / "report.html", *sorted(RESULTS.glob("**/*.png"))]:
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, source in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for path in sorted(SCRIPTS.glob("*.py")):
        script, name = path.read_text(encoding="utf-8"), f"{SCRIPTS.name}/{path.stem}"
        files.append(File.generated(config, f"{name}.md", content=scripts.page(script, path.stem)))
        files.append(File.generated(config, f"{name}.ipynb", content=scripts.notebook(script)))
    return files


def _table(match: re.Match[str]) -> str:
    return textwrap.indent(tables.TABLES[match[2]](), match[1])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in tables, and link public names."""
    markdown = re.sub(r"^( *)<!-- table: (\S+) -->$", _table, markdown, flags=re.MULTILINE)
    if page.file.src_uri.startswith("reference/"):
        return markdown
    return docstrings.linked(markdown)
