"""The report of the experiments as a browser shows it: in a frame of some width, with its links clicked."""

import html
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from tests.support.browser import dumped
from tests.support.site import served

_CHECK = """<!DOCTYPE html><html><head><title>check</title><link rel="icon" href="data:,"></head><body><script>
const wait = time => new Promise(resolve => setTimeout(resolve, time));
const framed = (width, page) => new Promise(resolve => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  frame.onload = () => resolve(frame);
  frame.src = page;
  document.body.append(frame);
});
const beyond = page => page.documentElement.scrollWidth - page.documentElement.clientWidth;
const visit = async width => {
  const frame = await framed(width, "report.html"), view = frame.contentWindow, page = frame.contentDocument;
  const claims = Array.from(page.querySelectorAll("details.whole")), opened = [], folded = {};
  for (const kind of ["fold", "group"]) {
    const folds = Array.from(page.querySelectorAll(`details.${kind}`));
    folded[kind] = folds.map(fold => fold.open);
    for (const fold of folds) fold.open = true;
  }
  const cut = Array.from(page.querySelectorAll(".claims span, .forest span, .forest svg.line")).filter(element => {
    const box = element.getBoundingClientRect();
    return box.left < 0 || box.right > width;
  }).map(element => element.textContent);
  const open = claims.filter(claim => claim.open).length;
  const found = {inner: view.innerWidth, beyond: beyond(page), cut, folded, open};
  for (const link of page.querySelectorAll(".claims a, .forest a")) {
    for (const claim of claims) claim.open = false;
    link.click();
    await wait(100);
    const target = page.getElementById(decodeURIComponent(link.hash.slice(1)));
    const {top} = target.getBoundingClientRect();
    const open = claims.filter(claim => claim.open).map(claim => claim.parentNode.id);
    opened.push([target.id, top >= 0 && top < 800, open]);
  }
  for (const claim of claims) claim.open = true;
  await wait(100);
  const tables = Array.from(page.querySelectorAll(".scroll"));
  const scrolling = tables.filter(table => table.scrollWidth > table.clientWidth).map(table => table.ariaLabel);
  const asked = view.performance.getEntriesByType("resource").map(entry => entry.name);
  found.asked = asked.filter(name => !name.startsWith("data:"));
  Object.assign(found, {opened, scrolling, beyondOpen: beyond(page)});
  frame.remove();
  return found;
};
(async () => {
  const found = {};
  for (const width of WIDTHS) found[width] = await visit(width);
  const page = (await framed(800, "unscripted.html")).contentDocument;
  const folds = page.querySelectorAll("details.whole, details.fold, details.group");
  found.unscripted = Array.from(folds, fold => fold.open);
  document.body.dataset.found = JSON.stringify(found);
})();
</script></body></html>"""


def look(path: Path, widths: tuple[int, ...]) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the browser finds in the report at each width, the console's messages, and the paths that were missing."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        report = path.read_text(encoding="utf-8")
        pages = {
            "report": report,
            "unscripted": re.sub("<script>.*?</script>", "", report, flags=re.DOTALL),
            "look": _CHECK.replace("WIDTHS", json.dumps(widths)),
        }
        for page, text in pages.items():
            (Path(name) / f"{page}.html").write_text(text, encoding="utf-8")
        with served(Path(name)) as (address, missing):
            shown, messages = dumped(f"{address}/look.html", "--window-size=1400,1000")
    found = re.search(r'<body\b[^>]* data-found="([^"]*)"', shown)
    assert found, f"the report was not shown to the end: {messages}"
    return json.loads(html.unescape(found[1])), messages, missing
