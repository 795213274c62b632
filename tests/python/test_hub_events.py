"""Server-Sent Events of the hub in a real browser: `EventSource` comes back by itself and misses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from browser import browse
from safe_broadcaster import EventBroadcaster

if TYPE_CHECKING:
    from pathlib import Path

PAGE = """<!doctype html><p id=state></p><p id=seen></p><script>
const source = new EventSource("/events?match=*"), seen = [];
const show = (id, text) => { document.getElementById(id).textContent = text; };
source.addEventListener("subscribed", event => show("state", String(JSON.parse(event.data).recovered)));
source.addEventListener("event", event => { seen.push(JSON.parse(event.data).data.data); show("seen", seen.join()); });
source.addEventListener("bye", () => show("state", "bye"));
</script>"""


@pytest.mark.timeout(120)
async def test_a_browser_hears_events_and_recovers_those_it_missed(tmp_path: Path) -> None:
    settings = {"page": PAGE, "log_path": tmp_path / "hub.db"}
    hub = EventBroadcaster(port=0, **settings)
    await hub.start()
    async with browse(f"http://127.0.0.1:{hub.port}/", tmp_path) as page:
        await page.shows("#state", lambda text: text == "undefined")
        for n in range(3):
            await hub.broadcast("x", n)
        await page.shows("#seen", lambda text: text == "0,1,2")
        port = hub.port
        await hub.stop()
        await page.shows("#state", lambda text: text == "bye")
        again = EventBroadcaster(port=port, **settings)
        await again.start()
        await again.broadcast("x", 3)
        await page.shows("#state", lambda text: text == "true")
        await page.shows("#seen", lambda text: text == "0,1,2,3")
        await again.stop()
