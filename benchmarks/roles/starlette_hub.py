"""The hub as it is written in Python today: a Starlette WebSocket route and a manager that sends to each subscriber.

`python -m roles.starlette_hub LOOP` serves until standard input closes. A socket that sends a `subscribe` frame is a
subscriber; what any other sends is wrapped as an event and sent on.
"""

import asyncio
import json
import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from roles.loops import run


class ConnectionManager:
    """Holds the subscribers and numbers what it sends to them."""

    def __init__(self) -> None:
        self.active: list[WebSocket] = []
        self.sequence = 0

    async def broadcast(self, event: dict) -> None:
        self.sequence += 1
        text = json.dumps({"type": "event", "seq": self.sequence, "data": event})
        for websocket in list(self.active):
            await websocket.send_text(text)


manager = ConnectionManager()


async def endpoint(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            frame = json.loads(await websocket.receive_text())
            if frame["type"] == "subscribe":
                manager.active.append(websocket)
                await websocket.send_text(json.dumps({"action": "subscribed", "events": frame["data"]["events"]}))
            else:
                await manager.broadcast(frame)
    except WebSocketDisconnect:
        if websocket in manager.active:
            manager.active.remove(websocket)


async def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"ws://127.0.0.1:{listener.getsockname()[1]}/ws"
    app = Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    # The loop that runs is the one that serves; compression off, as in what it is compared with.
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws_per_message_deflate=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    # Who connects before it serves waits in the listener's queue.
    print(json.dumps({"publish": url, "subscribe": url}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving


if __name__ == "__main__":
    run(main(), sys.argv[1])
