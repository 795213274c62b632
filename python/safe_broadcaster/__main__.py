"""``python -m safe_broadcaster`` is ``safe-broadcaster``."""

from __future__ import annotations

import sys

from safe_broadcaster.cli import main

if __name__ == "__main__":
    sys.exit(main())
