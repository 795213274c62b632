"""A FastAPI application with everything around the hub: sources, an ordered start, an engine with heartbeats.

    pip install 'safe-broadcaster[fastapi]'
    python examples/fastapi_systems.py        # then open http://127.0.0.1:8000/hub/

It polls a status, a load (only while somebody listens, and if it has changed by a tenth) and a queue (told of changes
at once, polled in case that was forgotten), broadcasts what its routes and webhooks do, and carries the hub on its own
port for the engine in another process.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from safe_broadcaster import (
    BackgroundTasks,
    BootSequence,
    EventBroadcaster,
    Heartbeat,
    SafeBroadcaster,
    dashboard,
    sources,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STARTED = time.monotonic()
phases: list[dict[str, Any]] = []
load = {"requests": 0}

hub = EventBroadcaster(port=0, page=dashboard.page())
tasks = BackgroundTasks(hub)


def read_status() -> dict[str, Any]:
    """Ask what takes a moment, as a database does: a plain function is called in a thread."""
    return {"status": "ok", "minutes": int(time.monotonic() - STARTED) // 60}


async def read_queue() -> list[dict[str, Any]]:
    """Read the queue, which somebody else may have changed too."""
    return phases


status = tasks.add(sources.poll(read_status, every=5.0, event_type="system_status"))
requests = tasks.add(
    sources.conditional(lambda: dict(load), every=1.0, event_type="load_update", significant=0.1, topic="system/load")
)
queue = tasks.add(sources.hybrid(read_queue, every=5.0, event_type="queue_update"))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Start the hub before what broadcasts on it, and stop both in reverse."""
    boot = BootSequence(progress=print)
    boot.add("hub", hub, ready=hub.is_listener_healthy)
    boot.add("sources", tasks, depends_on=["hub"])
    async with boot:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/hub", hub.asgi())


@app.middleware("http")
async def count(request: Any, call_next: Any) -> Any:
    """Count requests, so that the load changes."""
    load["requests"] += 1
    return await call_next(request)


@app.post("/items")
@sources.on_event("item_update", to=hub, errors="raise")
async def create_item(data: dict[str, Any]) -> dict[str, Any]:
    """Create an item, and broadcast it."""
    return {**data, "id": len(data)}


@app.post("/webhook")
@sources.on_event("webhook_received", to=hub)
async def handle_webhook(payload: dict[str, Any]) -> dict[str, Any] | None:
    """Broadcast what another system tells."""
    return {"action": payload["action"]}


@app.post("/phases")
async def add_phase(phase: dict[str, Any]) -> dict[str, int]:
    """Change the queue, and tell at once."""
    phases.append(phase)
    await queue.notify()
    return {"phases": len(phases)}


@app.get("/sources")
async def how_they_do() -> list[dict[str, Any]]:
    """Tell how the sources do."""
    return tasks.status()


async def engine(url: str, spill_path: str = "engine.db", beat: float = 30.0) -> None:
    """Run an engine until it is stopped; the process around it is somebody else's."""
    broadcaster = SafeBroadcaster(url, spill_path)
    ticks = 0
    boot = BootSequence(timeout=60.0)
    boot.add("broadcaster", broadcaster, ready=broadcaster.ready)
    heartbeat = Heartbeat(broadcaster, "ada", interval=beat, snapshot=lambda: {"last_tick": ticks})
    boot.add("heartbeat", heartbeat, depends_on=["broadcaster"])
    async with boot:
        while True:
            await broadcaster.safe_emit({"type": "graph.delta.node.upsert", "topic": "graph/ada/delta/node",
                                         "content": {"node_id": f"n{ticks}"}})  # fmt: skip
            ticks += 1
            await asyncio.sleep(0.5)


if __name__ == "__main__":
    if sys.argv[1:]:
        asyncio.run(engine(*sys.argv[1:3]))
    else:
        with subprocess.Popen([sys.executable, __file__, "ws://127.0.0.1:8000/hub/ws"]) as process:
            uvicorn.run(app, port=8000)
            process.terminate()
