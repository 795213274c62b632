"""The demo: its parts, and the whole run with a hub that is killed twice."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import websockets.asyncio.server as websockets_server

from safe_broadcaster import EventBroadcaster
from safe_broadcaster.demo.modules import find_modules, part_of, read_module
from safe_broadcaster.demo.subscriber import Refused, Subscriber, connect
from safe_broadcaster.demo.verdict import EngineReport, Tally, judge
from safe_broadcaster.demo.websocket import Handshake, Message, Opcode, ProtocolError, Reader, encode

# ---- the whole


@pytest.mark.timeout(120)
def test_the_demo_ends_in_zeros() -> None:
    command = [sys.executable, "-m", "safe_broadcaster", "demo", "--seconds", "8", "--rate", "500", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    verdict = json.loads(run.stdout)
    assert verdict["ok"]
    assert (verdict["lost"], verdict["duplicated"], verdict["out_of_order"]) == (0, 0, 0)
    assert verdict["delivered"] == verdict["emitted"] > 1000
    assert verdict["hub_kills"] == 2
    assert verdict["deepest_spill"] > 0


# ---- the verdict can fail


def event(n: int, citizen: str = "ada") -> dict:
    return {"type": "x", "content": {"citizen_id": citizen, "n": n}}


def report(citizen: str = "ada", emitted: int = 5, **fields) -> EngineReport:
    values = {"deepest_spill": 0, "longest_flush": 0.0, "drained": True, "nodes": 1, "edges": 1, "skipped": 0}
    return EngineReport(citizen=citizen, emitted=emitted, generation=1, **{**values, **fields})


def verdict_of(*numbers: int, emitted: int = 5):
    tally = Tally()
    for n in numbers:
        tally.see(event(n))
    return judge(tally, {"ada": report(emitted=emitted)}, hub_kills=2)


def test_a_whole_run_passes() -> None:
    verdict = verdict_of(1, 2, 3, 4, 5)
    assert verdict.ok
    assert (verdict.emitted, verdict.delivered) == (5, 5)


@pytest.mark.parametrize(
    ("numbers", "lost", "duplicated", "out_of_order"),
    [
        ((1, 2, 4, 5), 1, 0, 0),
        ((1, 2, 3), 2, 0, 0),
        ((2, 3, 4, 5), 1, 0, 0),
        ((), 5, 0, 0),
        ((1, 2, 2, 3, 4, 5), 0, 1, 0),
        ((1, 2, 3, 4, 5, 1, 2), 0, 2, 0),
        ((1, 3, 2, 4, 5), 0, 0, 1),
        ((1, 3, 2, 2, 4), 1, 1, 1),
    ],
)
def test_what_went_wrong_is_counted(numbers, lost: int, duplicated: int, out_of_order: int) -> None:
    verdict = verdict_of(*numbers)
    assert not verdict.ok
    assert (verdict.lost, verdict.duplicated, verdict.out_of_order) == (lost, duplicated, out_of_order)


def test_engines_are_counted_apart() -> None:
    tally = Tally()
    for citizen, n in [("ada", 1), ("felix", 1), ("felix", 2), ("ada", 2)]:
        tally.see(event(n, citizen))
    assert judge(tally, {"ada": report(emitted=2), "felix": report("felix", 2)}, hub_kills=0).ok


def test_a_run_that_proves_nothing_fails() -> None:
    assert not verdict_of(emitted=0).ok
    silent = judge(Tally(), {"ada": None}, hub_kills=0)
    assert not silent.ok
    assert "ada" in silent.problems[0]
    assert not verdict_of(1, 2, 3, emitted=2).ok, "more arrived than was emitted"


def test_strangers_are_not_judged() -> None:
    tally = Tally()
    for stranger in [{}, {"content": None}, {"content": {"citizen_id": "ada"}}, {"content": {"citizen_id": 1, "n": 1}}]:
        tally.see(stranger)
    assert (tally.strangers, tally.delivered) == (4, 0)


# ---- RFC 6455


def server_frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    size = len(payload)
    first = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        return first + bytes([size]) + payload
    return first + bytes([126]) + size.to_bytes(2, "big") + payload


def test_messages_are_whole_however_the_bytes_come() -> None:
    data = (
        server_frame(1, b"one", fin=False)
        + server_frame(9, b"ping")
        + server_frame(0, b"two", fin=False)
        + server_frame(0, b"three")
        + server_frame(1, b"x" * 300)
    )
    expected = [Message(Opcode.PING, b"ping"), Message(Opcode.TEXT, b"onetwothree"), Message(Opcode.TEXT, b"x" * 300)]
    for size in (1, 2, 3, 7, len(data)):
        reader = Reader()
        chunks = [data[at : at + size] for at in range(0, len(data), size)]
        assert [message for chunk in chunks for message in reader.feed(chunk)] == expected


@pytest.mark.parametrize(
    "data",
    [
        bytes([0xC1, 0]),  # a reserved bit
        bytes([0x81, 0x80, 0, 0, 0, 0]),  # masked by a server
        bytes([0x83, 0]),  # an unknown opcode
        bytes([0x09, 0]),  # a fragmented ping
        bytes([0x80, 0]),  # a continuation of nothing
        server_frame(1, b"a", fin=False) + server_frame(1, b"b"),
        server_frame(9, b"x" * 126),
        server_frame(1, b"x" * 20_000),  # over the limit
    ],
)
def test_what_breaks_the_rfc_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(Reader(max_bytes=10_000).feed(data))


def test_close_codes() -> None:
    assert Message(Opcode.CLOSE, b"").close_code == 1005
    assert Message(Opcode.CLOSE, b"\x0b\xb9bye").close_code == 3001


def test_handshakes_that_are_none() -> None:
    handshake = Handshake("h", "/")
    for answer in [b"", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 403 Forbidden\r\n\r\n", b"HTTP/1.1 101 Ok\r\n\r\n"]:
        with pytest.raises(ProtocolError):
            handshake.check(answer)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 300_000])
async def test_a_real_server_understands_us_and_we_it(size: int) -> None:
    async def echo(socket) -> None:
        async for message in socket:
            await socket.ping()
            await socket.send([message[: size // 2], message[size // 2 :]])

    async with websockets_server.serve(echo, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await connect(f"ws://127.0.0.1:{port}/x?y=1")
        text = "é" * (size // 2) + "x" * (size % 2)
        writer.write(encode(Opcode.TEXT, text.encode()))
        frames, got = Reader(), []
        while not any(message.opcode is Opcode.TEXT for message in got):
            got += frames.feed(await reader.read(65_536))
        assert [message.payload.decode() for message in got if message.opcode is Opcode.TEXT] == [text]
        writer.write(encode(Opcode.CLOSE, b"\x03\xe8"))
        while data := await reader.read(65_536):
            got += frames.feed(data)
        assert got[-1].close_code == 1000
        writer.close()


async def test_what_is_no_websocket_server_is_told() -> None:
    async def answer(reader, writer) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        with pytest.raises(ConnectionError):
            await connect(url)
    with pytest.raises(ProtocolError, match="URL"):
        await connect("http://127.0.0.1/")


# ---- the subscriber, against a hub that is played


class PlayedHub:
    """Speaks the hub's frames from a log in memory; ``restart`` begins a new epoch with an empty log."""

    def __init__(self) -> None:
        self.epoch = 1
        self.log: list[dict] = []
        self.requests: list[dict] = []
        self.sockets: set = set()
        self.close_with: int | None = None

    def frame(self, offset: int, **more) -> str:
        return json.dumps({"type": "event", "seq": offset, "prev": offset - 1, "data": self.log[offset - 1], **more})

    async def publish(self, n: int) -> None:
        self.log.append(event(n))
        for socket in self.sockets:
            await socket.send(self.frame(len(self.log)))

    def restart(self) -> None:
        self.epoch += 1
        self.log = []
        self.drop()

    def drop(self) -> None:
        """The connections end as they do when a process is killed."""
        for socket in self.sockets:
            socket.transport.abort()
        self.sockets.clear()

    async def __call__(self, socket) -> None:
        async for text in socket:
            frame = json.loads(text)
            if frame["type"] == "subscribe":
                await self.subscribe(socket, frame["data"])
            if frame["type"] == "ping":
                reached = {"epoch": f"k{self.epoch}", "offset": len(self.log)}
                await socket.send(json.dumps({"type": "pong", "lastSeq": 0, **reached}))
        self.sockets.discard(socket)

    async def subscribe(self, socket, request: dict) -> None:
        self.requests.append(request)
        if self.close_with is not None:
            await socket.close(self.close_with, "go away")
            return
        answer = {"action": "subscribed", "epoch": f"k{self.epoch}", "offset": len(self.log)}
        since = request.get("since")
        recovered = since is not None and since["epoch"] == answer["epoch"]
        if since is not None:
            answer |= {"recovered": recovered} | ({} if recovered else {"reason": "epoch"})
        await socket.send(json.dumps(answer))
        for offset in range(since["offset"] + 1, len(self.log) + 1) if recovered else ():
            await socket.send(self.frame(offset, replay=True))
        if not recovered and since is not None and self.log:
            # Live in the moment before the client has asked for the whole log.
            await socket.send(self.frame(len(self.log)))
        self.sockets.add(socket)


