"""The aggregator: looks at three paces, emits what is new, survives whatever it is given."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from decimal import Decimal

import pytest

from safe_broadcaster import (
    AdaptiveInterval,
    Aggregator,
    BroadcasterClosed,
    CircuitBreaker,
    ConfigError,
    EmitterQueue,
    TimeScale,
)
from safe_broadcaster.aggregator import Outcome, Series, Window, summarise
from support import eventually
from virtual import now, virtual

MICRO, MESO, MACRO = TimeScale


def breaker(**settings) -> CircuitBreaker:
    return CircuitBreaker(clock=asyncio.get_running_loop().time, **settings)


def series(*values: float) -> Series:
    made = Series()
    for value in values:
        made.add(value)
    return made


def test_a_series_is_summed_up_in_constant_memory_and_merged_in_order() -> None:
    first, later = series(1, 5), series(3)
    first.merge(later)
    assert first.to_dict() == {"count": 3, "mean": 3.0, "min": 1, "max": 5, "last": 3}


def test_novelty_is_the_largest_relative_change_and_activity_the_largest_lambda() -> None:
    before = Window(MICRO, 1.0, {"a": series(10), "b": series(0), "lambda_max": series(0.1)})
    after = Window(MICRO, 1.0, {"a": series(8), "b": series(0), "lambda_max": series(0.1, 0.7, 0.1)})
    outcome = summarise(after, before)
    assert outcome.activity == 0.7
    assert outcome.novelty == pytest.approx(1 - 0.1 / 0.3)
    assert outcome.content["series"]["a"]["mean"] == 8
    assert summarise(after, None).novelty == 1.0
    assert summarise(Window(MICRO, 1.0, {"a": series(-10)}), before).novelty == 1.0
    assert summarise(Window(MICRO, 1.0, {}), before) == (0.0, 0.0, {"series": {}})


@virtual
async def test_in_quiet_times_it_looks_less_and_less_often() -> None:
    looks = []

    async def aggregate(window: Window, _: Window | None) -> Outcome:
        looks.append((window.scale, now(), window.seconds))
        return Outcome(0.0, 0.0, {})

    async with Aggregator(aggregate=aggregate) as agg:
        await asyncio.sleep(60)
    micro = [at for scale, at, _ in looks if scale is MICRO]
    assert micro[:3] == [pytest.approx(0.1), pytest.approx(0.22), pytest.approx(0.364)]
    assert micro[-1] - micro[-2] == pytest.approx(1.0)
    meso = [at for scale, at, _ in looks if scale is MESO]
    assert meso == pytest.approx([10, 22, 36.4, 53.68])
    assert agg.intervals[MACRO].current == 300
    assert sum(seconds for scale, _, seconds in looks if scale is MICRO) == pytest.approx(micro[-1]), "no gap between"


@virtual
async def test_what_is_new_is_emitted_and_what_is_not_is_not() -> None:
    emitted: list[dict] = []

    async def emit(event: dict) -> None:
        emitted.append(event)

    async with Aggregator(emit, intervals={MESO: None, MACRO: None}, circuit_breaker=breaker()) as agg:
        agg.observe("temperature", 20.0)
        await asyncio.sleep(0.15)
        agg.observe("temperature", 20.5)
        agg.observe("lambda_max", 0.9)
        await asyncio.sleep(0.2)
        agg.observe("temperature", 20.4)
        agg.observe("lambda_max", 0.8)
        await asyncio.sleep(0.2)
    first, second = emitted
    assert first["type"] == "aggregate.novelty"
    assert first["topic"] == "aggregate/micro/novelty"
    once = {"count": 1, "mean": 20.0, "min": 20.0, "max": 20.0, "last": 20.0}
    assert first["content"]["series"] == {"temperature": once}
    assert second["content"]["activity"] == 0.9
    assert second["content"]["novelty"] == 1.0, "lambda_max was not there before"
    json.dumps(emitted)
    stats = agg.get_stats()
    assert (stats["novelties"], stats["unemitted"]) == (2, 0)


@virtual
async def test_each_scale_sees_all_that_was_observed_since_it_looked_last() -> None:
    windows: dict[TimeScale, list[Window]] = {scale: [] for scale in TimeScale}

    async def aggregate(window: Window, _: Window | None) -> Outcome:
        windows[window.scale].append(window)
        return Outcome(0.0, 0.0, {})

    async with Aggregator(aggregate=aggregate) as agg:
        for n in range(400):
            agg.observe("n", n)
            await asyncio.sleep(1)
    for scale in TimeScale:
        counted = [each.series["n"] for each in windows[scale] if each.series]
        assert [int(each.least) for each in counted][1:] == [int(each.most) + 1 for each in counted][:-1]
    assert windows[MACRO][0].series["n"].count == pytest.approx(300, abs=1)


@virtual
async def test_five_errors_open_the_breaker_and_after_a_minute_it_goes_on_with_all_that_was_observed(caplog) -> None:
    failing = True
    windows: list[Window] = []

    async def aggregate(window: Window, _: Window | None) -> Outcome:
        if failing:
            raise ZeroDivisionError("no data")
        windows.append(window)
        return Outcome(0.0, 0.0, {})

    agg = Aggregator(aggregate=aggregate, intervals={MESO: None, MACRO: None}, circuit_breaker=breaker())
    async with agg:
        agg.observe("a", 1.0)
        while not agg.circuit_breaker.tripped:
            await asyncio.sleep(0.01)
        tripped_at = now()
        assert tripped_at == pytest.approx(0.5, abs=0.02), "an error does not change the interval"
        status = agg.get_status()["status"]["circuit_breaker"]
        assert (status["tripped"], status["consecutive_errors"]) == (True, 5)
        failing = False
        agg.observe("a", 2.0)
        await asyncio.sleep(59)
        assert windows == []
        await asyncio.sleep(1.2)
        assert windows[0].series["a"].to_dict()["count"] == 2
        assert windows[0].seconds == pytest.approx(now(), abs=1.5)
        assert agg.get_status()["status"]["circuit_breaker"]["tripped"] is False
    assert caplog.text.count("aggregating micro failed") == 5
    assert "nothing is aggregated for 60 s" in caplog.text
    assert agg.get_stats()["skipped"] > 100


GARBAGE = [None, 7, (1.0, 0.5), (1.0, "new", {}), (1.0, 0.5, None), (float("nan"), 0.5, {}), ("much", 0.5, {})]


@pytest.mark.parametrize("garbage", GARBAGE, ids=repr)
def test_garbage_from_an_aggregation_is_an_error_like_others(garbage) -> None:
    @virtual
    async def main() -> None:
        async def aggregate(_: Window, __: Window | None) -> object:
            return garbage

        agg = Aggregator(aggregate=aggregate)
        assert await agg.look(MICRO) is None
        assert agg.get_stats()["errors"] == 1
        assert agg.intervals[MICRO].current == 0.1

    main()


@virtual
async def test_an_aggregation_that_hangs_is_cancelled() -> None:
    async def aggregate(_: Window, __: Window | None) -> Outcome:
        return await asyncio.get_running_loop().create_future()

    agg = Aggregator(aggregate=aggregate, aggregate_timeout=5.0)
    assert await agg.look(MICRO) is None
    assert (now(), agg.get_stats()["errors"]) == (5, 1)


async def test_a_plain_aggregation_runs_in_a_thread() -> None:
    ran_in = []

    def aggregate(_: Window, __: Window | None) -> Outcome:
        ran_in.append(threading.current_thread())
        return Outcome(0.0, 1.0, {"a": 1})

    agg = Aggregator(aggregate=aggregate)
    outcome = await agg.look(MICRO)
    assert outcome == (0.0, 1.0, {"a": 1})
    assert ran_in[0] is not threading.main_thread()


@virtual
async def test_emitters_that_hang_do_not_hold_up_looking() -> None:
    looks = 0

    async def hangs(_: object) -> None:
        await asyncio.get_running_loop().create_future()

    async def aggregate(_: Window, __: Window | None) -> Outcome:
        nonlocal looks
        looks += 1
        return Outcome(1.0, 1.0, {})

    agg = Aggregator(hangs, event_queue_size=5, aggregate=aggregate, intervals={MESO: None, MACRO: None})
    await agg.start()
    await asyncio.sleep(10)
    assert looks > 150
    assert agg.get_status()["status"]["event_queue_size"] == 6, "five wait, and one is with the emitter"
    await agg.stop()
    stats = agg.get_stats()["queue"]["emitters"]
    assert sum(each["dropped"] + each["abandoned"] for each in stats.values()) == looks


@virtual
async def test_a_queue_of_ones_own_is_shared_and_outlives_the_aggregator() -> None:
    emitted = []

    async def emit(event: object) -> None:
        emitted.append(event)

    async with EmitterQueue(emit) as events:
        async with Aggregator(events) as agg:
            assert await agg.emit({"type": "mine"}) is True
        assert emitted == [{"type": "mine"}]
        events.put_nowait("still open")
        await events.drain()
    assert emitted[-1] == "still open"


@virtual
async def test_without_an_emitter_what_is_new_is_logged_and_counted(caplog) -> None:
    caplog.set_level("INFO")
    agg = Aggregator()
    agg.observe("a")
    assert (await agg.look(MICRO)).novelty == 1.0
    assert "there is no emitter for {'type': 'aggregate.novelty'" in caplog.text
    assert agg.get_stats()["unemitted"] == 1
    assert agg.get_status()["status"]["last_emission"] is None


@virtual
async def test_a_queue_that_refuses_does_not_stop_it(caplog) -> None:
    async def hangs(_: object) -> None:
        await asyncio.get_running_loop().create_future()

    agg = Aggregator(hangs, event_queue_size=1, when_full="raise")
    taken = []
    for _ in range(3):
        taken.append(await agg.emit({"type": "a"}))
        await asyncio.sleep(0.1)
    assert taken == [True, True, False]
    assert "an event was not emitted" in caplog.text
    await agg.stop(0)


@virtual
async def test_starting_twice_is_starting_once_and_a_stopped_one_stays_stopped() -> None:
    agg = Aggregator()
    await agg.start()
    await agg.start()
    assert len(asyncio.all_tasks()) == 4
    await agg.stop()
    await agg.stop()
    with pytest.raises(BroadcasterClosed, match="make a new one"):
        await agg.start()


async def test_threads_may_observe() -> None:
    agg = Aggregator()
    threads = [threading.Thread(target=lambda: [agg.observe("a", 1.0) for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome = await agg.look(MICRO)
    assert outcome.content["series"]["a"]["count"] == 20_000


def test_after_a_loop_that_ended_without_a_stop_it_looks_on_the_next() -> None:
    agg = Aggregator(intervals={MICRO: AdaptiveInterval(0.01, 0.01, 0.01, 0), MESO: None, MACRO: None})

    async def life() -> None:
        before = agg.get_stats()["aggregations"]
        await agg.start()
        await eventually(lambda: agg.get_stats()["aggregations"] > before)

    for _ in range(2):
        asyncio.run(life())


async def test_what_is_no_number_is_refused_and_what_json_cannot_carry_is_counted_and_spoils_nothing(caplog) -> None:
    agg = Aggregator()
    for wrong in (None, "5", [1], 10**400):
        with pytest.raises(ConfigError, match=r"value=.* of 'x' is not allowed: give a number"):
            agg.observe("x", wrong)
    for value in (math.nan, math.inf, -math.inf, 1, True, Decimal("0.5")):
        agg.observe("x", value)
    outcome = await agg.look(MICRO)
    assert outcome.content == {"series": {"x": {"count": 3, "mean": 2.5 / 3, "min": 0.5, "max": 1.0, "last": 0.5}}}
    assert agg.get_stats()["unobserved"] == 3
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "nan of 'x' is not observed: give a finite number"
    ]


async def test_names_are_bounded_and_that_is_told(caplog) -> None:
    agg = Aggregator()
    for n in range(1005):
        agg.observe(f"name {n}")
        if n == 500:
            await agg.look(MICRO)
    assert agg.get_stats()["unobserved"] == 5
    assert caplog.text.count("there are 1000 names already") == 1
    agg.observe("name 1")
    assert len((await agg.look(MESO)).content["series"]) == 1000


@pytest.mark.parametrize(
    "wrong",
    [
        {"novelty_threshold": 1.1},
        {"novelty_threshold": float("nan")},
        {"novelty_threshold": "0.5"},
        {"aggregate": 7},
        {"aggregate_timeout": 0},
        {"event_emitter": 7},
    ],
)
def test_a_wrong_argument_is_named(wrong) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}=.* is not allowed"):
        Aggregator(**wrong)


def test_intervals_of_ones_own_replace_those_of_the_table() -> None:
    mine = AdaptiveInterval(1, 1, 1, 0)
    agg = Aggregator(intervals={MICRO: mine, MACRO: None})
    assert agg.intervals[MICRO] is mine
    assert list(agg.get_status()["status"]["adaptive_intervals"]) == ["micro", "meso"]
