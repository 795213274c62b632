"""Carries events from Python engines to live dashboards without losing one silently."""

from __future__ import annotations

import os

from safe_broadcaster import _core

__version__: str = _core.__version__

os.register_at_fork(after_in_child=_core._after_fork_in_child)
