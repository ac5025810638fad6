"""A headless Chromium, driven through its DevTools protocol over two pipes, for tests that look at a page."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# The browser reads what we say on descriptor 3, and answers on 4; a fork of a process with JAX's threads might hang.
_WIRE = """
import os, sys
a, b = (os.dup(int(n)) for n in sys.argv[1:3])
os.dup2(a, 3)
os.dup2(b, 4)
for n in (3, 4):
    os.set_inheritable(n, True)
os.execv(sys.argv[3], sys.argv[3:])
"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The browser's program; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser of its own, without network.

    Args:
        program: of the browser.
        folder: for its profile.
    """

    def __init__(self, program: str, folder: Path):
        to_it, ours = os.pipe()
        theirs, from_it = os.pipe()[::-1]

        self._process = subprocess.Popen(
            [
                sys.executable, "-c", _WIRE, str(to_it), str(theirs), program, "--headless=new", "--no-sandbox",
                "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
                "--disable-dev-shm-usage", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={folder}", "about:blank",
            ],
            pass_fds=(to_it, theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_it)
        os.close(theirs)
        self._ours, self._from, self._number, self._rest = ours, from_it, 0, b""
        self.events: list[dict[str, Any]] = []
        """What the page said and loaded."""
        page = next(t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._ours)
        os.close(self._from)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to the page."""
        return self._ask(method, self._session, **params)

    def open(self, page: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a page from the disk in a window of this size."""
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media="", features=[scheme])
        self("Page.navigate", url=page.resolve().as_uri())
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            pass

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, as a person presses it."""
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, whole: bool = False) -> bytes:
        """PNG of what is shown, or of the whole page."""
        return base64.b64decode(self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def paper(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self("Page.printToPDF", printBackground=False)["data"])

    def _ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._ours, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 2**20)
            assert more, "the browser has ended"
            self._rest += more
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)
