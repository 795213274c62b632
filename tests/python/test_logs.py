"""Log records become events, from any thread, and nothing that is logged can harm the program or loop for ever."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from safe_broadcaster import ConfigError, EventBroadcaster, SafeBroadcasterHandler
from support import NOWHERE, eventually


@pytest.fixture
def log():
    """A logger of its own, whose handlers are taken away in the end."""
    logger = logging.getLogger("app.engine")
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.handlers.clear()


def stored(broadcaster) -> list[dict]:
    return list(broadcaster.spill)


async def test_a_record_is_an_event_with_its_level_and_logger_its_extras_and_its_traceback(make, log) -> None:
    async with EventBroadcaster(port=0) as hub:
        broadcaster = make(hub.client)
        await broadcaster.start()
        log.addHandler(SafeBroadcasterHandler(broadcaster, level="INFO"))
        log.debug("not this")
        log.warning("disk %s is at %d %%", "db1", 97, extra={"free": 0.03, "odd": {1, 2}})
        try:
            {}["key"]
        except KeyError:
            log.exception("cannot read")
        assert await broadcaster.drain(5)
        warning, error = [message["data"] for message in hub.get_messages_since(0)]
    assert (warning["type"], warning["topic"]) == ("log.warning", "log/app/engine")
    content = warning["content"]
    assert (content["message"], content["logger"], content["level"]) == (
        "disk db1 is at 97 %",
        "app.engine",
        "WARNING",
    )
    assert content["extra"] == {"free": 0.03, "odd": "{1, 2}"}
    assert "test_logs.py" in content["where"]
    assert error["type"] == "log.error"
    assert "KeyError: 'key'" in error["content"]["exception"]


async def test_extras_that_json_can_carry_stay_as_they_are(make, log) -> None:
    broadcaster = make(NOWHERE)
    log.addHandler(SafeBroadcasterHandler(broadcaster))
    log.info("a", extra={"free": 0.03, "names": ["x"]})
    starting = asyncio.create_task(broadcaster.start())
    await eventually(lambda: stored(broadcaster))
    assert stored(broadcaster)[0]["content"]["extra"] == {"free": 0.03, "names": ["x"]}
    starting.cancel()


async def test_records_of_many_threads_come_and_none_waits(make, log) -> None:
    async with EventBroadcaster(port=0) as hub:
        broadcaster = make(hub.client, durability="delivered")
        await broadcaster.start()
        log.addHandler(SafeBroadcasterHandler(broadcaster))
        threads = [threading.Thread(target=lambda n=n: [log.info("%d", n) for _ in range(50)]) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert await broadcaster.drain(5)
        assert hub.get_stats()["events"] == 200


async def test_what_no_json_can_carry_is_written_otherwise(make, log) -> None:
    class Odd:
        def __repr__(self) -> str:
            return "odd \udcff"

    async with EventBroadcaster(port=0) as hub:
        broadcaster = make(hub.client, max_event_bytes=65_536)
        await broadcaster.start()
        log.addHandler(SafeBroadcasterHandler(broadcaster))
        log.info("cannot read %s", "a\udcff.txt", extra={"odd": Odd(), "free": 0.03}, stack_info=True)
        log.info("long", extra={"odd": ["\udcff" * 50_000]})
        assert await broadcaster.drain(5)
        odd, long = [message["data"]["content"] for message in hub.get_messages_since(0)]
    assert odd["message"] == "cannot read a\\udcff.txt"
    assert odd["extra"] == {"odd": "odd \\udcff", "free": 0.03}
    assert "test_what_no_json_can_carry" in odd["stack"]
    assert long["message"] == "long…"


async def test_a_record_that_is_too_large_is_cut(make, log) -> None:
    async with EventBroadcaster(port=0) as hub:
        broadcaster = make(hub.client, max_event_bytes=4096)
        await broadcaster.start()
        log.addHandler(SafeBroadcasterHandler(broadcaster))
        log.info("x" * 10_000, extra={"more": "y" * 10_000})
        assert await broadcaster.drain(5)
        [event] = [message["data"] for message in hub.get_messages_since(0)]
        assert event["content"]["message"] == "x" * 1000 + "…"
        assert "extra" not in event["content"]


class Talkative:
    """A broadcaster that logs about what it does, and may fail."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)
        self.events: list[dict] = []
        self.error: Exception | None = None

    def emit_nowait(self, event, *, durability=None) -> bool:
        self.logger.warning("emitting")
        if self.error is not None:
            raise self.error
        self.events.append(event)
        return True


def test_a_record_about_the_emitting_of_a_record_does_not_go_round(log) -> None:
    broadcaster = Talkative("app.engine")
    log.addHandler(SafeBroadcasterHandler(broadcaster))
    log.info("a")
    log.info("b")
    assert [event["content"]["message"] for event in broadcaster.events] == ["a", "b"]


def test_records_of_this_package_are_left_out_unless_they_are_wanted() -> None:
    own, other = logging.getLogger("safe_broadcaster.test"), logging.getLogger("safe_broadcaster_of_mine")
    broadcaster = Talkative("app.engine")
    handlers = [SafeBroadcasterHandler(broadcaster), SafeBroadcasterHandler(broadcaster, own=True)]
    try:
        for wanted, handler in enumerate(handlers):
            for logger in (own, other):
                logger.addHandler(handler)
                logger.warning("a")
                logger.removeHandler(handler)
            assert len(broadcaster.events) == 1 + 2 * wanted
    finally:
        broadcaster.events.clear()


def test_a_broadcaster_that_fails_is_the_handlers_affair_and_not_the_programs(log, capsys, monkeypatch) -> None:
    broadcaster = Talkative("elsewhere")
    broadcaster.error = OSError("no")
    log.addHandler(SafeBroadcasterHandler(broadcaster))
    monkeypatch.setattr(logging, "raiseExceptions", True)
    log.info("a")
    assert "OSError: no" in capsys.readouterr().err
    broadcaster.error = None
    log.info("b")
    assert [event["content"]["message"] for event in broadcaster.events] == ["b"]


def test_a_formatter_shapes_the_message(log) -> None:
    broadcaster = Talkative("elsewhere")
    handler = SafeBroadcasterHandler(broadcaster)
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    log.addHandler(handler)
    log.info("a")
    assert broadcaster.events[0]["content"]["message"] == "[INFO] a"


def test_what_cannot_emit_is_refused() -> None:
    with pytest.raises(ConfigError, match="broadcaster=None"):
        SafeBroadcasterHandler(None)


def test_the_package_installs_no_handler() -> None:
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "safe_broadcaster" and isinstance(logger, logging.Logger):
            assert logger.handlers == []
