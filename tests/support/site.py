"""The documentation as a browser shows it: built, served on this machine, and opened page by page at a given width."""

import html
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tests.support.browser import dumped, find_browser

ROOT = Path(__file__).parents[2]

# Each page is opened in a frame of that width, so that one start of the browser serves all pages. What is folded or on
# another tab is opened first. The list of resources tells what was asked of other machines. A table is cut if its box
# neither shows all of it nor scrolls with a shadow at the edge. In each color scheme text is faint if its contrast with
# what is painted behind it is below 3. A picture is bare if it is transparent and what is painted behind it is dark.
_CHECK = r"""<!DOCTYPE html><title>check</title><body><script>
const [pages, width] = JSON.parse(decodeURIComponent(location.hash.slice(1)));
const shown = element => element !== null && element.getClientRects().length > 0;
const cut = (table, width) => {
  const whole = box => getComputedStyle(box).overflowX === "visible" || box.scrollWidth <= box.clientWidth + 1;
  let box = table;
  while (whole(box) && !box.matches("article, body")) box = box.parentElement;
  const {left, right} = box.getBoundingClientRect(), style = getComputedStyle(box);
  const signed = ["auto", "scroll"].includes(style.overflowX) && style.backgroundImage.includes("gradient")
    && style.backgroundAttachment.includes("local") && getComputedStyle(table).backgroundColor === "rgba(0, 0, 0, 0)";
  return left < -1 || right > width + 1 || !(signed || box.matches("article, body"));
};
const color = text => {
  const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
  return [r, g, b, a];
};
const over = ([r, g, b, a], behind) => [r, g, b].map((value, i) => a * value + (1 - a) * behind[i]);
const light = rgb => {
  const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const painted = element => {
  if (element === null) return [255, 255, 255];
  const back = color(getComputedStyle(element).backgroundColor);
  return back[3] === 1 ? back.slice(0, 3) : over(back, painted(element.parentElement));
};
const faint = element => {
  const back = painted(element), front = over(color(getComputedStyle(element).color), back);
  const [low, high] = [light(back), light(front)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05) < 3;
};
const canvas = document.createElement("canvas");
canvas.width = canvas.height = 20;
const transparent = image => {
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  pen.clearRect(0, 0, 20, 20);
  pen.drawImage(image, 0, 0, 20, 20);
  return pen.getImageData(0, 10, 1, 1).data[3] < 250;
};
const open = page => {
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  const style = page.createElement("style");
  style.textContent = ".tabbed-block { display: block !important } * { transition: none !important }";
  page.head.append(style);
};
const named = element => `${element.tagName} ${element.textContent.trim().slice(0, 40)}`;
const visit = page => new Promise(resolve => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => setTimeout(() => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    open(page);
    const all = selector => Array.from(page.querySelectorAll(selector)).filter(shown);
    const texts = all("article :is(h1, h2, h3, p, li, td, th, summary, a:not(.headerlink))");
    const preferred = page.body.dataset.mdColorScheme ?? "", schemes = {};
    for (const scheme of ["default", "slate"]) {
      page.body.dataset.mdColorScheme = scheme;
      const bare = all("article img").filter(image => transparent(image) && light(painted(image)) < 0.9);
      schemes[scheme] = {faint: texts.filter(faint).map(named), bare: bare.map(image => image.src)};
    }
    const names = view.performance.getEntriesByType("resource").map(entry => entry.name);
    resolve({
      inner: view.innerWidth,
      overflow: root.scrollWidth - root.clientWidth,
      broken: Array.from(page.images).filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
      preferred,
      schemes,
      cut: all("table").filter(table => cut(table, width)).map(named),
      external: names.filter(name => !name.startsWith(location.origin) && !name.startsWith("data:")),
      links: Array.from(page.querySelectorAll(".md-sidebar--primary a.md-nav__link")).filter(shown).length,
      menu: shown(page.querySelector("label.md-header__button[for=__drawer]")),
      heading: page.querySelector("h1")?.textContent ?? "",
      text: page.querySelector("article")?.innerText.length ?? 0,
    });
    frame.remove();
  }, 100);
  frame.src = page;
  document.body.append(frame);
});
(async () => {
  const found = {};
  for (const page of pages) found[page] = await visit(page);
  document.body.dataset.found = JSON.stringify(found);
})();
</script>"""