async def eventually(condition) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 10)


@pytest.fixture
async def played():
    hub = PlayedHub()
    async with websockets_server.serve(hub, "127.0.0.1", 0, compression=None) as server:
        seen: list[int] = []
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        subscriber = Subscriber(url, lambda event: seen.append(event["content"]["n"]), pause=0.01)
        task = asyncio.create_task(subscriber.run())
        await eventually(lambda: hub.sockets)
        yield hub, subscriber, seen, task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_resumes_where_it_was(played) -> None:
    hub, subscriber, seen, _ = played
    await hub.publish(1)
    await eventually(lambda: seen == [1])
    hub.drop()
    await hub.publish(2)
    await eventually(lambda: seen == [1, 2])
    assert hub.requests[1]["since"] == {"epoch": "k1", "offset": 1}
    assert subscriber.holes == 0


async def test_a_hub_that_forgot_is_read_from_its_beginning(played) -> None:
    hub, _, seen, _ = played
    for n in (1, 2, 3):
        await hub.publish(n)
    await eventually(lambda: seen == [1, 2, 3])
    hub.restart()
    for n in (4, 5):
        await hub.publish(n)
    await eventually(lambda: seen == [1, 2, 3, 4, 5])
    assert hub.requests[-1]["since"] == {"epoch": "k2", "offset": 0}
    await hub.publish(6)
    await eventually(lambda: seen == [1, 2, 3, 4, 5, 6])


