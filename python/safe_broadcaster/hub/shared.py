"""One hub for a whole program, made at first use."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from typing import Any

from safe_broadcaster.hub.broadcaster import EventBroadcaster

__all__ = ["get_broadcaster", "stop_broadcaster"]

_Shared = concurrent.futures.Future[EventBroadcaster]

_ANY_PORT: dict[str, Any] = {"port": 0}
_lock = threading.Lock()
_shared: tuple[int, _Shared] | None = None
"""The process that made it, and the hub once it is started."""


async def get_broadcaster(
    redis_client: object = None, channel_name: str | None = None, **settings: Any
) -> EventBroadcaster:
    """Return the program's hub, started; whoever asks first makes it. Safe from several threads and event loops.

    Args:
        redis_client: As for `EventBroadcaster`.
        channel_name: As for `EventBroadcaster`.
        settings: As for `EventBroadcaster`, for whoever asks first. ``port`` is 0 by default, any free one: a program
            that brings its own server has a port for the clients already.

    Raises:
        ConfigError: As `EventBroadcaster`, and its `start`, raise; then the next one who asks tries again.
        ConnectRefused: As `EventBroadcaster.start` raises.

    """
    global _shared  # noqa: PLW0603 - it is the point
    with _lock:
        mine = _shared is None or _shared[0] != os.getpid()  # a forked child has its own
        if mine:
            _shared = (os.getpid(), concurrent.futures.Future())
        assert _shared is not None
        shared = _shared[1]
    if not mine:
        return await asyncio.shield(asyncio.wrap_future(shared))
    try:
        hub = EventBroadcaster(redis_client, channel_name, **(_ANY_PORT | settings))
        await hub.start()
    except BaseException as error:
        with _lock:
            _shared = None
        shared.set_exception(error)
        shared.exception()  # whoever else asked has it, and if nobody did, that is no news
        raise
    shared.set_result(hub)
    return hub


async def stop_broadcaster() -> None:
    """Stop the program's hub, if there is one. The next `get_broadcaster` makes a new one."""
    global _shared
    with _lock:
        stopping, _shared = _shared, None
    if stopping is None or stopping[0] != os.getpid():
        return
    try:
        hub = await asyncio.shield(asyncio.wrap_future(stopping[1]))
    except Exception:  # noqa: BLE001 - it never started, and whoever asked for it was told
        return
    await hub.stop()
