"""The plainest hub of a WebSocket library: what comes on `/publish` goes to everyone else as it is.

`python -m roles.broadcast_hub LIBRARY LOOP`, the library being `websockets`, `picows` (which has the same interface) or
`socketify` (a loop of its own). Prints its port and serves until standard input closes.
"""

import asyncio
import json
import os
import socket
import sys
import threading

from roles.loops import run


async def serve_broadcast(library: str) -> None:
    if library == "picows":
        from picows.websockets import broadcast, serve  # noqa: PLC0415 only one of them is measured
    else:
        from websockets.asyncio.server import broadcast, serve  # noqa: PLC0415 the same
    subscribers = set()

    async def session(websocket: object) -> None:
        if websocket.request.path == "/publish":
            async for message in websocket:
                broadcast(subscribers, message)
            return
        subscribers.add(websocket)
        try:
            await websocket.wait_closed()
        finally:
            subscribers.discard(websocket)

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    async with serve(session, sock=listener, ping_interval=None, compression=None):
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


def serve_socketify() -> None:
    from socketify import App, CompressOptions  # noqa: PLC0415 the same

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    app = App()
    limits = {"compression": CompressOptions.DISABLED, "max_payload_length": 1 << 20, "idle_timeout": 0}
    app.ws("/ws", {**limits, "open": lambda ws: ws.subscribe("all")})
    app.ws("/publish", {**limits, "message": lambda _, message, opcode: app.publish("all", message, opcode)})

    def listening(_: object) -> None:
        print(json.dumps({"port": port}), flush=True)

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    app.listen({"port": port, "host": "127.0.0.1"}, listening)
    app.run()


if __name__ == "__main__":
    if sys.argv[1] == "socketify":
        serve_socketify()
    else:
        run(serve_broadcast(sys.argv[1]), sys.argv[2])
