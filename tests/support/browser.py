"""What a browser makes of a page: the console's messages, and which pictures are drawn. No driver: Chromium alone."""

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


def open_in_browser(path: Path) -> tuple[list[str], list[bool]]:
    """Open a copy, elsewhere, of a page: the console's messages, and for each picture whether it is drawn."""
    head, end, tail = path.read_text(encoding="utf-8").rpartition("</body>")
    assert end, f"{path} has no </body>"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "page.html"
        page.write_text(head + SCRIPT + end + tail, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
        options += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
        done = subprocess.run([find_browser(), *options], capture_output=True, timeout=120)
    shown, log = done.stdout.decode(), done.stderr.decode(errors="replace")
    drawn = re.search(r'<body\b[^>]* data-drawn="([^"]*)"', shown)
    assert drawn, f"the browser ended with status {done.returncode} before the page was loaded:\n{log[-2000:]}"
    return [line for line in log.splitlines() if "CONSOLE" in line], json.loads(drawn[1])
