"""Starts services in the order in which they need each other, and undoes it all if one fails.

::

    boot = BootSequence(progress=print)
    boot.add("hub", hub)
    boot.add("broadcaster", broadcaster, depends_on=["hub"], ready=broadcaster.ready)
    boot.add("engines", start_engines, undo=stop_engines, depends_on=["broadcaster"])
    async with boot:
        ...

Steps that do not need each other start at the same time. The pattern is that of seed 000: engines cannot tick before
the broadcaster is ready, because their step depends on it.
"""

from __future__ import annotations

from safe_broadcaster.boot.progress import BootProgress, BootReport
from safe_broadcaster.boot.sequence import BootSequence
from safe_broadcaster.boot.step import Gate

__all__ = ["BootProgress", "BootReport", "BootSequence", "Gate"]
