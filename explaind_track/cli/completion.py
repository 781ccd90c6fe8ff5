"""`explaind-track completion`: the lines that let a shell complete commands, options and directories."""

import click
from click.shell_completion import get_completion_class

from explaind_track.cli.common import report_errors

PROGRAM, VARIABLE = "explaind-track", "_EXPLAIND_TRACK_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
@report_errors
def completion(context: click.Context, shell: str) -> None:
    """Print what a shell needs to complete this command.

    bash: `eval "$(explaind-track completion bash)"` in ~/.bashrc; zsh: the same in ~/.zshrc; fish: `explaind-track
    completion fish > ~/.config/fish/completions/explaind-track.fish`.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all of them
    click.echo(kind(context.find_root().command, {}, PROGRAM, VARIABLE).source())
