"""A headless Chromium, driven over its DevTools protocol with nothing but a WebSocket client."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import urllib.request
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
    "--window-size=1280,900",
]  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        await self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        async for text in self._connection:
            message = json.loads(text)
            if message.get("id") == number:
                return message["result"]
        raise EOFError("the browser has gone")

    async def text(self, selector: str) -> str:
        """What stands in an element."""
        code = f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"
        answer = await self.call("Runtime.evaluate", expression=code)
        return answer["result"]["value"]

    async def shows(self, selector: str, wanted, timeout: float = 20.0) -> str:
        """Wait until the text of an element satisfies the condition."""
        deadline = asyncio.get_running_loop().time() + timeout
        while not wanted(text := await self.text(selector)):
            assert asyncio.get_running_loop().time() < deadline, f"{selector} still shows {text!r}"
            await asyncio.sleep(0.05)
        return text

    async def screenshot(self, path: Path) -> None:
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))


@asynccontextmanager
async def browse(url: str, folder: Path) -> AsyncIterator[Page]:
    """Open a page; skips the test, with its reason, where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    profile = folder / "profile"
    command = [program, *FLAGS, f"--user-data-dir={profile}", url]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port_file = profile / "DevToolsActivePort"
            while not port_file.exists() or not port_file.read_text().strip():
                assert process.poll() is None, "chromium ended at once"
                await asyncio.sleep(0.05)
            port = port_file.read_text().split()[0]
            while not (tabs := [tab for tab in await _tabs(port) if tab["type"] == "page"]):
                await asyncio.sleep(0.05)
            async with connect(tabs[0]["webSocketDebuggerUrl"], max_size=None, ping_interval=None) as connection:
                yield Page(connection)
        finally:
            process.terminate()
            process.wait(20)


async def _tabs(port: str) -> list[dict[str, Any]]:
    def fetch() -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
            return json.load(answer)

    return await asyncio.to_thread(fetch)
