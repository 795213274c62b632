"""``safe-broadcaster completion``: has a shell complete commands and options."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from safe_broadcaster.cli.common import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["TEXT", "add", "run"]

TEXT = "print a script that has your shell complete commands and options: source it in the shell's start file"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> int:
    """Run it."""
    write: dict[str, Callable[[dict[str, list[str]]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    print(write[arguments.shell](dict(_words(arguments.parser, ""))), end="")
    return 0


def _words(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """For each command, as "spill show", what may follow it: its options and its own commands."""
    words = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            choices: dict[str, argparse.ArgumentParser] = action.choices  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            for name, each in choices.items():
                words.append(name)
                yield from _words(each, f"{path} {name}".strip())
        elif action.choices is not None and not action.option_strings:
            words += [str(choice) for choice in action.choices]
    yield path, words


def _bash(words: dict[str, list[str]]) -> str:
    cases = "\n".join(f'        "{path}") words="{" ".join(each)}" ;;' for path, each in words.items())
    commands = " ".join(sorted({f'"{path}"' for path in words if path}))
    return f"""\
_safe_broadcaster() {{
    local word path="" known words=""
    local commands=({commands})
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        for known in "${{commands[@]}}"; do
            if [ "$known" = "${{path:+$path }}$word" ]; then path="$known"; break; fi
        done
    done
    case "$path" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _safe_broadcaster {PROGRAM}
"""


def _zsh(words: dict[str, list[str]]) -> str:
    return f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{_bash(words)}"


def _fish(words: dict[str, list[str]]) -> str:
    lines: list[str] = []
    for path, each in words.items():
        parts = path.split()
        seen = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in parts) or "__fish_use_subcommand"
        for word in each:
            what = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c {PROGRAM} -n '{seen}' {what}")
    return "\n".join(lines) + "\n"
