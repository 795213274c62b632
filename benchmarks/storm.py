"""All dashboards lose their hub at once and come back; one that does not read, among a thousand that do.

`stopped`: the hub says goodbye and when to come back, and another one goes on with its log. `killed`: SIGKILL, the
same log. `forgetful`: SIGKILL, and no log: nobody can recover, and everybody is told. An engine publishes meanwhile.
Every session checks that between two entries nothing is missing; what is missing or comes twice is a failure, not a
figure.
"""

import json
import signal
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

from fanout import SUBSCRIBE, Hub
from kit.event import event
from kit.processes import answer, ask, client_cpus, closed_port, folder_on_disk, process, role, server_cpus, start, tool
from kit.rounds import Figures, options

RATE = 20
"""Events per second meanwhile."""


def main() -> None:
    args = options(
        __doc__,
        rounds=4,
        quick_rounds=2,
        sessions=(10_000, 300, "dashboards that come back"),
        readers=(1000, 100, "dashboards beside one that does not read"),
        seconds=(3, 1, "seconds of a round there"),
    )
    for how in ("stopped", "killed", "forgetful"):
        figures = Figures("storm", layout=f"{args.sessions} sessions")
        for _ in range(args.rounds):
            storm(how, args.sessions, figures)
        figures.print()
        figures.check("storm", figures.of(how, "seconds until all are back"), case=how)
    figures = Figures("storm", layout=f"{args.readers} sessions", rate=100)
    for number in range(args.rounds):
        # Not always in the same order: the first of two finds a cold machine.
        for stalled in ((0, 1), (1, 0))[number % 2]:
            beside(stalled, args.readers, args.seconds, figures)
    figures.print()
    figures.check("stalled", figures.ratios("1 does not read", "all read", "p99 µs"))


def storm(how: str, sessions: int, figures: Figures) -> None:
    with ExitStack() as open_processes:
        log = open_processes.enter_context(folder_on_disk()) / "log.db"
        # The new hub is where the old one was.
        port = closed_port()
        hub = hub_at(port, None if how == "forgetful" else log, sessions)
        open_processes.callback(lambda: end(hub))
        engine = open_processes.enter_context(
            process(role("publisher", "safe_broadcaster", f"ws://127.0.0.1:{port}/ws", "asyncio"), server_cpus("split"))
        )
        answer(engine)
        dashboards = open_processes.enter_context(
            process([tool("storm"), "--port", str(port), "--sessions", str(sessions)], server_cpus("split"))
        )
        figures.add(how, "seconds to connect at first", answer(dashboards)["connected"])
        engine.stdin.write(json.dumps({"rate": RATE, "events": RATE * 60}) + "\n")
        engine.stdin.flush()
        dashboards.stdin.write("go\n")
        dashboards.stdin.flush()
        if how == "stopped":
            end(hub)
        else:
            hub.send_signal(signal.SIGKILL)
            hub.wait()
        hub = hub_at(port, None if how == "forgetful" else log, sessions)
        said = answer(dashboards)
        wrong = said["missed"] + said["twice"] + said["recovered" if how == "forgetful" else "not recovered"]
        if wrong:
            raise RuntimeError(f"{how}: {said}")
        figures.add(how, "seconds until all are back", said["seconds"])
        figures.add(how, "seconds until half are", said["seconds p50"])
        figures.add(how, "attempts that failed", said["refused"])


def hub_at(port: int, log: Path | None, sessions: int) -> Popen[str]:
    settings = {"port": port, "max_sessions": sessions + 10}
    if log is not None:
        settings["log_path"] = str(log)
    hub = start(role("safe_hub", "asyncio", json.dumps(settings)), client_cpus("split"))
    answer(hub)
    return hub


def end(hub: Popen[str]) -> None:
    if hub.poll() is None:
        hub.stdin.close()
        hub.wait(20)


def beside(stalled: int, readers: int, seconds: float, figures: Figures) -> None:
    """How late events reach those who read, with and without one that does not."""
    with ExitStack() as open_processes:
        process_of_hub = open_processes.enter_context(process(role("safe_hub", "asyncio"), client_cpus("split")))
        port = int(answer(process_of_hub)["publish"].split(":")[2].split("/")[0])
        hub = Hub(process_of_hub, port)
        text = json.dumps(event(0), separators=(",", ":"))
        # Not closed but kept at its bound, which is more work than to be rid of it.
        hello = {**SUBSCRIBE, "data": {**SUBSCRIBE["data"], "slow": "drop_with_gap"}}
        subscribers = ("--subscribers", str(readers + stalled), "--stalled", str(stalled))
        fan = open_processes.enter_context(
            process(
                [tool("fan"), "--port", str(port), *subscribers, "--hello", json.dumps(hello), "--event", text],
                server_cpus("split"),
            )
        )
        answer(fan)
        ask(fan, mode="closed", window=256, seconds=1.0)
        while stalled and not hub.stats()["shed"]:
            ask(fan, mode="closed", window=256, seconds=1.0)
        said = ask(fan, mode="paced", rate=100, seconds=seconds)
        case = "1 does not read" if stalled else "all read"
        figures.add(case, "p99 µs", said["p99 µs"])
        figures.add(case, "frames left out", hub.stats()["shed"])


if __name__ == "__main__":
    main()
