"""Headless Chromium, driven by chromedriver over HTTP.

Source: W3C WebDriver, https://www.w3.org/TR/webdriver2/.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def programs() -> tuple[str, str] | None:
    """Chromium and its driver; None where one is missing."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    return None if found[0] is None or found[1] is None else (found[0], found[1])


class Browser:
    """One window."""

    def __init__(self, port: int, chromium: str, folder: Path) -> None:
        self._port, self._session = port, ""
        # Its sandbox does not run as root.
        sandbox = () if os.geteuid() else ("--no-sandbox",)
        arguments = [*OPTIONS, *sandbox, f"--user-data-dir={folder}"]
        asked = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._do("POST", "", {"capabilities": {"alwaysMatch": asked}})
        self._session = f"/{made['sessionId']}"

    def _do(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        with contextlib.closing(connection):
            text = None if method == "GET" else json.dumps(body or {})
            connection.request(method, f"/session{self._session}{path}", text)
            value = json.loads(connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value['message']}")
        return value

    def open(self, url: str) -> None:
        """Show a page; what was complained about before is forgotten."""
        self.complaints()
        self._do("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns in the page."""
        return self._do("POST", "/execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        return str(self._do("GET", f"/element/{self._find(selector)}/text"))

    def type(self, selector: str, text: str) -> None:
        """Keys, or for a choice of a file its path."""
        self._do("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, key: str) -> None:
        """One key, to whatever has the focus."""
        presses = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": presses}]
        self._do("POST", "/actions", {"actions": actions})

    def size(self, width: int, height: int) -> None:
        """The page's, in pixels; no window is as narrow as a telephone."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1}
        asked = {"cmd": "Emulation.setDeviceMetricsOverride"}
        params = {**screen, "mobile": False}
        self._do("POST", "/goog/cdp/execute", {**asked, "params": params})

    def wait(self, script: str) -> Any:
        """What a script returns, once that is something true."""
        end = time.monotonic() + 120
        while not (found := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.05)
        return found

    def picture(self) -> bytes:
        """A PNG of what is shown."""
        return base64.b64decode(self._do("GET", "/screenshot"))

    def complaints(self) -> list[str]:
        """What the console says, such as what the page's policy forbade."""
        return [e["message"] for e in self._do("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._do("DELETE", "")

    def _find(self, selector: str) -> str:
        asked = {"using": "css selector", "value": selector}
        return str(self._do("POST", "/element", asked)[_ELEMENT])


@contextlib.contextmanager
def browsing(chromium: str, driver: str, folder: Path) -> Iterator[Browser]:
    """A window of a fresh profile in this folder."""
    started = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    try:
        port = 0
        for line in started.stdout:
            if "started successfully on port" in line:
                port = int(line.rstrip(".\n ").rpartition(" ")[2])
                break
        assert port, "chromedriver ended without listening"
        browser = Browser(port, chromium, folder)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        started.terminate()
        started.communicate()
