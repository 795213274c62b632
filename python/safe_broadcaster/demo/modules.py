"""A real graph to broadcast: the modules of the standard library and of the installed packages, and their imports."""

from __future__ import annotations

import ast
import sysconfig
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Facts", "find_modules", "library_roots", "part_of", "read_module"]


@dataclass(frozen=True)
class Facts:
    """What one source file says of itself."""

    module: str
    is_package: bool
    lines: int
    classes: int
    functions: int
    imports: tuple[tuple[str, int], ...]
    """Each imported module with the line of its first import."""


def library_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages of this interpreter."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def find_modules(roots: list[Path]) -> dict[str, Path]:
    """All modules below the roots by their dotted names, in a fixed order; an earlier root wins."""
    found: dict[str, Path] = {}
    for root in roots:
        for path in _sources(root):
            found.setdefault(_name(path.relative_to(root)), path)
    return dict(sorted(found.items()))


def part_of(modules: Mapping[str, Path], part: int, parts: int) -> dict[str, Path]:
    """The modules of one of ``parts`` engines: the same in every run and process, and disjoint."""
    return {name: path for name, path in modules.items() if zlib.crc32(name.encode()) % parts == part}


def read_module(name: str, path: Path, known: Mapping[str, Path]) -> Facts | None:
    """Parses one file; None where it cannot be parsed (templates, other versions' syntax, other encodings)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes and the like in files that are not ours
            source = path.read_bytes()
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return None
    is_package = path.name == "__init__.py"
    imports: dict[str, int] = {}
    classes = functions = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            classes += 1
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions += 1
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for target in _targets(node, name if is_package else name.rpartition(".")[0], known):
                imports.setdefault(target, node.lineno)
    imports.pop(name, None)
    return Facts(name, is_package, source.count(b"\n") + 1, classes, functions, tuple(imports.items()))


def _sources(root: Path) -> Iterator[Path]:
    """Python files below ``root`` that an import can reach."""
    if not root.is_dir():
        return
    for entry in sorted(root.iterdir()):
        if entry.is_dir():
            # The standard library's folder holds site-packages, which is a root of its own.
            if entry.name.isidentifier() and entry.name != "__pycache__":
                yield from _sources(entry)
        elif entry.suffix == ".py" and entry.stem.isidentifier():
            yield entry


def _name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _targets(node: ast.Import | ast.ImportFrom, package: str, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that an import statement names: ``from a import b`` is ``a.b`` where that is a module, else ``a``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        if not package:
            return  # a relative import outside of any package: cannot be meant
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *([base] if base else [])])
    for alias in node.names:
        inner = f"{base}.{alias.name}" if base else alias.name
        if inner in known:
            yield inner
        elif base:
            yield base
