"""The event loop of a role, by name."""

import asyncio
from collections.abc import Coroutine


def run(main: Coroutine, loop: str) -> None:
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415 a run on asyncio needs none

        uvloop.run(main)
    else:
        asyncio.run(main)
