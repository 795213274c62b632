"""``safe-broadcaster spill``: look into a spill, check it, take events out of it, have parked ones sent again.

Everything goes through the core, and works while the broadcaster that owns the file runs in another process.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import orjson

from safe_broadcaster import _core
from safe_broadcaster.cli.common import Exit, echo_json, json_option

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["spill"]

_CHUNK = 1 << 20
"""Bytes of events read at a time: a spill may be larger than memory."""
_LISTED = 10
"""Gaps and parked events shown to people; ``--json`` shows all."""

_path = click.argument("path", metavar="PATH")


@click.group()
def spill() -> None:
    """Look into a spill, check it, take events out of it, have parked ones sent again.

    PATH is the spill_path of a broadcaster, which may be running.
    """


@spill.command()
@_path
@json_option("As one JSON object.")
def show(path: str, as_json: bool) -> None:
    """Tell what a spill holds: its owner, its events, its gaps, what is parked."""
    text = _core.spill_show(path)
    if as_json:
        click.echo(text.decode())
        return
    summary: dict[str, Any] = orjson.loads(text)
    gaps, parked = summary["gaps"], summary["parked"]
    oldest, owner = summary["oldest_age"], summary["owner"]
    stored = f"{summary['first_seq']} to {summary['last_seq']}" if summary["last_seq"] is not None else "nothing"
    age = "" if oldest is None else f", the oldest {oldest:.0f} s old"
    click.echo(f"emitter    {summary['emitter']}, epoch {summary['epoch']}")
    click.echo(f"owner      {'none is running' if owner is None else f'process {owner}'}")
    click.echo(f"events     {summary['events']} ({summary['bytes']} bytes of {summary['file_bytes']} in the file){age}")
    click.echo(f"seqs       confirmed to {summary['acked_seq']}, stored: {stored}")
    click.echo(f"gaps       {len(gaps)}")
    for gap in gaps[:_LISTED]:
        click.echo(f"           {gap['from']} to {gap['to']}: {gap['reason']}")
    _more(gaps)
    click.echo(f"parked     {len(parked)}")
    for event in parked[:_LISTED]:
        when = f"{event['age']:.0f} s ago" + (", to be sent again" if event["wanted"] else "")
        click.echo(f"           seq {event['seq']}, {event['bytes']} bytes, {when}: {event['reason']}")
    _more(parked)


def _more(listed: list[Any]) -> None:
    if len(listed) > _LISTED:
        click.echo(f"           and {len(listed) - _LISTED} more (--json shows all)")


@spill.command()
@_path
@json_option("The findings as one JSON array.")
def verify(path: str, as_json: bool) -> int:
    """Check a spill in full: exit code 1 if something is wrong with it."""
    findings = _core.spill_verify(path)
    if as_json:
        echo_json(findings)
    else:
        for finding in findings or ["ok"]:
            click.echo(finding)
    return Exit.FAILED if findings else Exit.DONE


@spill.command()
@_path
@click.option("--parked", is_flag=True, help="The parked events instead of those that wait.")
@click.option("-o", "--output", metavar="FILE", help="Where to.  [default: the standard output]")
def export(path: str, parked: bool, output: str | None) -> None:
    """Write the events of a spill: one JSON a line, oldest first; nothing is changed."""
    with _target(output) as out:
        for event in _events(path, parked=parked):
            out.write(event + b"\n")
        out.flush()


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


@spill.command()
@_path
@click.argument("seqs", metavar="[SEQ]...", nargs=-1, type=int)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@json_option("How many, and by which process, as one JSON object.")
def requeue(path: str, seqs: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Have parked events sent again, those with these SEQs or all.

    As new events: by the running broadcaster while its link is up, or after its next start.
    """
    if everything == bool(seqs):
        raise click.UsageError("either SEQs or --all")
    count = _core.spill_requeue(path, None if everything else list(seqs))
    owner = orjson.loads(_core.spill_show(path))["owner"]
    if as_json:
        echo_json({"requeued": count, "owner": owner})
        return
    who = "after the next start of the broadcaster" if owner is None else f"by process {owner} while its link is up"
    click.echo(f"{count} parked events are sent again {who}")