async def test_a_gap_is_counted_and_passed(played) -> None:
    hub, subscriber, seen, _ = played
    for socket in hub.sockets:
        await socket.send(json.dumps({"type": "gap", "data": {"from": 1, "to": 7, "reason": "shed"}}))
        await socket.send(json.dumps({"type": "ping", "lastSeq": 7}))
        lost = {"emitter": "ada", "epoch": "e", "from": 90, "to": 99, "reason": "spill_full"}
        await socket.send(json.dumps({"type": "gap", "seq": 8, "prev": 7, "data": lost}))
    await eventually(lambda: subscriber.position == ("k1", 8))
    assert (subscriber.holes, seen) == (2, [])


async def test_who_waits_for_rare_events_does_not_stay_at_an_old_position() -> None:
    async with EventBroadcaster(port=0, replay_events=2) as hub:
        seen: list[dict] = []
        subscriber = Subscriber(hub.url, seen.append, patterns=["rare"], heartbeat=0.05)
        task = asyncio.create_task(subscriber.run())
        await asyncio.wait_for(subscriber.connected.wait(), 10)
        for n in range(9):
            await hub.broadcast("common", n)
        await eventually(lambda: subscriber.position.offset == 9)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await hub.broadcast("rare", 1)
        task = asyncio.create_task(subscriber.run())
        await eventually(lambda: seen == [{"type": "rare", "data": 1}])
        assert subscriber.holes == 0, "the log has forgotten what it did not want"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_does_not_come_back_where_it_is_not_wanted(played) -> None:
    hub, _, _, task = played
    hub.close_with = 3500
    hub.restart()
    with pytest.raises(Refused, match="3500"):
        await asyncio.wait_for(task, 10)


# ---- the graph


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "top.py": "import pkg.inner\nimport os, json\n",
        "pkg/__init__.py": "from . import inner\nfrom .deep import leaf as x\n",
        "pkg/inner.py": """
            from ..nowhere import y
            from pkg import inner, CONSTANT
            class A:
                def f(self): import json
                async def g(self): import json
        """,
        "pkg/deep/__init__.py": "",
        "pkg/deep/leaf.py": "from ...top import z\nfrom .. import inner\n",
        "broken.py": "def (:",
        "nul.py": "x = '\0'",
        "not-a-module.py": "import os",
        "site-packages/other.py": "import os",
        "__pycache__/cached.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path


def test_modules_are_found_by_their_names(tree: Path) -> None:
    modules = find_modules([tree])
    assert list(modules) == ["broken", "nul", "pkg", "pkg.deep", "pkg.deep.leaf", "pkg.inner", "top"]
    assert find_modules([tree / "missing"]) == {}


def test_parts_are_disjoint_and_whole(tree: Path) -> None:
    modules = find_modules([tree])
    parts = [part_of(modules, part, 3) for part in range(3)]
    assert sorted(name for part in parts for name in part) == list(modules)
    assert parts == [part_of(find_modules([tree]), part, 3) for part in range(3)]


def test_imports_become_edges(tree: Path) -> None:
    modules = find_modules([tree])

    def targets(name: str) -> list[str]:
        facts = read_module(name, modules[name], modules)
        assert facts is not None
        return [target for target, _ in facts.imports]

    assert targets("top") == ["pkg.inner", "os", "json"]
    assert targets("pkg") == ["pkg.inner", "pkg.deep.leaf"] or targets("pkg") == ["pkg.inner", "pkg.deep"]
    assert targets("pkg.deep.leaf") == ["top", "pkg.inner"]
    inner = read_module("pkg.inner", modules["pkg.inner"], modules)
    assert inner is not None
    assert (inner.classes, inner.functions, inner.is_package) == (1, 2, False)
    assert dict(inner.imports)["pkg"] == 3
    assert dict(inner.imports)["json"] == 5


def test_what_cannot_be_parsed_is_none(tree: Path) -> None:
    modules = find_modules([tree])
    assert read_module("broken", modules["broken"], modules) is None
    assert read_module("nul", modules["nul"], modules) is None
    assert read_module("gone", tree / "gone.py", modules) is None
