"""A headless Chromium under our control: what a page shows, asks for, and complains about.

Speaks the DevTools protocol over one WebSocket, which aiohttp brings along; a driver such as
Playwright would download a browser of its own. The event loop runs in a thread, so that tests read
from top to bottom.
"""

from __future__ import annotations

import asyncio
import base64
import json
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_START_S = 20
_ANSWER_S = 60  # a page that draws 20 charts on a busy machine answers late
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # CI runs as root in a container; the pages are our own
    "--remote-debugging-port=0",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",  # containers give /dev/shm 64 MB
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
)
# Reported apart from the console: a violation inside a frame or worker shows only here.
_WATCH = """
window.__violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.__violations.push(`${event.effectiveDirective}: ${event.blockedURI || event.sample}`));
"""


def find_chromium() -> str | None:
    """Return the path of a Chromium on PATH, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A running Chromium with a profile of its own; a context manager.

    Args:
        executable: path of Chromium.
    """

    def __init__(self, executable: str) -> None:
        self._executable = executable
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._pages: dict[str, Page] = {}
        self._last = 0

    def __enter__(self) -> Browser:
        log = Path(self._profile, "log")
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [self._executable, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
                stdout=output,
                stderr=output,
            )
        self._thread.start()
        try:
            address = self._wait_for_port(log)
            self.run(self._connect(address))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Asked to, it ends its helper processes too, which else write on into the profile.
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        if hasattr(self, "_session"):
            self.run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _wait_for_port(self, log: Path) -> str:
        file = Path(self._profile, "DevToolsActivePort")
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.02)
        raise RuntimeError(f"{self._executable} does not start: {log.read_text()[-2000:]}")

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                answer = self._answers.pop(data["id"])
                if not answer.done():
                    answer.set_result(data)
            elif data.get("sessionId") in self._pages:
                self._pages[data["sessionId"]].heard(data["method"], data["params"])

    async def _call(self, method: str, session: str, params: dict[str, Any]) -> Any:
        self._last += 1
        self._answers[self._last] = answer = self._loop.create_future()
        message = {"id": self._last, "method": method, "params": params}
        await self._socket.send_json({**message, "sessionId": session} if session else message)
        data = await asyncio.wait_for(answer, _ANSWER_S)
        if "error" in data:
            raise RuntimeError(f"{method}: {data['error']['message']}")
        return data["result"]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the browser's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_ANSWER_S + 5)

    def call(self, method: str, session: str = "", **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        return self.run(self._call(method, session, params))

    def page(self, width: int = 1200, height: int = 900, dark: bool = False) -> Page:
        """Open a blank tab, with session storage of its own; see `Page.view`."""
        # A browser context for each would cost half a second; only session storage matters here.
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, session["sessionId"], target)
        self._pages[page.session] = page
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            page.call(f"{domain}.enable")
        page.call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
        page.view(width, height, dark)
        return page


class Page:
    """A tab.

    Attributes:
        requests: addresses asked for so far, but `data:` and `blob:`.
        sent: body of each POST so far, by address.
        console: errors of the console, uncaught exceptions, and what the browser itself logs.
    """

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser = browser
        self.session = session
        self._target = target
        self.requests: list[str] = []
        self.sent: list[tuple[str, dict[str, str], Any]] = []
        self.console: list[str] = []
        self._held: queue.Queue[str] = queue.Queue()

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol for this tab."""
        return self.browser.call(method, self.session, **params)

    def view(self, width: int, height: int, dark: bool = False) -> None:
        """Set what the page is shown on.

        Args:
            width: viewport in CSS pixels; below 600 it is a phone: touch, and pixels doubled.
            height: viewport in CSS pixels.
            dark: the reader prefers dark colours.
        """
        phone = width < 600
        scale = 2 if phone else 1
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def heard(self, method: str, params: dict[str, Any]) -> None:
        """Note an event; called on the browser's loop."""
        if method == "Network.requestWillBeSent":
            request = params["request"]
            if not request["url"].startswith(("data:", "blob:")):
                self.requests.append(request["url"])
            if "postData" in request:
                body = json.loads(request["postData"])
                self.sent.append((request["url"], request["headers"], body))
        elif method == "Fetch.requestPaused":
            self._held.put(params["requestId"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            said = [str(a.get("value", a.get("description"))) for a in params["args"]]
            self.console.append(" ".join(said))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.console.append(f"{entry['text']} {entry.get('url', '')}")

    def problems(self) -> list[str]:
        """Return what the console holds and the violations of the page's CSP."""
        return self.console + self.evaluate("window.__violations")

    def go(self, url: str) -> None:
        """Open an address and wait until the page has loaded."""
        answer = self.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise RuntimeError(f"{url}: {answer['errorText']}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 10) -> None:
        """Wait until a JavaScript expression is true; say what the page shows if it never is."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.evaluate(f"Boolean({expression})"):
                return
            time.sleep(0.02)
        shown = self.evaluate("document.body.innerText")
        raise AssertionError(f"not after {timeout_s} s: {expression}\n{self.problems()}\n{shown}")

    def text(self, selector: str) -> str:
        """Return the visible text of the first element that matches."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """Return the visible texts of all elements that match, in the page's order."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.evaluate(f"{found}.map((e) => e.innerText)")

    def visible(self, selector: str) -> bool:
        """Tell whether the first element that matches is shown at all."""
        return self.evaluate(
            f"document.querySelector({json.dumps(selector)}).getClientRects().length > 0"
        )

    def click(self, selector: str) -> None:
        """Click an element's middle with the mouse, wherever the page has put it.

        Raises:
            AssertionError: another element lies over it.
        """
        place = self.evaluate(
            f"""(() => {{
              const element = document.querySelector({json.dumps(selector)});
              element.scrollIntoView({{block: "center", behavior: "instant"}});
              const box = element.getBoundingClientRect();
              const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
              return [x, y, element.contains(document.elementFromPoint(x, y))];
            }})()"""
        )
        assert place[2], f"{selector} is covered, or outside of the page"
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    def fill(self, selector: str, text: str) -> None:
        """Replace what a field holds by typing."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.press("Delete", 46)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key: its name, its Windows key code, and the character it writes."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in a file field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def hold(self, pattern: str) -> None:
        """Hold requests to matching addresses (`*` is anything); '' lets go of all."""
        if pattern:
            self.call("Fetch.enable", patterns=[{"urlPattern": pattern}])
        else:
            self.call("Fetch.disable")

    def let_go(self) -> None:
        """Wait for a held request and send it on."""
        self.call("Fetch.continueRequest", requestId=self._held.get(timeout=_ANSWER_S))

    def answer(self, status: int, headers: dict[str, str], body: str) -> None:
        """Wait for a held request and answer it, as a proxy would."""
        self.call(
            "Fetch.fulfillRequest",
            requestId=self._held.get(timeout=_ANSWER_S),
            responseCode=status,
            responseHeaders=[{"name": n, "value": v} for n, v in headers.items()],
            body=base64.b64encode(body.encode()).decode(),
        )

    def screenshot(self, file: Path) -> Path:
        """Write the whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))
        return file

    def close(self) -> None:
        """Close the tab."""
        self.browser.call("Target.closeTarget", targetId=self._target)
