"""A page as headless Chromium sees it, over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol).

Chromium reads the protocol from file descriptor 3 and answers on 4 (`--remote-debugging-pipe`), a JSON object before each NUL byte, so
that no package is needed. `python tests/browser.py PAGE.html 1000 PICTURE.png` takes a picture of a page, so many pixels wide.
"""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

# Without a sandbox, since root (in a container, say) may have none; what is opened here are our own pages. Nothing of the browser's own
# goes out either: every name is unknown.
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-component-update",
           "--disable-background-networking", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe"]


def chromium() -> str | None:
    """The browser: CHROMIUM of the environment, as it is; else the first of its usual names that is found and starts, or None."""
    if os.environ.get("CHROMIUM"):
        return os.environ["CHROMIUM"]
    for name in ("chromium", "chromium-browser", "google-chrome"):
        # Ubuntu's chromium-browser without snap is a script that says so.
        if shutil.which(name) and subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            return name
    return None


class Page:
    """One tab. seen: every event that the browser has reported, as (method, parameters)."""

    def __init__(self, to_browser: int, from_browser: int, log: Path):
        self.seen: list[tuple[str, dict]] = []
        self._to, self._from, self._log = to_browser, from_browser, log
        self._number, self._session, self._rest = 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, path: Path, width: int, mobile: bool = False) -> None:
        """Load a file, until all of it is there, in a window of so many CSS pixels; mobile: of a phone, which lays a page out for a wide
        screen and shrinks it, unless the page says not to."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile)
        self.seen.clear()
        failure = self.call("Page.navigate", url=path.resolve().as_uri()).get("errorText")
        assert failure is None, f"{path}: {failure}"
        while "Page.loadEventFired" not in (method for method, _ in self.seen):
            self._next()

    def value(self, expression: str) -> object:
        """What JavaScript makes of an expression, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"]

    def requests(self) -> set[str]:
        """The URLs that the page has asked for."""
        return {parameters["request"]["url"] for method, parameters in self.seen if method == "Network.requestWillBeSent"}

    def screenshot(self) -> Image.Image:
        """The whole page, one pixel for each CSS pixel."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")

    def _next(self, seconds: float = 60) -> dict:
        """The next message, which is noted where it is an event."""
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                said = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"Chromium {'ended' if ready else f'said nothing for {seconds:g} s'}: {said}")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.seen.append((message["method"], message["params"]))
        return message


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A tab of a Chromium of its own, which has a new profile and ends with the block."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        log = Path(profile, "stderr")
        theirs_in, to_browser = os.pipe()
        from_browser, theirs_out = os.pipe()
        # A shell puts the pipes on 3 and 4, whatever they are here (theirs_out, opened last, cannot be 3).
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', program, *OPTIONS, f"--user-data-dir={profile}"]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=(theirs_in, theirs_out))
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(to_browser, from_browser, log)
        finally:
            os.close(to_browser)  # at which Chromium ends
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(from_browser)


if __name__ == "__main__":
    program = chromium() or sys.exit("no Chromium is found here: install it, or give its path in CHROMIUM")
    with browser(program) as tab:
        tab.open(Path(sys.argv[1]), int(sys.argv[2]))
        tab.screenshot().save(sys.argv[3])
