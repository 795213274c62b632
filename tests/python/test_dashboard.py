"""The page, in a real browser, beside a real hub that goes away and comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from browser import browse
from safe_broadcaster import EventBroadcaster, dashboard


def node(n: int) -> dict:
    return {"type": "graph.delta.node.upsert", "topic": "graph/ada/delta/node", "content": {"id": f"n{n}"}}


def heartbeat(spill: int) -> dict:
    content = {"citizen_id": "ada", "interval": 1.0, "stats": {"current_spill_depth": spill}}
    return {"type": "graph.delta.heartbeat", "topic": "graph/ada/delta/heartbeat", "content": content}


@pytest.mark.timeout(120)
async def test_the_page_counts_shows_offline_and_recovers(tmp_path) -> None:
    settings = {"page": dashboard.page(), "log_path": tmp_path / "hub.db"}
    hub = EventBroadcaster(port=0, **settings)
    await hub.start()
    async with browse(f"http://127.0.0.1:{hub.port}/", tmp_path) as page:
        await page.shows("#state", lambda text: text == "live")
        for n in range(7):
            await hub.broadcast_event(node(n))
        await hub.broadcast_event(heartbeat(0))
        await page.shows("#nodes", lambda text: text == "7")
        await page.shows("#engines", lambda text: "ada" in text)
        silent = {"emitter": "e", "topic": "graph/ada/delta/heartbeat", "state": "dead", "silent": 61.0, "alert": True}
        await hub.broadcast("presence.dead", silent)
        await page.shows("#notices", lambda text: "ada is dead: no heartbeat for 61 s" in text)
        await hub.broadcast_event({"type": "graph.delta.heartbeat.gone", "content": {"citizen_id": "ada"}})
        await page.shows("#engines", lambda text: "ended" in text)
        port = hub.port
        await hub.stop()
        await page.shows("#state", lambda text: text != "live")
        again = EventBroadcaster(port=port, **settings)
        await again.start()
        await again.broadcast_event(node(7))
        await page.shows("#state", lambda text: text == "live")
        await page.shows("#nodes", lambda text: text == "8")
        if folder := os.environ.get("SCREENSHOTS"):  # for people who want to look at it
            await page.screenshot(Path(folder) / "dashboard.png")
        await again.stop()
