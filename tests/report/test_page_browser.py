"""Claims that only a browser can judge: no script runs, nothing is fetched, nothing is complained of."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from report.hostile import PAYLOADS, full

from hf_ftplus.page.write import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


def opened(html: str, folder: Path) -> tuple[str, list[str], list[str]]:
    """The DOM once all has run, what the console said, and every address that was asked for."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=2000"]
    flags += [
        "--disable-background-networking",
        "--no-first-run",
        "--disable-component-update",
        "--enable-logging=stderr",
    ]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    log = json.loads((folder / "net.json").read_text(encoding="utf-8"))
    asked = {event["params"]["url"] for event in log["events"] if "url" in event.get("params", {})}
    return done.stdout, console, sorted(url for url in asked if "bad.invalid" in url)


@pytest.mark.fault("F5")
def test_hostile_text_does_nothing_in_a_browser(tmp_path):
    dom, console, asked = opened(page(full(" ".join(PAYLOADS)), "ftplus report out"), tmp_path)
    assert "<title>What was learnt, what was kept</title>" in dom
    assert "owned" in dom
    assert console == []
    assert asked == []


def test_this_test_would_notice(tmp_path):
    bad = "<title>fine</title><body><img src=http://bad.invalid/a.png><script>document.title='owned';console.error(1)</script>"
    dom, console, asked = opened(bad, tmp_path)
    assert "<title>owned</title>" in dom
    assert console
    assert asked == ["http://bad.invalid/a.png"]
