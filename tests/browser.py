"""A real Chromium without a window, driven over its DevTools protocol.

Source: Chrome DevTools Protocol, domains Page, Runtime, Emulation, Input and Log. Needs no package: the protocol is JSON over
one WebSocket, which aiohttp speaks.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import pathlib
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_WAIT_S = 30.0


class Page:
    """One tab, or the browser as a whole."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        """What the console got of errors and warnings, broken policies among them."""

    async def listen(self) -> None:
        async for message in self._socket:
            found = message.json()
            if waiter := self._waiting.pop(found.get("id"), None):
                waiter.set_result(found)
            elif found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] in ("error", "warning"):
                self.complaints.append(found["params"]["entry"]["text"])
            elif found.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(found["params"]["exceptionDetails"]))

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        waiter = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        reply = await asyncio.wait_for(waiter, _WAIT_S)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        found = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found)
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        for _ in range(round(_WAIT_S / 0.05)):
            if await self.value(f"Boolean({expression})"):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(
            f"{expression} never came true; the page says: {await self.value('document.body.innerText')}"
        )

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def key(self, name: str, code: int) -> None:
        """Press a key such as Tab (9), Enter (13) or Escape (27)."""
        text = {"text": "\r"} if name == "Enter" else {}
        facts = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **facts, **text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **facts)

    async def type(self, text: str) -> None:
        await self.send("Input.insertText", text=text)

    async def show(self, *, width: int, scheme: str) -> None:
        """Another width in CSS pixels, and light or dark."""
        facts = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await self.send("Emulation.setDeviceMetricsOverride", **facts)
        await self.send("Emulation.setScrollbarsHidden", hidden=True)
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def picture(self, path: pathlib.Path) -> None:
        """The whole page as a PNG file."""
        size = (await self.send("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": await self.value("innerWidth"), "height": size["height"], "scale": 1}
        found = await self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser(folder: pathlib.Path) -> Iterator[str]:
    """The address of a new browser's DevTools, whose profile is `folder`; it is there until the block ends.

    Raises:
        AssertionError: it did not start within 30 s.
    """
    assert CHROMIUM is not None
    words = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    words += (
        "--disable-background-networking",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "about:blank",
    )
    quiet = subprocess.DEVNULL
    process = subprocess.Popen((CHROMIUM, *words), stdout=quiet, stderr=quiet)
    try:
        port_file, end = folder / "DevToolsActivePort", time.monotonic() + _WAIT_S
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert time.monotonic() < end, f"{CHROMIUM} listens to nobody after {_WAIT_S} s; exit {process.poll()}"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
    finally:
        process.terminate()
        process.wait()


@contextlib.asynccontextmanager
async def tab(devtools: str) -> AsyncIterator[Page]:
    """A new tab of a browser, with cookies and storage of its own; `devtools` as `browser` gives it."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{devtools}/json/version") as reply:
            whole = (await reply.json())["webSocketDebuggerUrl"]
        async with _connected(session, whole) as chromium:
            context = (await chromium.send("Target.createBrowserContext"))["browserContextId"]
            found = await chromium.send("Target.createTarget", url="about:blank", browserContextId=context)
            async with _connected(session, f"{devtools}/devtools/page/{found['targetId']}") as page:
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                yield page
            await chromium.send("Target.disposeBrowserContext", browserContextId=context)


@contextlib.asynccontextmanager
async def _connected(session: aiohttp.ClientSession, url: str) -> AsyncIterator[Page]:
    async with session.ws_connect(url.replace("http", "ws", 1), max_msg_size=0) as socket:
        page = Page(socket)
        listening = asyncio.create_task(page.listen())
        try:
            yield page
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
