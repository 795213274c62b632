"""Emits many events while nobody listens, says when all are stored, then waits to be told that a sink has come.

`python -m roles.filler URL SPILL EVENTS LOOP`. It imports as little as it can: its memory is measured.
"""

import asyncio
import sys
import time
from pathlib import Path

import orjson

from kit.event import pool
from roles.loops import run


def memory() -> dict[str, int]:
    """Bytes resident now, and at most so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    rss, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return {"rss": rss, "peak": peak}


def say(**fields: object) -> None:
    sys.stdout.write(orjson.dumps(fields).decode() + "\n")
    sys.stdout.flush()


async def main(url: str, spill: str, count: int) -> None:
    events = pool(100)
    before = memory()["rss"]

    from kit.ours import safe_broadcaster, start_offline  # noqa: PLC0415 not before the memory was read
    from kit.stored import until_stored  # noqa: PLC0415

    # Short waits between attempts: the flush is measured from its first event, the wait for it would only take time.
    b = safe_broadcaster(url, Path(spill), backoff_initial=0.1, backoff_max=0.2)
    await start_offline(b)
    began = time.perf_counter()
    for first in range(0, count, len(events)):
        for event in events[: count - first]:
            await b.safe_emit(event)
        await asyncio.sleep(0)
    await until_stored(b)
    seconds = time.perf_counter() - began
    assert len(b.spill) == count, f"{len(b.spill)} of {count} stored"
    say(seconds=seconds, before=before, **memory())

    await asyncio.to_thread(sys.stdin.readline)
    assert await b.drain(60), "not all was confirmed"
    await asyncio.to_thread(sys.stdin.readline)
    say(**memory())
    await b.stop()


if __name__ == "__main__":
    run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])), sys.argv[4])
