"""A page in a real browser: opened from disk, measured through Chromium's DevTools, and all that it asked of anybody."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-extensions",
    "--disable-features=NetworkTimeServiceQuerying", "--enable-logging=stderr",
]  # fmt: skip
NOBODY = "not an origin"
"""Who Chromium says began a request of its own: some of its housekeeping no flag switches off."""


def opened(html: str, folder: Path) -> tuple[str, list[str], list[str]]:
    """The DOM once all has run, what the console said, and every address and host that the page asked for."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = [*FLAGS, "--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--log-net-log={folder / 'net.json'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, asked(json.loads((folder / "net.json").read_text(encoding="utf-8")))


def asked(log: dict[str, Any]) -> list[str]:
    """Of a net log: what was requested on behalf of a page, and the hosts that were looked up for one."""
    events = [event["params"] for event in log["events"] if "params" in event]
    urls = {it["url"] for it in events if it.get("initiator", NOBODY) != NOBODY}
    hosts = {it["host"] for it in events if str(it.get("network_anonymization_key")).startswith("file:")}
    return sorted(urls | {host for host in hosts if host})


class Page:
    """What the DevTools know of one page. `requests` are the addresses that were asked for, its own file's included."""

    def __init__(self, sent: Any, received: Any) -> None:
        self._sent, self._received, self._number, self._left = sent, received, 0, b""
        self._session: dict[str, str] = {}
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._sent.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._received.fileno(), 1 << 16)
            assert part, "Chromium has ended"
            self._left += part
        text, self._left = self._left.split(b"\0", 1)
        found = json.loads(text)
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["params"]["request"]["url"])
        return found

    def open(self, file: Path) -> float:
        """Seconds until the page has loaded and been laid out."""
        begin = time.perf_counter()
        self.call("Page.navigate", url=file.as_uri())
        self("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))")
        self("document.documentElement.getBoundingClientRect().height")
        return time.perf_counter() - begin

    def __call__(self, expression: str) -> Any:
        """The value of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show(self, width: int, media: str = "screen") -> None:
        """Of this width, on the screen or as printed."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", media=media)

    def picture(self, file: Path) -> None:
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A fresh Chromium, driven through a pipe; it is gone after the block."""
    ours, theirs = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]  # 3 and 4 are theirs to be
    os.close(ours[0]), os.close(theirs[1])
    line = ["bash", "-c", 'exec "${@:3}" 3<&$1 4>&$2', "bash", *map(str, ends), CHROMIUM, *FLAGS]
    line += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'devtools'}"]
    with open(folder / "chromium.log", "wb") as log:
        process = subprocess.Popen(line, pass_fds=ends, stdout=log, stderr=log)
    for end in ends:
        os.close(end)
    try:
        with os.fdopen(ours[1], "wb", 0) as sent, os.fdopen(theirs[0], "rb", 0) as received:
            yield Page(sent, received)
    finally:
        process.kill()
        process.wait()
