"""Hubs that share a stream over Redis while everything that can die does; and what judges them finds what is wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # `chaos` stands beside the package, not in it

from chaos.bridge import Outage, run, untold
from chaos.witness import Sitting

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")

SEED = 7
"""Always the same: a schedule that fails only now and then is hunted with ``make chaos-redis``."""


@needs_redis
@pytest.mark.timeout(180)
async def test_whatever_dies_around_redis_nothing_is_lost_doubled_or_left_untold(tmp_path: Path) -> None:
    outcome, breaker = await run(tmp_path, SEED, 20)
    assert outcome.verdict.violations == [], f"make chaos-redis ARGS='--seed {SEED}'"
    assert outcome.engine_kills
    assert outcome.hub_kills
    assert breaker.faults["kill"]
    assert outcome.verdict.delivered


@needs_redis
@pytest.mark.timeout(180)
async def test_a_redis_that_forgets_is_found_out(tmp_path: Path) -> None:
    """The proof can fail: a Redis that writes nothing down begins anew after a kill."""
    outcome, breaker = await run(tmp_path, SEED, 20, durable=False)
    assert breaker.faults["kill"]
    assert any(text.startswith("not recovered") for text in outcome.verdict.violations)


def sitting(*notices: tuple[float, str], begin: float = 0.0, end: float = 99.0) -> list[Sitting]:
    return [Sitting("ws://hub", begin, end, list(notices))]


OUTAGE = Outage(10.0, 20.0)


def test_who_was_told_in_time_and_told_of_the_end_is_fine() -> None:
    assert untold([OUTAGE], sitting((11.0, "degraded"), (20.5, "healthy"), end=float("inf"))) == []
    assert untold([OUTAGE], sitting((8.0, "degraded"), (20.5, "healthy"), end=float("inf"))) == [], "of one before it"


@pytest.mark.parametrize(
    "told",
    [
        sitting(),
        sitting((8.0, "degraded"), (9.0, "healthy")),
        sitting((11.0, "degraded"), (11.5, "healthy")),
        sitting((14.0, "degraded")),
        sitting((11.0, "healthy")),
        sitting((11.0, "degraded"), end=float("inf")),
    ],
    ids=["never", "before", "and that it was over", "too late", "something else", "of the beginning only"],
)
def test_who_was_not_told_is_found(told: list[Sitting]) -> None:
    assert len(untold([OUTAGE], told)) == 1


@pytest.mark.parametrize(
    "absent",
    [sitting(begin=10.5), sitting(end=12.0), sitting(begin=30.0)],
    ids=["came later", "went before", "was not there"],
)
def test_who_was_not_there_long_enough_need_not_be_told(absent: list[Sitting]) -> None:
    assert untold([OUTAGE], absent) == []


def test_an_outage_that_is_over_at_once_need_not_be_told() -> None:
    assert untold([Outage(10.0, 10.5)], sitting()) == []