def build(folder: Path) -> None:
    """The site under `folder`; a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, missing: list[str], **kwargs: Any):
        self.missing = missing
        super().__init__(*args, **kwargs)

    def do_GET(self):
        if self.path != "/check.html":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(_CHECK.encode())

    def send_error(self, code, message=None, explain=None):
        self.missing.append(self.path)
        super().send_error(code, message, explain)

    def log_message(self, format, *args):  # as the base class names it
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server for `folder`, and the paths that it was asked for and did not have."""
    missing: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), missing=missing))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", missing
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def look(
    address: str, pages: list[str], width: int, scheme: str = "light"
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the browser finds on each page in a window of that width, and the messages on its console.

    `scheme` is the one that the system prefers, "light" or "dark".
    """
    url = f"{address}/check.html#{quote(json.dumps([pages, width]))}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        options += [
            f"--user-data-dir={folder}",
            f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
            "--virtual-time-budget=600000",
            "--window-size=1400,1000",
            "--dump-dom",
        ]
        done = subprocess.run([find_browser(), *options, url], capture_output=True, timeout=600)
    shown, log = done.stdout.decode(), done.stderr.decode(errors="replace")
    found = re.search(r'<body\b[^>]* data-found="([^"]*)"', shown)
    assert found, f"the browser ended with status {done.returncode} before all pages were loaded:\n{log[-2000:]}"
    return json.loads(html.unescape(found[1])), [line for line in log.splitlines() if "CONSOLE" in line]


_SEARCH = """<script>addEventListener("load", () => setTimeout(() => {
  document.querySelector("[data-md-toggle=search]").click();
  const query = document.querySelector(".md-search__input");
  query.value = "TERM";
  query.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
  setTimeout(() => {
    const links = Array.from(document.querySelectorAll(".md-search-result__link"), link => link.href);
    document.body.dataset.found = JSON.stringify(links);
  }, 2000);
}, 500))</script></body>"""


def search(folder: Path, page: str, term: str) -> tuple[list[str], list[str]]:
    """The results when a page is opened from the folder and a term is typed, and the messages on the console."""
    source = folder / page
    copy = source.with_name("searched.html")  # beside the page, whose scripts and styles have relative addresses
    copy.write_text(source.read_text(encoding="utf-8").replace("</body>", _SEARCH.replace("TERM", term)), "utf-8")
    try:
        shown, messages = dumped(copy.as_uri())
    finally:
        copy.unlink()
    found = re.search(r'<body\b[^>]* data-found="([^"]*)"', shown)
    assert found, f"the page was not loaded: {messages}"
    return json.loads(html.unescape(found[1])), messages


_TAG = re.compile(r"<[a-zA-Z][^>]*>")
_ATTRIBUTE = re.compile(r"""\s(id|name|href|src|data)=(?:"([^"]*)"|'([^']*)'|([^\s>]+))""")


def dead_links(folder: Path) -> list[str]:
    """The links and sources of all pages that lead to no file of the site, or to no element of a page."""
    ids: dict[Path, set[str]] = {}
    links: list[tuple[Path, str]] = []
    for page in folder.rglob("*.html"):
        text = re.sub(r"<!--.*?-->|(<script\b[^>]*>).*?</script>", r"\1", page.read_text(encoding="utf-8"), flags=re.S)
        found = [
            (m[1], html.unescape(m[2] or m[3] or m[4] or ""))
            for t in _TAG.findall(text)
            for m in _ATTRIBUTE.finditer(t)
        ]
        ids[page] = {value for name, value in found if name in ("id", "name")}
        links += [(page, value) for name, value in found if name in ("href", "src", "data")]
    dead = []
    for page, link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        # The page for what is not found is shown at any address, so its links start at the root.
        start = folder if parts.path.startswith("/") else page.parent
        target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else page
        target = target / "index.html" if target.is_dir() else target
        fragment = unquote(parts.fragment)
        if not target.is_file() or (fragment and target in ids and fragment not in ids[target] | {"__tabbed"}):
            dead.append(f"{page.relative_to(folder)}: {link}")
    return dead
