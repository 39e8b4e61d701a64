"""Claims that only a browser can judge: no script runs, nothing is fetched, nothing is wider than the window."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from report.chromium import CHROMIUM, browser, opened
from report.hostile import PAYLOADS, full

from hf_ftplus.page.write import page

WIDE = "a_rather_long_name_of_a_task_or_of_a_run_without_any_space_in_it_0123456789"
A4 = 718
"""Pixels between margins of 1 cm."""
AXE = os.environ.get("FTPLUS_AXE")
"""Where axe.min.js of axe-core lies: npm pack axe-core"""
pytestmark = pytest.mark.skipif(CHROMIUM is None and AXE is None, reason="no chromium on the PATH")  # `make page` fails
PICTURES = os.environ.get("FTPLUS_PICTURES")
"""A folder for pictures of the page, to be looked at."""


@pytest.mark.fault("F5")
def test_hostile_text_does_nothing_in_a_browser(tmp_path):
    dom, console, asked = opened(page(full(" ".join(PAYLOADS)), "ftplus report out"), tmp_path)
    assert "<title>What was learnt, what was kept</title>" in dom
    assert "owned" in dom
    assert console == []
    assert asked == []


def test_this_test_would_notice(tmp_path):
    bad = (
        "<title>fine</title><link rel=preconnect href=https://before.invalid><link rel=dns-prefetch href=https://name.invalid>"
        "<style>body { background: url(https://fonts.googleapis.com/b.png) }</style><body><img src=http://bad.invalid/a.png>"
        "<iframe src=https://frame.invalid></iframe><script>document.title='owned';console.error(1)</script>"
    )
    dom, console, asked = opened(bad, tmp_path)
    assert "<title>owned</title>" in dom
    assert console
    urls = {"http://bad.invalid/a.png", "https://fonts.googleapis.com/b.png", "https://frame.invalid/"}
    assert {*urls, "https://before.invalid", "https://name.invalid"} <= set(asked)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A page of every kind of section, open in a browser."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(page(full(WIDE), "ftplus report out"), encoding="utf-8")
    with browser(folder) as it:
        it.file = folder / "report.html"
        print(f"\nopened in {it.open(it.file):.2f} s")
        it("document.querySelectorAll('details').forEach(it => it.open = true)")
        yield it


def test_nothing_is_asked_for_but_the_page_itself(shown):
    assert set(shown.requests) == {shown.file.as_uri()}


@pytest.mark.parametrize(
    ("width", "media"), [(360, "screen"), (768, "screen"), (1280, "screen"), (A4, "print"), (1280, "print")]
)
def test_nothing_is_wider_than_the_window(shown, width, media):
    shown.show(width, media)
    assert shown("document.documentElement.scrollWidth") <= shown("innerWidth") == width
    if PICTURES:
        shown.picture(Path(PICTURES) / f"{media}-{width}.png")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.skipif(AXE is None, reason="FTPLUS_AXE names no axe.min.js")
def test_axe_finds_nothing_to_complain_of(shown, colours):
    shown.show(1280)
    shown.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])
    shown.call("Page.setBypassCSP", enabled=True)
    shown(Path(AXE).read_text(encoding="utf-8") + ";0")
    found = shown("axe.run().then(it => it.violations.map(v => [v.id, v.nodes.length, v.nodes[0].html]))")
    assert found == []
