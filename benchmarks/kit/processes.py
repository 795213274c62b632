"""Other processes: started here, ended here by their own id, and ending by themselves when their input closes."""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TOOLS = HERE / "tools" / "target" / "release"
_CPUS = sorted(os.sched_getaffinity(0))


def client_cpus(layout: str) -> list[int]:
    """Where the layout puts what is measured: anywhere, or on the first CPU."""
    return _CPUS[:1] if layout == "split" else _CPUS


def server_cpus(layout: str) -> list[int]:
    """Where the layout puts what is talked to: anywhere, or on the last CPU."""
    return _CPUS[-1:] if layout == "split" else _CPUS


def pin_client(layout: str) -> None:
    """Moves this process, and all threads it will start, to where the layout wants it."""
    os.sched_setaffinity(0, client_cpus(layout))


def start(argv: list[str], cpus: list[int]) -> subprocess.Popen[str]:
    before = os.sched_getaffinity(0)
    # What a child inherits cannot be late, as a change after its start could.
    os.sched_setaffinity(0, cpus)
    try:
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE)
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def process(argv: list[str], cpus: list[int] = _CPUS) -> Iterator[subprocess.Popen[str]]:
    """A child for the time of the block: asked to end by closing its input, killed if it does not."""
    child = start(argv, cpus)
    try:
        yield child
    finally:
        child.stdin.close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def role(name: str, *arguments: object) -> list[str]:
    """The command line of `roles/<name>.py`."""
    return [sys.executable, "-m", f"roles.{name}", *map(str, arguments)]


def ask(child: subprocess.Popen[str], **command: object) -> dict:
    """Sends a child one JSON line and waits for the one it answers with."""
    tell(child, **command)
    return answer(child)


def tell(child: subprocess.Popen[str], **command: object) -> None:
    child.stdin.write(json.dumps(command) + "\n")
    child.stdin.flush()


def answer(child: subprocess.Popen[str]) -> dict:
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"{child.args} ended without an answer")
    return json.loads(line)


@contextmanager
def sink(layout: str = "free", port: int = 0) -> Iterator[int]:
    """The counting WebSocket sink (`tools/src/bin/sink.rs`); gives its port."""
    with process([tool("sink"), "--port", str(port)], server_cpus(layout)) as child:
        yield answer(child)["port"]


@contextmanager
def folder_on_disk() -> Iterator[Path]:
    """A folder for the time of the block. Not in the system's temporary one, which may be in memory."""
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        yield Path(folder)


def tool(name: str) -> str:
    path = TOOLS / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: cargo build --release --manifest-path {HERE}/tools/Cargo.toml")
    return str(path)


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used so far."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def closed_port() -> int:
    """A port on which nobody listens, below those that the system gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
