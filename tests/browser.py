"""A page in headless Chromium, by ChromeDriver's own HTTP protocol (WebDriver): no package is needed."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = "" if shutil.which("chromium") and shutil.which("chromedriver") else "no chromium and chromedriver here"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self.address, self.session = address, session

    def call(self, method: str, path: str, **values: Any) -> Any:
        return _call(method, f"{self.address}/session/{self.session}/{path}".rstrip("/"), values)

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Show a file in a window of that size, and wait until its plots are drawn."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)  # a headless window is 500 wide at least
        self.call("POST", "url", url=path.absolute().as_uri())
        deadline = time.monotonic() + 60
        while not self.run("return document.documentElement.dataset.drawn"):
            assert time.monotonic() < deadline, ("nothing was drawn", self.errors())
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        return self.call("POST", "execute/sync", script=script, args=[])

    def devtools(self, command: str, **values: Any) -> Any:
        return self.call("POST", "goog/cdp/execute", cmd=command, params=values)

    def errors(self) -> list[str]:
        """What the console holds: errors of the script, and what the page was refused."""
        return [entry["message"] for entry in self.call("POST", "se/log", type="browser")]

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(found["data"]))


def _call(method: str, url: str, values: Any) -> Any:
    data = json.dumps(values).encode() if method == "POST" else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["value"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium with an empty profile of its own, gone when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], **quiet)
        try:
            options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            for attempt in range(300):
                try:
                    _call("GET", f"{address}/status", None)
                    break
                except OSError:
                    assert attempt < 299, "chromedriver does not answer"
                    time.sleep(0.1)
            made = _call("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            window = Browser(address, made["sessionId"])
            try:
                yield window
            finally:
                window.call("DELETE", "")
        finally:
            driver.terminate()
            driver.wait()
