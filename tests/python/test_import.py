"""Importing the package is quick: what most programs do not need is imported when it is first asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import safe_broadcaster


def test_an_engine_imports_neither_hub_nor_systems() -> None:
    code = """
import sys
from safe_broadcaster import SafeBroadcaster, BroadcastError, EmitterConfig
print(*(name for name in sys.modules if name.startswith("safe_broadcaster.")))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.split(".")[1] for name in ended.stdout.split()}
    assert imported == {"_core", "config", "emitter", "exceptions", "mailbox", "peer"}


def test_every_name_is_there_whenever_it_is_asked_for() -> None:
    later = {name for names in safe_broadcaster._LATER.values() for name in names.split()}
    assert later <= set(safe_broadcaster.__all__) <= set(dir(safe_broadcaster))
    for name in safe_broadcaster.__all__:
        assert getattr(safe_broadcaster, name) is not None
    assert safe_broadcaster.sources.poll
    with pytest.raises(AttributeError, match="module 'safe_broadcaster' has no attribute 'Aggregater'"):
        safe_broadcaster.Aggregater  # noqa: B018
