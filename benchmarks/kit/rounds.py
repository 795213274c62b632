"""How figures are taken and printed: options, event loops, rounds, one JSON line per figure.

Everything compared is measured in turns within one run (A B A B …), and a ratio is taken within each round, because a
shared machine drifts more between runs than most of the differences that matter.
"""

import argparse
import asyncio
import gc
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from kit.targets import TARGETS


def options(doc: str, *, rounds: int, quick_rounds: int = 3, **extra: Sequence) -> argparse.Namespace:
    """The options that every benchmark has; `extra` are integers or strings: name=(default, quick default, help)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    parser.add_argument("--rounds", type=int, help=f"default {rounds}, quick {quick_rounds}")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument(
        "--layout",
        choices=["free", "split"],
        default="free",
        help="free: the scheduler decides; split: client on the first CPU, servers on the last",
    )
    for name, (default, quick, text) in extra.items():
        flag, sizes = f"--{name.replace('_', '-')}", f"(default {default}, quick {quick})"
        parser.add_argument(flag, type=type(default), help=f"{text} {sizes}")
    chosen = parser.parse_args()
    for name, (default, quick, _) in {"rounds": (rounds, quick_rounds, ""), **extra}.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, quick if chosen.quick else default)
    return chosen


def run(main: Awaitable, loop: str) -> None:
    """Runs `main` on the chosen event loop, with what is already allocated out of the garbage collector's way."""
    gc.collect()
    gc.freeze()
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415 a run on asyncio needs none

        uvloop.run(main)
    else:
        asyncio.run(main)


class Spent(NamedTuple):
    """Nanoseconds per event: by the clock, and of the calling thread's CPU (steadier while others use the machine)."""

    wall: float
    cpu: float


async def timed(emit: Callable[[dict], Awaitable], events: Sequence[dict]) -> Spent:
    """Awaits `emit` for each event in turn."""
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for event in events:
        await emit(event)
    return _per_event(wall, cpu, events)


def timed_call(function: Callable[[dict], object], events: Sequence[dict]) -> Spent:
    """Calls `function` for each event in turn."""
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for event in events:
        function(event)
    return _per_event(wall, cpu, events)


def _per_event(wall: int, cpu: int, events: Sequence[dict]) -> Spent:
    now_wall, now_cpu = time.perf_counter_ns(), time.thread_time_ns()
    return Spent((now_wall - wall) / len(events), (now_cpu - cpu) / len(events))


async def empty(event: dict) -> bool:  # noqa: ARG001 it stands for an emit
    """The floor of anything awaited: an `async def` that does nothing."""
    return True


def percentile(samples: Sequence[float], part: float) -> float:
    return sorted(samples)[round((len(samples) - 1) * part)]


class Figures:
    """Collects one value per round under (case, metric) and prints them with their labels as JSON lines."""

    def __init__(self, bench: str, **labels: object) -> None:
        self.bench = bench
        self.labels = labels
        self.samples: dict[tuple[str, str], list[float]] = {}

    def add(self, case: str, metric: str, value: float) -> None:
        self.samples.setdefault((case, metric), []).append(value)

    def add_spent(self, case: str, parts: Sequence[Spent]) -> None:
        """One value for a round that was measured in parts."""
        for metric, values in zip(("wall ns/event", "cpu ns/event"), zip(*parts, strict=True), strict=True):
            self.add(case, metric, statistics.fmean(values))

    def of(self, case: str, metric: str) -> list[float]:
        return self.samples[case, metric]

    def ratios(self, case: str, base: str, metric: str) -> list[float]:
        """`case` over `base`, round by round; none where one of them was not measured."""
        ours, theirs = (self.samples.get((name, metric), []) for name in (case, base))
        return [mine / other for mine, other in zip(ours, theirs, strict=False)]

    def print(self) -> None:
        for (case, metric), values in self.samples.items():
            _line(kind="figure", bench=self.bench, case=case, metric=metric, **_summary(values), **self.labels)

    def skip(self, case: str, why: object) -> None:
        """Says in the report what was not measured, and why."""
        _line(kind="skipped", bench=self.bench, case=case, why=str(why), **self.labels)

    def check(self, target: str, values: Iterable[float], **labels: object) -> None:
        """Prints how `values` stand to a target of `kit.targets`; nothing where they were not measured."""
        if values := list(values):
            aim = TARGETS[target]
            met = aim.met(statistics.median(values))
            _line(kind="target", target=target, met=met, **_summary(values), **self.labels, **labels)


def _summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def _line(**fields: object) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)
