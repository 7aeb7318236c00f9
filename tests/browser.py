"""A page in a real headless browser, framed as wide as a phone or a desktop."""

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0"><pre></pre>
<iframe src="page.html" style="width:{width}px;height:{height}px;border:0"></iframe>
<script>onmessage = event => {{ document.querySelector("pre").textContent = JSON.stringify(event.data); }};</script>"""


def said_by(page: str, probe: str, width: int, folder: Path, height: int = 900) -> Any:
    """What the probe, a script at the end of the page, posts to its parent."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.fail("needs Chromium or Chrome on PATH: the page was not looked at")
    (folder / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width, height=height))
    run = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=10000", "--window-size=1400,1000", "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (text,) = re.findall(r"<pre>(.*?)</pre>", run.stdout, re.DOTALL)
    return msgspec.json.decode(html.unescape(text))
