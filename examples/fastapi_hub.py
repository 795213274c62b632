"""A FastAPI application that carries the hub on its own port.

    pip install 'safe-broadcaster[fastapi]'
    python examples/fastapi_hub.py            # then open http://127.0.0.1:8000/

An engine in another process emits into it: ``SafeBroadcaster("ws://127.0.0.1:8000/hub/ws")``. Here that process is
started too, so that the page has something to show.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from safe_broadcaster import EventBroadcaster, SafeBroadcaster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE = """<!doctype html><title>Alerts</title><h1>Alerts</h1>
<button onclick="fetch('/alerts', {method: 'POST', headers: {'content-type': 'application/json'},
  body: JSON.stringify({severity: 'high', message: 'door open'})})">Raise one</button><ol id=list></ol>
<script>
let position                                       // where we stand: what was missed is sent again from here
function open() {
  const ws = new WebSocket(`ws://${location.host}/hub/ws`, 'sb.v1.json')
  const data = {events: ['alert.*', 'engine.*'], since: position}
  ws.onopen = () => ws.send(JSON.stringify({type: 'subscribe', data}))
  ws.onmessage = ({data}) => {
    const frame = JSON.parse(data)
    if (frame.action === 'subscribed' && !frame.recovered) position = {epoch: frame.epoch, offset: frame.offset}
    if (frame.type === 'ping') ws.send('{"type":"pong"}')
    if (frame.type !== 'event') return
    position.offset = frame.seq
    const item = document.createElement('li')
    item.textContent = JSON.stringify(frame.data)
    list.prepend(item)
  }
  ws.onclose = ({code}) => { if (code < 3500 || code >= 4000) setTimeout(open, 500 + Math.random() * 1000) }
}
open()
</script>"""


class Alert(BaseModel):
    """What an alert must look like; anything else is refused before it is sent."""

    severity: str
    message: str


# Its own port is for programs that are not behind this server; 0 takes any free one.
hub = EventBroadcaster(port=0)
hub.events.register("alert.*", Alert)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Start and stop the hub with the server."""
    async with hub:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/hub", hub.asgi())


@app.get("/")
async def page() -> HTMLResponse:
    """Show alerts as they come."""
    return HTMLResponse(PAGE)


@app.post("/alerts")
async def raise_alert(alert: Alert) -> dict[str, int]:
    """Broadcast an alert, and say how many dashboards it is on its way to."""
    return {"dashboards": await hub.broadcast_alert(alert.model_dump(), "alert.created")}


@app.websocket("/alerts")
async def alerts(websocket: WebSocket) -> None:
    """Serve clients that say nothing: all alerts, from now on."""
    await hub.connect(websocket, events=["alert.*"])
    try:
        while True:
            await hub.handle_message(websocket, await websocket.receive_text())
    except WebSocketDisconnect:
        await hub.disconnect(websocket)


async def engine(url: str, spill_path: str = "engine.db", ticks: int = 1_000_000, pause: float = 1.0) -> None:
    """Emit a heartbeat now and then; the process around it is somebody else's."""
    async with SafeBroadcaster(url, spill_path) as broadcaster:
        for tick in range(ticks):
            await broadcaster.safe_emit({"type": "engine.heartbeat", "content": {"tick": tick}})
            await asyncio.sleep(pause)


if __name__ == "__main__":
    if sys.argv[1:]:
        asyncio.run(engine(*sys.argv[1:3]))
    else:
        with subprocess.Popen([sys.executable, __file__, "ws://127.0.0.1:8000/hub/ws"]) as process:
            uvicorn.run(app, port=8000)
            process.terminate()
