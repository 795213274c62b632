"""The broadcasting templates work as they were written, on a hub or a ConnectionManager, and as sources."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import pytest

from asgi import subscriber
from safe_broadcaster import BackgroundTasks as Sources
from safe_broadcaster import ConfigError, ConnectionManager, EventBroadcaster, sources
from support import eventually

logger = logging.getLogger(__name__)

PAUSE = 0.01
"""Stands for the templates' 5 seconds."""


class Tab:
    """A browser's tab: what its WebSocket got."""

    def __init__(self) -> None:
        self.messages: list[dict] = []
        self.heard = 0

    async def accept(self) -> None: ...
    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...

    async def send_text(self, data: str) -> None:
        self.messages.append(json.loads(data))

    async def listen(self, ws) -> None:
        async for text in ws:
            self.messages.append(json.loads(text)["data"])

    async def hears(self, *wanted: dict) -> None:
        """Wait for what it was to get next."""
        self.heard += len(wanted)
        await eventually(lambda: len(self.messages) >= self.heard)
        assert self.messages[self.heard - len(wanted) : self.heard] == list(wanted)


@contextlib.asynccontextmanager
async def opened(websocket_manager):
    """A dashboard, opened in whatever way the manager has."""
    tab = Tab()
    if isinstance(websocket_manager, ConnectionManager):
        await websocket_manager.connect(tab)
        yield tab
        await websocket_manager.disconnect(tab)
        return
    async with subscriber(websocket_manager.url, "*") as (ws, _), ended(asyncio.create_task(tab.listen(ws))):
        yield tab


@pytest.fixture(params=["hub", "manager"])
async def websocket_manager(request):
    async with EventBroadcaster(port=0) if request.param == "hub" else ConnectionManager() as manager:
        yield manager


@pytest.fixture
async def tabs(websocket_manager):
    """Two dashboards."""
    async with opened(websocket_manager) as one, opened(websocket_manager) as other:
        yield one, other


async def hear(tabs, *wanted) -> None:
    for tab in tabs:
        await tab.hears(*wanted)


@contextlib.asynccontextmanager
async def ended(*tasks):
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_template_1_background_polling(websocket_manager, tabs, caplog) -> None:
    data = {"n": 1}

    def get_FEATURE_data():
        return dict(data)

    class BackgroundTasks:
        def __init__(self, websocket_manager):
            self.websocket_manager = websocket_manager
            self.last_FEATURE_state = None

        async def _broadcast_FEATURE_updates(self):
            while True:
                try:
                    current_state = get_FEATURE_data()
                    if current_state != self.last_FEATURE_state:
                        await self.websocket_manager.broadcast({
                            "type": "FEATURE_update",
                            "data": current_state
                        })  # fmt: skip
                        self.last_FEATURE_state = current_state
                        logger.debug("[WS] Broadcast FEATURE update")
                    await asyncio.sleep(PAUSE)
                except Exception as e:
                    logger.error(f"[WS] Error broadcasting FEATURE updates: {e}")
                    await asyncio.sleep(PAUSE)

        async def start(self):
            self.task = asyncio.create_task(self._broadcast_FEATURE_updates())

    tasks = BackgroundTasks(websocket_manager)
    await tasks.start()
    async with ended(tasks.task):
        await hear(tabs, {"type": "FEATURE_update", "data": {"n": 1}})
        data["n"] = 2
        await hear(tabs, {"type": "FEATURE_update", "data": {"n": 2}})
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_template_1_as_a_source_and_its_log_line(websocket_manager, tabs, caplog) -> None:
    caplog.set_level(logging.DEBUG, "safe_broadcaster.sources")
    data = {"n": 1}

    def get_FEATURE_data():
        return dict(data)

    tasks = Sources(websocket_manager)
    tasks.add(sources.poll(get_FEATURE_data, every=PAUSE, minimum=PAUSE, event_type="FEATURE_update"))
    async with tasks:
        await hear(tabs, {"type": "FEATURE_update", "data": {"n": 1}})
        data["n"] = 2
        await hear(tabs, {"type": "FEATURE_update", "data": {"n": 2}})
    lines = [record.getMessage() for record in caplog.records if "Broadcast FEATURE" in record.getMessage()]
    assert lines == ["Broadcast FEATURE_update"] * 2


class Repository:
    class Item:
        def __init__(self, item_id: str) -> None:
            self.item_id = item_id

        def to_dict(self) -> dict:
            return {"id": self.item_id}

    update = Item


