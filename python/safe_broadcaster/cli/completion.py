"""``safe-broadcaster completion``: what a shell needs to complete the command line."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from safe_broadcaster.cli.common import PROGRAM

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    r"""Print the completion script of a shell.

    \b
    bash  eval "$(safe-broadcaster completion bash)"     in ~/.bashrc
    zsh   eval "$(safe-broadcaster completion zsh)"      in ~/.zshrc
    fish  safe-broadcaster completion fish | source      in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "the choice allows no other"
    variable = f"_{PROGRAM.replace('-', '_').upper()}_COMPLETE"
    click.echo(kind(ctx.find_root().command, {}, PROGRAM, variable).source())
