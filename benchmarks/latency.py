"""Emit → subscriber over loopback: ours beside the same path in Python only, in turns.

ours:    publisher (`SafeBroadcaster`)  → hub (`EventBroadcaster`)     → subscriber (`websockets`)
python:  publisher (`websockets`, json) → hub (Starlette on uvicorn)   → subscriber (`websockets`)
bare:    publisher (`picows`, orjson)   → `bare_hub` (tungstenite)     → subscriber (`websockets`)

The last one promises nothing: it shows how much of the time is the subscriber's and the machine's, which no publisher
and no hub can save. Three processes each; the subscriber is the same program for all. The publisher writes
CLOCK_MONOTONIC into the event before it emits, the subscriber compares it with the same clock when it has parsed the
frame. While one stack is measured the others are connected and idle.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from subprocess import Popen

from kit.processes import answer, ask, client_cpus, process, role, server_cpus, tell, tool
from kit.rounds import Figures, options

STACKS = ("safe_broadcaster", "python", "bare")


@dataclass
class Stack:
    publisher: Popen[str]
    subscriber: Popen[str]

    def measure(self, rate: int, seconds: float) -> dict:
        tell(self.subscriber, events=int(rate * seconds))
        ask(self.publisher, rate=rate, events=int(rate * seconds))
        return answer(self.subscriber)


def start(name: str, stack: ExitStack, loop: str, layout: str) -> Stack:
    """Starts a stack's three processes; the layout takes publisher and subscriber for clients."""

    def run(cpus: list[int], *command: object) -> Popen[str]:
        return stack.enter_context(process(role(*command), cpus))

    hub = hub_of(name, stack, loop, layout)
    subscriber = run(client_cpus(layout), "subscriber", hub["subscribe"], loop)
    answer(subscriber)
    publisher = run(client_cpus(layout), "publisher", name, hub["publish"], loop)
    answer(publisher)
    return Stack(publisher, subscriber)


def hub_of(name: str, stack: ExitStack, loop: str, layout: str) -> dict:
    """Where to publish and to subscribe."""
    if name == "bare":
        port = answer(stack.enter_context(process([tool("bare_hub")], server_cpus(layout))))["port"]
        return {"publish": f"ws://127.0.0.1:{port}/publish", "subscribe": f"ws://127.0.0.1:{port}/"}
    program = {"safe_broadcaster": "safe_hub", "python": "starlette_hub"}[name]
    return answer(stack.enter_context(process(role(program, loop), server_cpus(layout))))


def main() -> None:
    args = options(
        __doc__,
        rounds=7,
        seconds=(3, 1, "seconds of a round"),
        stacks=(",".join(STACKS), ",".join(STACKS), "which, in this order"),
    )
    names = args.stacks.split(",")
    with ExitStack() as open_processes:
        stacks = {name: start(name, open_processes, args.loop, args.layout) for name in names}
        for rate in (200, 1000):
            figures = Figures("latency", loop=args.loop, layout=args.layout, rate=rate)
            for stack in stacks.values():
                stack.measure(rate, 0.5)  # warms up what is lazily imported, allocated and connected
            for _ in range(args.rounds):
                for name, stack in stacks.items():
                    for metric, value in stack.measure(rate, args.seconds).items():
                        figures.add(name, metric, value)
            figures.print()
            if rate == 1000:
                for part in ("p50", "p99"):
                    figures.check(f"latency_{part}", figures.ratios("safe_broadcaster", "python", f"{part} ms"))


if __name__ == "__main__":
    main()