async def test_template_2_event_driven(websocket_manager, tabs) -> None:
    async def process_FEATURE_event(event_data):
        if event_data == "bad":
            raise ValueError(event_data)
        return {"done": event_data}

    class Coordinator:
        def __init__(self, websocket_manager):
            self.websocket_manager = websocket_manager

        async def handle_FEATURE_event(self, event_data):
            try:
                result = await process_FEATURE_event(event_data)
                await self.websocket_manager.broadcast({
                    "type": "FEATURE_update",
                    "data": result
                })  # fmt: skip
                logger.info(f"[WS] Broadcast FEATURE event: {event_data}")
            except Exception as e:
                logger.error(f"[WS] Error handling FEATURE event: {e}")

    class YourService:
        def __init__(self, websocket_manager):
            self.repository = Repository()
            self.websocket_manager = websocket_manager

        async def update_something(self, item_id: str):
            item = self.repository.update(item_id)
            await self.websocket_manager.broadcast({
                "type": "FEATURE_update",
                "data": item.to_dict()
            })  # fmt: skip
            return item

    coordinator = Coordinator(websocket_manager)
    await coordinator.handle_FEATURE_event("a")
    await coordinator.handle_FEATURE_event("bad")
    assert (await YourService(websocket_manager).update_something("i7")).item_id == "i7"
    await hear(
        tabs,
        {"type": "FEATURE_update", "data": {"done": "a"}},
        {"type": "FEATURE_update", "data": {"id": "i7"}},
    )


async def test_template_2_as_a_source(websocket_manager, tabs, caplog) -> None:
    @sources.on_event("FEATURE_update", to=websocket_manager)
    async def handle_FEATURE_event(event_data):
        if event_data == "bad":
            raise ValueError(event_data)
        return {"done": event_data}

    await handle_FEATURE_event("a")
    await handle_FEATURE_event("bad")
    await handle_FEATURE_event("b")
    await hear(tabs, *({"type": "FEATURE_update", "data": {"done": each}} for each in "ab"))
    assert "ValueError: bad" in caplog.text


async def test_template_3_hybrid(websocket_manager, tabs) -> None:
    data = {"n": 1}

    async def get_FEATURE_data():
        return dict(data)

    queue = sources.hybrid(get_FEATURE_data, every=PAUSE, minimum=PAUSE, event_type="FEATURE_update")

    @queue.on_event
    async def on_FEATURE_event(event_data):
        return event_data

    tasks = Sources(websocket_manager)
    tasks.add(queue)
    async with tasks:
        await hear(tabs, {"type": "FEATURE_update", "data": {"n": 1}})
        data["n"] = 2
        await on_FEATURE_event({"n": 2})
        rounds = queue.rounds
        await eventually(lambda: queue.rounds > rounds + 3)
        data["n"] = 3  # an event that is missed
        await hear(tabs, *({"type": "FEATURE_update", "data": {"n": n}} for n in (2, 3)))
    assert queue.emitted == 3


async def test_template_4_conditional(websocket_manager) -> None:
    state = {"count": 100}

    def get_FEATURE_data():
        return dict(state)

    class BackgroundTasks:
        def __init__(self, websocket_manager):
            self.websocket_manager = websocket_manager
            self.last_FEATURE_state = None
            self.skipped = 0

        async def _broadcast_FEATURE_updates(self):
            while True:
                try:
                    current_state = get_FEATURE_data()
                    if current_state == self.last_FEATURE_state:
                        await asyncio.sleep(PAUSE)
                        continue
                    if not self.websocket_manager.active_connections:
                        self.skipped += 1
                        await asyncio.sleep(PAUSE)
                        continue
                    if not self._is_significant_change(current_state, self.last_FEATURE_state):
                        await asyncio.sleep(PAUSE)
                        continue
                    await self.websocket_manager.broadcast({
                        "type": "FEATURE_update",
                        "data": current_state
                    })  # fmt: skip
                    self.last_FEATURE_state = current_state
                    await asyncio.sleep(PAUSE)
                except Exception as e:
                    logger.error(f"[WS] Error broadcasting FEATURE: {e}")
                    await asyncio.sleep(PAUSE)

        def _is_significant_change(self, new_state, old_state):
            if old_state is None:
                return True
            old_count = old_state.get("count", 0)
            new_count = new_state.get("count", 0)
            return abs(new_count - old_count) / max(old_count, 1) > 0.1

    tasks = BackgroundTasks(websocket_manager)
    ours = Sources(websocket_manager)
    source = ours.add(
        sources.conditional(
            get_FEATURE_data,
            every=PAUSE,
            minimum=PAUSE,
            event_type="FEATURE_update",
            significant=tasks._is_significant_change,
        )
    )
    async with ours, ended(asyncio.create_task(tasks._broadcast_FEATURE_updates())):
        await eventually(lambda: tasks.skipped and source.unheard)
        assert (tasks.last_FEATURE_state, source.emitted) == (None, 0)
        async with opened(websocket_manager):
            await eventually(lambda: tasks.last_FEATURE_state == {"count": 100} and source.emitted == 1)
            state["count"] = 105
            await eventually(lambda: source.insignificant)
            state["count"] = 120
            await eventually(lambda: tasks.last_FEATURE_state == {"count": 120} and source.emitted == 2)


