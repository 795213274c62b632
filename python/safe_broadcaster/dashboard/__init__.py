"""The page that a hub serves at ``/``: one file, which loads nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

__all__ = ["page"]


def page() -> str:
    """The HTML of the dashboard."""
    return (files(__name__) / "index.html").read_text(encoding="utf-8")
