"""What the project wants of its own speed: ratios to something measured in the same run, and three absolute limits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A limit on the median over the rounds."""

    what: str
    sign: str
    limit: float
    unit: str

    def met(self, value: float) -> bool:
        return value <= self.limit if self.sign == "≤" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g} {self.unit}"


TARGETS = {
    "caller": Target(
        "caller's time of `await safe_emit`, link live, to `orjson.dumps` of the event", "≤", 2.0, "times"
    ),
    "caller_spilling": Target("the same, link down, events going to SQLite", "≤", 2.5, "times"),
    "process_memory": Target("caller's time at `process`, link live, to the same at `memory`", "≤", 1.25, "times"),
    "process_dumps": Target("caller's time at `process`, link live, to `orjson.dumps` of the event", "≤", 2.0, "times"),
    "power_gathered": Target(
        "1000 emits at `power` gathered on a loop, to a file appended to and synced once, and 1000 futures",
        "≥",
        0.6,
        "times",
    ),
    "power_threads": Target(
        "`emit_nowait`, each thousandth event at `power`, to a file appended to and synced as often", "≥", 0.5, "times"
    ),
    "power_alone": Target("one emit at `power`, median, to one append and `fdatasync` of a file", "≤", 2.0, "times"),
    "ring_recovery": Target("recovery of a full ring of 64 MiB, to reading the file and its CRC32C", "≤", 3.0, "times"),
    "spill_start": Target(
        "`start()` to the first event at the sink with 1 000 000 events spilled, to the same with 1000",
        "≤",
        1.2,
        "times",
    ),
    "stall": Target("worst stall of the event loop while spilling, over a control run", "≤", 5.0, "ms"),
    "flood_seed": Target("end to end into a sink, to the `json.dumps` + `websockets` pattern", "≥", 30.0, "times"),
    "flood_picows": Target("end to end into a sink, to picows + orjson", "≥", 4.0, "times"),
    "spill_rate": Target("sustained rate into the spill, to plain SQLite in 1000-row transactions", "≥", 0.6, "times"),
    "flush_rate": Target(
        "flush of 1 000 000 spilled events, to plain SQLite reading and deleting them", "≥", 0.4, "times"
    ),
    "flush_time": Target("that flush, from its first event at the sink to its last", "≤", 5.0, "s"),
    "memory": Target("resident memory with 1 000 000 spilled events, over an interpreter with orjson", "≤", 40.0, "MB"),
    "latency_p50": Target("emit → subscriber, median, to the Python stack, 1000 events/s", "≤", 1.0, "times"),
    "latency_p99": Target("emit → subscriber, 99th percentile, to the Python stack, 1000 events/s", "≤", 0.6, "times"),
    "fanout_bare": Target(
        "frames per second to subscribers, closed loop, to a bare tokio-tungstenite hub", "≥", 0.5, "times"
    ),
    "fanout_nats": Target("the same, to nats-server over WebSocket", "≥", 1.3, "times"),
    "fanout_socketify": Target("the same, to socketify (uWebSockets)", "≥", 6.0, "times"),
    "fanout_websockets": Target("the same, to `websockets.broadcast` on uvloop", "≥", 12.0, "times"),
    "paced_cpu": Target("CPU of the hub for each frame at 1000 events/s, to picows", "≤", 1.1, "times"),
    "paced_p99": Target("99th percentile publisher → subscriber at 1000 events/s, to the best peer", "≤", 1.5, "times"),
    "replay_rate": Target("frames per second of a replay to 100 sessions at once, to live ones", "≥", 1.0, "times"),
    "storm": Target("10 000 sessions that lost their hub, until all are back and have recovered", "≤", 10.0, "s"),
    "stalled": Target("99th percentile for 1000 that read beside one that does not, to without it", "≤", 1.2, "times"),
    "aggregate_cpu": Target(
        "CPU with intervals that follow activity and a queue before the emitter, to fixed ones without",
        "≤",
        0.62,
        "times",
    ),
    "aggregate_memory": Target("memory of the same", "≤", 1.015, "times"),
    "aggregate_latency": Target("event to its emitter, 99th percentile, in the same", "≤", 10.0, "ms"),
    "aggregate_recovery": Target("emitter that was down, until it has had what waited, cooldown 2 s", "≤", 2.5, "s"),
    "bridge_rate": Target(
        "events per second, emitter → hub → Redis → another hub → subscriber, to redis-py's XADD one by one",
        "≥",
        10.0,
        "times",
    ),
    "bridge_p99": Target(
        "emit → subscriber on another hub, 99th percentile, 1000 events/s, to redis-py's PUBLISH → SUBSCRIBE",
        "≤",
        3.0,
        "times",
    ),
    "bridge_fill": Target("rate of filling a gap of 10 000 events, to a pipelined XRANGE", "≥", 0.5, "times"),
    "session_memory": Target("resident memory of a session that waits", "≤", 8.0, "KiB"),
}