async def test_the_monitor_that_compares_its_state_as_text(websocket_manager, tabs) -> None:
    class Monitor:
        def __init__(self, websocket_manager):
            self.websocket_manager = websocket_manager
            self.last_adw_monitor_state = None
            self.data = {"b": 1, "a": [1, 2]}

        async def _broadcast_adw_monitor_updates(self):
            while True:
                try:
                    current_data = self.data
                    current_state = json.dumps(current_data, sort_keys=True)

                    if current_state != self.last_adw_monitor_state:
                        await self.websocket_manager.broadcast({
                            "type": "adw_monitor_update",
                            "data": current_data
                        })  # fmt: skip
                        self.last_adw_monitor_state = current_state
                        logger.debug("[WS] Broadcast ADW monitor update")

                    await asyncio.sleep(PAUSE)
                except Exception as e:
                    logger.error(f"[WS] Error broadcasting ADW monitor: {e}")
                    await asyncio.sleep(PAUSE)

    monitor = Monitor(websocket_manager)
    async with ended(asyncio.create_task(monitor._broadcast_adw_monitor_updates())):
        await hear(tabs, {"type": "adw_monitor_update", "data": {"b": 1, "a": [1, 2]}})
        monitor.data["a"].append(3)
        await hear(tabs, {"type": "adw_monitor_update", "data": {"b": 1, "a": [1, 2, 3]}})


async def test_a_phase_that_completes_is_broadcast_with_fields_of_its_own(websocket_manager, tabs) -> None:
    class PhaseQueue:
        class Phase:
            parent_issue = 12
            status = "running"

        def __init__(self) -> None:
            self.phase = self.Phase()

        def get_by_id(self, queue_id: str) -> Phase:
            return self.phase

        def update(self, phase: Phase) -> None:
            assert phase.status == "completed"

    class PhaseCoordinator:
        def __init__(self, websocket_manager):
            self.websocket_manager = websocket_manager
            self.phase_queue_service = PhaseQueue()

        async def _on_phase_complete(self, queue_id: str):
            try:
                phase = self.phase_queue_service.get_by_id(queue_id)
                phase.status = "completed"
                self.phase_queue_service.update(phase)
                event = {
                    "type": "queue_update",
                    "queue_id": queue_id,
                    "status": "completed",
                    "parent_issue": phase.parent_issue
                }  # fmt: skip
                await self.websocket_manager.broadcast(event)
                logger.info(f"[WS] Broadcast phase complete: {queue_id}")
            except Exception as e:
                logger.error(f"[WS] Error in phase completion: {e}")

    await PhaseCoordinator(websocket_manager)._on_phase_complete("q1")
    await hear(tabs, {"type": "queue_update", "queue_id": "q1", "status": "completed", "parent_issue": 12})


async def test_a_hub_takes_a_whole_event_or_its_parts_and_no_mixture() -> None:
    async with EventBroadcaster(port=0) as hub:
        await hub.broadcast({"type": "a", "x": 1})
        await hub.broadcast("b", None, "t")
        assert [message["data"] for message in hub.get_messages_since(0)] == [
            {"type": "a", "x": 1},
            {"type": "b", "data": None, "topic": "t"},
        ]
        for wrong in ({"data": 1}, {"topic": "t"}):
            with pytest.raises(ConfigError, match="beside a whole event"):
                await hub.broadcast({"type": "a"}, **wrong)
        with pytest.raises(ConfigError, match="data= is missing"):
            await hub.broadcast("a")


async def test_a_hub_tells_of_its_connections_as_a_manager_does() -> None:
    hub = EventBroadcaster(port=0)
    assert (hub.get_connection_count(), hub.active_connections) == (0, [])
    async with hub:
        async with opened(hub), opened(hub):
            assert hub.get_connection_count() == len(set(hub.active_connections)) == 2
        await eventually(lambda: not hub.active_connections)
        assert hub.get_connection_count() == 0
