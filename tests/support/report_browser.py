"""Headless Chromium over its debugging pipe: opens a page at a width and colour scheme, and says what it did.

``python tests/support/report_browser.py REPORT.html SHOT.png [WIDTH HEIGHT SCHEME]`` takes a picture.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Page:
    """What a page asked for, said on the console, and measures."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    values: Any = None
    picture: bytes = b""


class Browser:
    """One Chromium process; commands go through file descriptors 3 and 4, messages end with a zero byte."""

    def __enter__(self) -> Browser:
        assert CHROMIUM
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_end, self._write = map(_moved, os.pipe())
        self._read, write_end = map(_moved, os.pipe())
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
        ]
        # subprocess keeps the pipes' numbers, and Chromium wants 3 and 4.
        renumber = (
            f"import os, sys; os.dup2({read_end}, 3); os.dup2({write_end}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", renumber, CHROMIUM, *flags],
            pass_fds=(read_end, write_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        self._rest, self._last = b"", 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def open(
        self,
        url: str,
        width: int,
        height: int,
        scheme: str,
        script: str = "0",
        picture: bool = False,
        whole: bool = False,
        scale: int = 1,
    ) -> Page:
        """Open ``url``, evaluate ``script`` when it has loaded, and take a picture of the window or the whole page.

        ``scale`` is how many device pixels a CSS pixel has.
        """
        page = Page()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def call(method: str, **arguments: Any) -> Any:
            return self._call(method, session, page, **arguments)

        for domain in ("Page", "Network", "Log", "Runtime"):
            call(f"{domain}.enable")
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        call("Emulation.setDeviceMetricsOverride", **screen)
        call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        call("Page.navigate", url=url)
        while not self._event("Page.loadEventFired", page):
            pass
        answer = call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        page.values = answer["result"].get("value")
        if picture:
            shot = call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
            page.picture = base64.b64decode(shot["data"])
        self._call("Target.closeTarget", targetId=target)
        return page

    def _call(self, method: str, session: str | None = None, page: Page | None = None, **arguments: Any) -> Any:
        self._last += 1
        message = {"id": self._last, "method": method, "params": arguments}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._receive(page)
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def _event(self, name: str, page: Page) -> bool:
        return bool(self._receive(page).get("method") == name)

    def _receive(self, page: Page | None) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._read, 1 << 20)
            assert block, "Chromium has ended"
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if page is not None:
            self._note(message, page)
        return message

    @staticmethod
    def _note(message: dict[str, Any], page: Page) -> None:
        method, content = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            page.requests.append(content["request"]["url"])
        elif method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            page.errors.append(content["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            page.errors.append(content["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            page.errors.append(str(content["args"]))


def _moved(descriptor: int) -> int:
    """The same pipe's end under a number above 9, which 3 and 4 cannot overwrite."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


if __name__ == "__main__":
    report, shot, *more = sys.argv[1:]
    width, height, scheme = (int(more[0]), int(more[1]), more[2]) if more else (1280, 900, "light")
    with Browser() as browser:
        url = Path(report).absolute().as_uri()
        Path(shot).write_bytes(browser.open(url, width, height, scheme, picture=True, whole=height > 4000).picture)
