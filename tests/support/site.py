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

from tests.support.browser import find_browser

ROOT = Path(__file__).parents[2]

# Each page is opened in a frame of that width, so that one start of the browser serves all pages. The list of resources
# tells what was asked of other machines.
_CHECK = """<!DOCTYPE html><title>check</title><body><script>
const [pages, width] = JSON.parse(decodeURIComponent(location.hash.slice(1)));
const shown = element => element !== null && element.getClientRects().length > 0;
const visit = page => new Promise(resolve => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => setTimeout(() => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    const names = view.performance.getEntriesByType("resource").map(entry => entry.name);
    resolve({
      inner: view.innerWidth,
      overflow: root.scrollWidth - root.clientWidth,
      broken: Array.from(page.images).filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
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


def look(address: str, pages: list[str], width: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the browser finds on each page in a window of that width, and the messages on its console."""
    from urllib.parse import quote

    url = f"{address}/check.html#{quote(json.dumps([pages, width]))}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        options += [
            f"--user-data-dir={folder}",
            "--virtual-time-budget=600000",
            "--window-size=1400,1000",
            "--dump-dom",
        ]
        done = subprocess.run([find_browser(), *options, url], capture_output=True, timeout=600)
    shown, log = done.stdout.decode(), done.stderr.decode(errors="replace")
    found = re.search(r'<body\b[^>]* data-found="([^"]*)"', shown)
    assert found, f"the browser ended with status {done.returncode} before all pages were loaded:\n{log[-2000:]}"
    return json.loads(html.unescape(found[1])), [line for line in log.splitlines() if "CONSOLE" in line]
