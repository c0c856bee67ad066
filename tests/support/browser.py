"""How a browser renders a page: the console's messages, and which pictures are drawn. No driver, only Chromium."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "headless_shell")

# The attribute is the only way out of --dump-dom; load has fired when every picture is there or has failed.
SCRIPT = """<script>
addEventListener("load", () => {
  const drawn = Array.from(document.images, image => image.complete && image.naturalWidth > 0);
  document.body.dataset.drawn = JSON.stringify(drawn);
});
</script>"""


def find_browser() -> str:
    """Chromium's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"opens a page in Chromium, and found none of {', '.join(NAMES)} (Debian: chromium-headless-shell)")
    return found


def dumped(url: str, *options: str) -> tuple[str, list[str]]:
    """The page as HTML when it has loaded and its timers have run, and the messages on the console."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        fixed += [f"--user-data-dir={folder}", "--virtual-time-budget=60000", "--dump-dom"]
        done = subprocess.run([find_browser(), *fixed, *options, url], capture_output=True, timeout=120)
    log = done.stderr.decode(errors="replace")
    assert "</body>" in done.stdout.decode(), f"the browser ended with status {done.returncode}:\n{log[-2000:]}"
    return done.stdout.decode(), [line for line in log.splitlines() if "CONSOLE" in line]


def open_in_browser(path: Path) -> tuple[list[str], list[bool]]:
    """Open a copy, elsewhere, of a page: the console's messages, and for each picture whether it is drawn."""
    head, end, tail = path.read_text(encoding="utf-8").rpartition("</body>")
    assert end, f"{path} has no </body>"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "page.html"
        page.write_text(head + SCRIPT + end + tail, encoding="utf-8")
        shown, messages = dumped(page.as_uri())
    drawn = re.search(r'<body\b[^>]* data-drawn="([^"]*)"', shown)
    assert drawn, f"the page was not loaded: {messages}"
    return messages, json.loads(drawn[1])
