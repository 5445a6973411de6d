"""A headless Chromium for tests of pages, driven over the W3C WebDriver protocol with nothing
but the standard library.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """One window. `run` evaluates JavaScript; `errors` are the console's since the last call."""

    def __init__(self, address: str):
        self.address = address

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self.call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def errors(self) -> list[str]:
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextmanager
def browser(profile: Path, width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """A new window with an empty profile in the folder `profile`; closed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        root = Browser(f"http://127.0.0.1:{port}")
        _wait(root)
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        options = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = root.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        window = Browser(f"{root.address}/session/{made['sessionId']}")
        yield window
        window.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=20)


def _wait(root: Browser, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if root.call("GET", "/status")["ready"]:
                return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)
