"""An interpreter that has imported orjson only (`os` and `sys` are always there): prints its memory and ends."""

import os
import sys

import orjson

with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 pathlib would be memory too
    pages = int(statm.read().split()[1])
sys.stdout.write(orjson.dumps({"rss": pages * os.sysconf("SC_PAGESIZE")}).decode() + "\n")
