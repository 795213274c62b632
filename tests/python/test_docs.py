"""What README and examples show works as it is shown, and what the documents name exists."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import re
import textwrap
from pathlib import Path

import pytest

import safe_broadcaster
from safe_broadcaster import EventBroadcaster

ROOT = Path(__file__).parents[2]


def snippets(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def hub():
    async with EventBroadcaster(port=0) as hub:
        yield hub


@pytest.mark.parametrize("number", range(len(snippets("README.md"))))
async def test_every_snippet_of_the_readme_runs(number, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = snippets("README.md")[number].replace("ws://127.0.0.1:8000/ws", hub.url).replace("port=8000", "port=0")
    scope: dict = {"forever": lambda: asyncio.sleep(0)}
    exec("async def main():\n" + textwrap.indent(code, "    "), scope)
    before = hub.get_stats()["events"]
    await asyncio.wait_for(scope["main"](), 20)
    if "safe_emit" in code:
        assert hub.get_stats()["events"] == before + 1


async def test_the_engine_example_emits(hub, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    await load(ROOT / "examples/engine.py").main(hub.url, ticks=3, pause=0.01)
    assert hub.get_stats()["events"] >= 4
    assert "broadcaster_ready" in capsys.readouterr().out


async def test_the_plain_server_example_receives_each_event_once(capsys) -> None:
    await load(ROOT / "examples/plain_server.py").main()
    assert capsys.readouterr().out.strip() == str(list(range(10)))


async def nothing() -> None:
    pass


async def state() -> list[int]:
    return [1]


PAGES = [(page, number) for page in ("docs/boot.md", "docs/sources.md") for number in range(len(snippets(page)))]


@pytest.mark.parametrize(("page", "number"), PAGES)
async def test_every_snippet_about_the_systems_around_runs(page, number, make, capsys) -> None:
    """Each in a program that has what its names stand for, and with no task left in the end."""
    before = asyncio.all_tasks()
    hub = EventBroadcaster(port=0)
    scope = {
        **{name: getattr(safe_broadcaster, name) for name in safe_broadcaster.__all__},
        "hub": hub,
        "broadcaster": make(hub.client),
        "asyncio": asyncio,
        "logging": logging,
        **dict.fromkeys(["ingest_schemas", "start_engines", "stop_engines"], nothing),
        **dict.fromkeys(["read_status", "read_queue"], state),
    }
    code = snippets(page)[number]
    exec("async def main():\n" + textwrap.indent(code, "    "), scope)
    async with contextlib.AsyncExitStack() as stack:
        if "BootSequence" not in code:
            await stack.enter_async_context(hub)
            await stack.enter_async_context(scope["broadcaster"])
        await asyncio.wait_for(scope["main"](), 20)
    for handler in list(logging.root.handlers):
        if isinstance(handler, safe_broadcaster.SafeBroadcasterHandler):
            logging.root.removeHandler(handler)
    assert asyncio.all_tasks() == before
    if "BootSequence" in code:
        assert "[4/4] engines: undone" in capsys.readouterr().out


DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", (ROOT / document).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_proof_that_is_named_exists() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    sources = [
        path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.*") if path.suffix in {".rs", ".py"}
    ]
    functions = set(re.findall(r"(?:def|fn) (\w+)", "".join(path.read_text() for path in sources)))
    named = set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){3,})`", text))
    assert len(named) > 50
    assert named - functions == set()
    files = re.findall(r"`((?:src|tests|chaos|benchmarks)/[\w/.]*)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []
