"""Looks after the hub's port, and says so when it cannot be helped.

Every ``supervision_interval`` it asks whether connections are still accepted. If not, the port is taken anew, through a
circuit breaker. After ``max_recovery_attempts`` in vain the hub is degraded: whoever is connected stays, is told on the
wire, and goes on receiving what the program itself broadcasts. It goes on trying at the breaker's pace.

It also logs when the certificate, the log on disk or the bus to other hubs fails, and when that is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import orjson

from safe_broadcaster.breaker import WebSocketCircuitBreaker
from safe_broadcaster.exceptions import BroadcasterClosed, BroadcastError, ConfigError

if TYPE_CHECKING:
    from safe_broadcaster import _core
    from safe_broadcaster.hub.config import HubConfig

__all__ = ["Supervisor"]

logger = logging.getLogger("safe_broadcaster")

_PARTS = {
    "tls_error": ("the hub's certificate cannot be used and an older one is: %s", "the hub uses its certificate again"),
    "log_error": ("the hub's log fails, its events stay with their emitters: %s", "the hub's log works again"),
    "bus_error": ("the hub is cut off from the other hubs: %s", "the hub is one with the other hubs again"),
}
"""What the numbers tell of the hub's parts, and the words for people who read logs."""
_TROUBLE = "New connections cannot be accepted at the moment; those that exist go on."


class Supervisor:
    """See the module. One for each life of a hub."""

    def __init__(self, core: _core.Hub, config: HubConfig) -> None:
        _at_least("supervision_interval", config.supervision_interval, 0.001)
        _at_least("max_recovery_attempts", config.max_recovery_attempts, 1)
        _at_least("breaker_cooldown", config.breaker_cooldown, 0)
        self._core = core
        self._interval = config.supervision_interval
        self._most = config.max_recovery_attempts
        self.breaker = WebSocketCircuitBreaker(
            failure_threshold=config.max_recovery_attempts,
            recovery_timeout=config.breaker_cooldown,
            half_open_max_calls=1,
            success_threshold=1,
            name="event_broadcaster",
        )
        self.attempts = 0
        self.degraded = False
        self._told: dict[str, str | None] = dict.fromkeys(_PARTS)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look from now on, in a task of the running loop."""
        self._task = asyncio.create_task(self._run(), name="safe_broadcaster supervision")

    async def stop(self) -> None:
        """Look no longer."""
        task, self._task = self._task, None
        if task is None:
            return
        if task.get_loop() is not asyncio.get_running_loop():
            with contextlib.suppress(RuntimeError):  # that loop is closed, and the task with it
                task.get_loop().call_soon_threadsafe(task.cancel)
            return
        task.cancel()
        await asyncio.wait({task})

    async def check(self) -> None:
        """Look once."""
        self._look_at_parts()
        if self._core.is_listening():
            if self.attempts:
                self._recovered()
            return
        if self.breaker.is_call_permitted():
            self.attempts += 1
            try:
                await asyncio.to_thread(self._core.listen_again)
            except BroadcasterClosed:
                return
            except BroadcastError as error:
                self.breaker.record_failure()
                logger.warning("the hub's port was lost; attempt %d to take it again: %s", self.attempts, error)
            else:
                logger.warning("the hub's port was lost and is taken again")
                self._recovered()
                return
        if self.attempts >= self._most:
            self._degrade()

    def _look_at_parts(self) -> None:
        numbers: dict[str, Any] = orjson.loads(self._core.stats() or b"{}")
        bridge: dict[str, Any] = numbers.get("bridge") or {}
        if bridge.get("degraded"):
            numbers["bus_error"] = self._told["bus_error"] or bridge.get("error")  # its words change with each attempt
        for name, (broken, mended) in _PARTS.items():
            error: str | None = numbers.get(name)
            if error == self._told[name]:
                continue
            self._told[name] = error
            if error is None:
                logger.warning(mended)
            else:
                logger.error(broken, error)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.check()
            except Exception:  # whatever it is: who looks after the hub must not die unnoticed
                logger.exception("looking after the hub failed; it is tried again in %s s", self._interval)

    def _recovered(self) -> None:
        self.breaker.record_success()
        self.attempts = 0
        if self.degraded:
            self.degraded = False
            logger.warning("the hub is out of degraded mode")
            self._core.tell(None, self.breaker.get_state().value)

    def _degrade(self) -> None:
        if not self.degraded:
            self.degraded = True
            logger.critical(
                "the hub is in DEGRADED MODE: its port was lost and could not be taken again in %d attempts. Sessions "
                "that exist go on, new ones cannot begin. Look for a program that took the port, or restart this one",
                self.attempts,
            )
        self._core.tell(_TROUBLE, self.breaker.get_state().value)


def _at_least(setting: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{setting}={value!r} is not allowed: give a number, at least {least}")
