"""An aggregator with all that belongs to it: events to a WebSocket, adaptive intervals, a breaker that heals itself.

    python examples/advanced_aggregator.py

Everything is in this process, and times are shortened to some seconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from safe_broadcaster import AdaptiveInterval, Aggregator, CircuitBreaker, TimeScale
from safe_broadcaster.aggregator import Outcome, Window, summarise

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVALS = {
    TimeScale.MICRO: AdaptiveInterval(base=0.02, minimum=0.01, maximum=0.1, threshold=0.5),
    TimeScale.MESO: AdaptiveInterval(base=0.2, minimum=0.1, maximum=1.0, threshold=0.3),
    TimeScale.MACRO: None,  # five minutes are too long for an example
}

received: list[dict[str, Any]] = []


async def receive(connection: ServerConnection) -> None:
    """Stand for the system that takes the events."""
    async for message in connection:
        received.append(json.loads(message))  # noqa: PERF401 - one by one, as they come


class Source:
    """What is looked at; it can be made to fail."""

    failing = False

    async def aggregate(self, window: Window, before: Window | None) -> Outcome:
        """Sum up what was observed."""
        if self.failing:
            raise ConnectionError("the source does not answer")
        return summarise(window, before)


async def observe(aggregator: Aggregator, activity: float, seconds: float) -> None:
    """Observe the same activity for a while."""
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        aggregator.observe("lambda_max", activity)
        await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    """Look now and then until it is so."""
    while not condition():  # noqa: ASYNC110 - a status has no bell
        await asyncio.sleep(0.01)


def show(what: str, aggregator: Aggregator) -> None:
    """Print the status in a line."""
    status = aggregator.get_status()["status"]
    breaker = "tripped" if status["circuit_breaker"]["tripped"] else "closed"
    print(f"{what}: every {status['adaptive_intervals']['micro']:.3f} s, breaker {breaker}, {len(received)} received")


async def main(phase: float = 1.0) -> None:
    """Go through a quiet time, a spike, and an outage of the source, each for so many seconds."""
    source = Source()
    async with serve(receive, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}") as websocket:

            async def websocket_emitter(event: dict[str, Any]) -> None:
                await websocket.send(json.dumps(event))

            aggregator = Aggregator(
                novelty_threshold=0.75,
                event_emitter=websocket_emitter,
                event_queue_size=5000,
                aggregate=source.aggregate,
                intervals=INTERVALS,
                circuit_breaker=CircuitBreaker(cooldown_period=phase / 2),
            )
            async with aggregator as agg:
                await observe(agg, 0.1, phase)
                show("quiet", agg)
                await observe(agg, 0.9, phase)
                show("spike", agg)
                source.failing = True
                await until(lambda: agg.circuit_breaker.tripped)
                show("outage", agg)
                source.failing = False
                await until(lambda: agg.circuit_breaker.consecutive_failures == 0)
                show("healed", agg)


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    asyncio.run(main())
