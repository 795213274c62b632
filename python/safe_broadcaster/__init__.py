"""Carries events from Python engines to live dashboards without losing one silently.

::

    from safe_broadcaster import EventBroadcaster, SafeBroadcaster

    async with EventBroadcaster(port=8000):  # in the program that serves the dashboard
        ...

    async with SafeBroadcaster("ws://127.0.0.1:8000/ws") as broadcaster:
        await broadcaster.safe_emit({"type": "graph.delta.node.upsert", "content": {"id": 1}})
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

from safe_broadcaster import _core
from safe_broadcaster.config import EmitterConfig
from safe_broadcaster.emitter import FlushResult, SafeBroadcaster
from safe_broadcaster.exceptions import (
    BootFailed,
    BroadcasterClosed,
    BroadcastError,
    BusUnavailable,
    CircuitOpen,
    ConfigError,
    ConnectRefused,
    ConnectTimeout,
    EventInvalid,
    EventNotSerializable,
    EventRefused,
    EventTooLarge,
    ForkedProcess,
    HandlerTimeout,
    QueueFull,
    SourceNotStarted,
    SpillCorrupt,
    SpillFull,
    SpillLocked,
)

if TYPE_CHECKING:  # these are imported when they are first asked for: most engines need none of them
    from safe_broadcaster import sources
    from safe_broadcaster.aggregator import AdaptiveInterval, Aggregator, EmitterQueue, TimeScale
    from safe_broadcaster.auth import Grant, JwtAuth
    from safe_broadcaster.boot import BootProgress, BootReport, BootSequence
    from safe_broadcaster.breaker import WebSocketCircuitBreaker, WebSocketCircuitState
    from safe_broadcaster.breakers import CircuitBreaker, CircuitBreakers
    from safe_broadcaster.bus import (
        AlertManager,
        AlertNotifier,
        ConnectionManager,
        ControlLimitsUpdatedEvent,
        EventBus,
        SampleProcessedEvent,
        ViolationAcknowledged,
        ViolationCreated,
        WebSocketBroadcaster,
    )
    from safe_broadcaster.heartbeat import Heartbeat
    from safe_broadcaster.hub import (
        EventBroadcaster,
        EventRegistry,
        HubConfig,
        WebSocketAlertEventType,
        get_broadcaster,
        stop_broadcaster,
    )
    from safe_broadcaster.logs import SafeBroadcasterHandler
    from safe_broadcaster.retry import (
        DEFAULT_BASE_DELAY,
        DEFAULT_MAX_DELAY,
        DEFAULT_MAX_RETRIES,
        BroadcastRetryMetrics,
        broadcast_with_retry,
    )
    from safe_broadcaster.sources import BackgroundTasks

__version__: str = _core.__version__

__all__ = [
    "DEFAULT_BASE_DELAY",
    "DEFAULT_MAX_DELAY",
    "DEFAULT_MAX_RETRIES",
    "AdaptiveInterval",
    "Aggregator",
    "AlertManager",
    "AlertNotifier",
    "BackgroundTasks",
    "BootFailed",
    "BootProgress",
    "BootReport",
    "BootSequence",
    "BroadcastError",
    "BroadcastRetryMetrics",
    "BroadcasterClosed",
    "BusUnavailable",
    "CircuitBreaker",
    "CircuitBreakers",
    "CircuitOpen",
    "ConfigError",
    "ConnectRefused",
    "ConnectTimeout",
    "ConnectionManager",
    "ControlLimitsUpdatedEvent",
    "EmitterConfig",
    "EmitterQueue",
    "EventBroadcaster",
    "EventBus",
    "EventInvalid",
    "EventNotSerializable",
    "EventRefused",
    "EventRegistry",
    "EventTooLarge",
    "FlushResult",
    "ForkedProcess",
    "Grant",
    "HandlerTimeout",
    "Heartbeat",
    "HubConfig",
    "JwtAuth",
    "QueueFull",
    "SafeBroadcaster",
    "SafeBroadcasterHandler",
    "SampleProcessedEvent",
    "SourceNotStarted",
    "SpillCorrupt",
    "SpillFull",
    "SpillLocked",
    "TimeScale",
    "ViolationAcknowledged",
    "ViolationCreated",
    "WebSocketAlertEventType",
    "WebSocketBroadcaster",
    "WebSocketCircuitBreaker",
    "WebSocketCircuitState",
    "__version__",
    "broadcast_with_retry",
    "get_broadcaster",
    "sources",
    "stop_broadcaster",
]


_LATER = {
    "aggregator": "AdaptiveInterval Aggregator EmitterQueue TimeScale",
    "auth": "Grant JwtAuth",
    "boot": "BootProgress BootReport BootSequence",
    "breaker": "WebSocketCircuitBreaker WebSocketCircuitState",
    "breakers": "CircuitBreaker CircuitBreakers",
    "bus": "AlertManager AlertNotifier ConnectionManager ControlLimitsUpdatedEvent EventBus SampleProcessedEvent "
    "ViolationAcknowledged ViolationCreated WebSocketBroadcaster",
    "heartbeat": "Heartbeat",
    "hub": "EventBroadcaster EventRegistry HubConfig WebSocketAlertEventType get_broadcaster stop_broadcaster",
    "logs": "SafeBroadcasterHandler",
    "retry": "DEFAULT_BASE_DELAY DEFAULT_MAX_DELAY DEFAULT_MAX_RETRIES BroadcastRetryMetrics broadcast_with_retry",
    "sources": "BackgroundTasks",
}
"""What is imported when it is first asked for, by module."""


def __getattr__(name: str) -> object:
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    for module, names in _LATER.items():
        if name in names.split():
            found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if _core._debug_build:
    warnings.warn("safe_broadcaster is a debug build: it is many times slower than a release", stacklevel=2)
