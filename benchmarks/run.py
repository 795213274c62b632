"""Runs every benchmark in turn; keeps their lines in `out/*.jsonl`, what else they say in `out/*.log`; writes
`out/report.md`.

`python benchmarks/run.py [--quick] [--only caller,flood] [--write FILE]`. One after the other, never at once: the point
is that nothing else is running. Each runs on asyncio and on uvloop where the loop matters, with the scheduler free and
with client and servers on CPUs of their own where that matters. One that fails is named at the end and does not stop
the rest.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kit.processes import HERE, tool

PLAN = [
    ("caller", "asyncio", "free"),
    ("caller", "uvloop", "free"),
    ("caller", "asyncio", "split"),
    ("flood", "asyncio", "free"),
    ("flood", "uvloop", "free"),
    ("flood", "asyncio", "split"),
    ("latency", "asyncio", "free"),
    ("latency", "uvloop", "free"),
    ("latency", "asyncio", "split"),
    ("sparse", "asyncio", "free"),
    ("sparse", "uvloop", "free"),
    ("spill", "asyncio", "free"),
    ("durable", "asyncio", "free"),
    ("durable", "uvloop", "free"),
    ("restart", "asyncio", "free"),
    ("fanout", "asyncio", "split"),
    ("storm", "asyncio", "split"),
    ("bridge", "asyncio", "free"),
    ("bridge", "uvloop", "free"),
    ("aggregate", "asyncio", "free"),
]
PACKAGES = (
    "safe-broadcaster",
    "orjson",
    "websockets",
    "aiohttp",
    "picows",
    "socketify",
    "starlette",
    "uvicorn",
    "uvloop",
    "persist-queue",
    "litequeue",
    "redis",
    "hiredis",
    "nats-py",
)
SERVERS = ("redis-server", "nats-server")
# Each needs far less; a hang must not become a night.
LIMIT = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    names = ",".join(dict.fromkeys(name for name, _, _ in PLAN))
    parser.add_argument("--only", default="", metavar="NAMES", help=f"comma-separated: {names}")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this document too")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else {name for name, _, _ in PLAN}

    out = HERE / "out"
    out.mkdir(exist_ok=True)
    for old in [*out.glob("*.jsonl"), *out.glob("*.log")]:
        old.unlink()
    (out / "conditions.jsonl").write_text(json.dumps({"kind": "conditions", **conditions(args.quick)}) + "\n")
    failed = [" ".join(entry) for entry in PLAN if entry[0] in wanted and not run(*entry, out=out, quick=args.quick)]
    report = [sys.executable, str(HERE / "report.py"), *(["--write", str(args.write)] if args.write else [])]
    text = subprocess.run(report, check=True, capture_output=True, text=True).stdout
    (out / "report.md").write_text(text)
    print(text)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def run(name: str, loop: str, layout: str, *, out: Path, quick: bool) -> bool:
    """Runs one benchmark; its lines go to one file, whatever else it says to another."""
    print(f"{name} · {loop} · {layout}", file=sys.stderr, flush=True)
    command = [sys.executable, f"{HERE}/{name}.py", "--loop", loop, "--layout", layout, *(["--quick"] if quick else [])]
    began = time.monotonic()
    log = out / f"{name}-{loop}-{layout}.log"
    with log.with_suffix(".jsonl").open("w") as lines, log.open("w") as said:
        try:
            code = subprocess.run(command, stdout=lines, stderr=said, timeout=LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
    print(
        f"  {'done' if code == 0 else f'FAILED ({code}, see {log})'} in {time.monotonic() - began:.0f} s",
        file=sys.stderr,
    )
    return code == 0


def conditions(quick: bool) -> dict:
    """What a reader needs to judge the figures."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "size": "quick: figures mean nothing" if quick else "full",
        "CPU": f"{cpu_model()}, {len(os.sched_getaffinity(0))} usable",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": said("findmnt", "-no", "FSTYPE,SOURCE", "-T", str(HERE)),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "SQLite of the floor": sqlite(),
        **{package: installed(package) for package in PACKAGES},
        **{server: said(server, "--version") for server in SERVERS},
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def sqlite() -> str:
    return json.loads(said(tool("sqlite_floor")))["sqlite"]


def said(*command: str) -> str:
    """What a program says; nothing of the table hangs on it."""
    if shutil.which(command[0]) is None:
        return "not installed"
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
