"""The standard event: about 390 bytes of JSON, as an engine of a graph emits them."""

import random

SIZE = 389
"""Bytes of each event as orjson writes it."""

_WORDS = (
    "amber",
    "basin",
    "cedar",
    "delta",
    "field",
    "graph",
    "harbor",
    "island",
    "meadow",
    "node",
    "orbit",
    "prairie",
)


def event(number: int) -> dict:
    """One event: nested, a text of 120 characters, a list of floats. The number decides its content, not its size."""
    chance = random.Random(number)
    text = " ".join(chance.choice(_WORDS) for _ in range(40))[:120]
    return {
        "type": "graph.delta.node.upsert",
        "topic": "graph/ada/delta/node",
        "content": {
            "node_id": f"node-{number % 1_000_000:06d}",
            "kind": "concept",
            "weight": _float(chance),
            "labels": ["memory", "concept"],
            "text": text,
            "position": [_float(chance) for _ in range(5)],
        },
        "timestamp": "2026-01-01T12:00:00.000000+00:00",
    }


def pool(count: int = 1000) -> list[dict]:
    """Different events to take in turn, so that no measured loop works on one warm object."""
    return [event(number) for number in range(count)]


def _float(chance: random.Random) -> float:
    """A float of always four decimals: its last digit is never 0."""
    return (chance.randrange(100, 1000) * 10 + chance.randrange(1, 10)) / 10_000
