"""What sources work on in tests: a WebSocket manager, and a state that is asked for."""

from __future__ import annotations

import asyncio

from safe_broadcaster import BackgroundTasks
from virtual import now


class Manager:
    """A WebSocket manager as the pattern has it."""

    def __init__(self) -> None:
        self.messages: list[dict] = []
        self.times: list[float] = []
        self.active_connections: list[object] = [object()]
        self.takes = 0.0
        self.error: Exception | None = None

    async def broadcast(self, message: dict) -> None:
        await asyncio.sleep(self.takes)
        if self.error is not None:
            raise self.error
        self.messages.append(message)
        self.times.append(now())

    def data(self) -> list[object]:
        return [message["data"] for message in self.messages]


class State:
    """What a fetch returns, and how often it was asked."""

    def __init__(self, value: object = None) -> None:
        self.value = value
        self.fetches = 0
        self.takes = 0.0

    async def fetch(self) -> object:
        self.fetches += 1
        value = self.value
        await asyncio.sleep(self.takes)
        return value


def run(*added, manager=None) -> tuple[Manager, BackgroundTasks]:
    manager = manager or Manager()
    tasks = BackgroundTasks(manager)
    for each in added:
        tasks.add(each)
    return manager, tasks
