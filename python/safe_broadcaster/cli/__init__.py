"""The command line: ``safe-broadcaster demo | serve | emit | tail | spill | doctor | bench | completion``.

It needs click and rich, the extra ``safe-broadcaster[cli]``; what an engine imports does not.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``safe-broadcaster``; returns the exit code (see :mod:`safe_broadcaster.cli.app`)."""
    try:
        from safe_broadcaster.cli.app import run  # noqa: PLC0415 only here it is told what is missing
    except ModuleNotFoundError as error:
        if error.name not in {"click", "rich"}:
            raise
        print(
            "safe-broadcaster: the command line needs click and rich: pip install 'safe-broadcaster[cli]'",
            file=sys.stderr,
        )
        return 1
    return run(argv)
