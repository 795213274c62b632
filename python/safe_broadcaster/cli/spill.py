"""``safe-broadcaster spill``: look into a spill, check it, take events out of it, have parked ones sent again.

Everything goes through the core, and works while the broadcaster that owns the file runs in another process.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from safe_broadcaster import _core

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

__all__ = ["TEXT", "add", "run"]

TEXT = "look into a spill, check it, take events out of it, have parked ones sent again"

_CHUNK = 1 << 20
"""Bytes of events read at a time: a spill may be larger than memory."""
_LISTED = 10
"""Gaps and parked events shown to people; ``--json`` shows all."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, act: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = actions.add_parser(name, help=text.partition(":")[0], description=text[0].upper() + text[1:] + ".")
        command.add_argument("path", metavar="PATH", help="the spill_path of the broadcaster, which may be running")
        command.set_defaults(act=act)
        return command

    show = action("show", _show, "tell what a spill holds: its owner, its events, its gaps, what is parked")
    show.add_argument("--json", action="store_true", help="as one JSON object")
    verify = action("verify", _verify, "check a spill in full: exit code 1 if something is wrong with it")
    verify.add_argument("--json", action="store_true", help="the findings as a JSON array")
    export = action("export", _export, "write the events of a spill: one JSON a line, oldest first; nothing is changed")
    export.add_argument("--parked", action="store_true", help="the parked events instead of those that wait")
    export.add_argument("-o", "--output", metavar="FILE", help="where to (default: the standard output)")
    requeue = action(
        "requeue",
        _requeue,
        "have parked events sent again: as new events, by the running broadcaster while its link is up, or after its "
        "next start",
    )
    requeue.add_argument("--json", action="store_true", help="as one JSON object")
    which = requeue.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="all of them")
    which.add_argument("seq", metavar="SEQ", nargs="*", type=int, default=[], help="those with these seqs")


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    act: Callable[[argparse.Namespace], int] = arguments.act
    return act(arguments)


def _show(arguments: argparse.Namespace) -> int:
    text = _core.spill_show(arguments.path)
    if arguments.json:
        print(text.decode())
        return 0
    summary: dict[str, Any] = orjson.loads(text)
    gaps, parked = summary["gaps"], summary["parked"]
    oldest, owner = summary["oldest_age"], summary["owner"]
    stored = f"{summary['first_seq']} to {summary['last_seq']}" if summary["last_seq"] is not None else "nothing"
    age = "" if oldest is None else f", the oldest {oldest:.0f} s old"
    print(f"emitter    {summary['emitter']}, epoch {summary['epoch']}")
    print(f"owner      {'none is running' if owner is None else f'process {owner}'}")
    print(f"events     {summary['events']} ({summary['bytes']} bytes of {summary['file_bytes']} in the file){age}")
    print(f"seqs       confirmed to {summary['acked_seq']}, stored: {stored}")
    print(f"gaps       {len(gaps)}")
    for gap in gaps[:_LISTED]:
        print(f"           {gap['from']} to {gap['to']}: {gap['reason']}")
    _more(gaps)
    print(f"parked     {len(parked)}")
    for event in parked[:_LISTED]:
        when = f"{event['age']:.0f} s ago" + (", to be sent again" if event["wanted"] else "")
        print(f"           seq {event['seq']}, {event['bytes']} bytes, {when}: {event['reason']}")
    _more(parked)
    return 0


def _more(listed: list[Any]) -> None:
    if len(listed) > _LISTED:
        print(f"           and {len(listed) - _LISTED} more (--json shows all)")


def _verify(arguments: argparse.Namespace) -> int:
    findings = _core.spill_verify(arguments.path)
    if arguments.json:
        print(orjson.dumps(findings).decode())
        return 1 if findings else 0
    for finding in findings:
        print(finding)
    if not findings:
        print("ok")
    return 1 if findings else 0


def _export(arguments: argparse.Namespace) -> int:
    with _target(arguments.output) as out:
        for event in _events(arguments.path, parked=arguments.parked):
            out.write(event + b"\n")
        out.flush()
    return 0


def _target(output: str | None) -> Any:
    if output is None:
        standard: BinaryIO = sys.stdout.buffer
        return nullcontext(standard)
    return Path(output).open("wb")


def _events(path: str, *, parked: bool) -> Iterator[bytes]:
    after = 0
    while batch := _core.spill_events(path, parked, after, _CHUNK):
        for key, event in batch:
            yield event
            after = key


def _requeue(arguments: argparse.Namespace) -> int:
    count = _core.spill_requeue(arguments.path, None if arguments.all else arguments.seq)
    owner = orjson.loads(_core.spill_show(arguments.path))["owner"]
    if arguments.json:
        print(orjson.dumps({"requeued": count, "owner": owner}).decode())
        return 0
    who = "after the next start of the broadcaster" if owner is None else f"by process {owner} while its link is up"
    print(f"{count} parked events are sent again {who}")
    return 0
