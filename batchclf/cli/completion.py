"""`batchclf completion`: what makes a shell complete commands, options, keys and values."""

import click
from click.shell_completion import get_completion_class

from batchclf.cli.streams import print_result

VARIABLE = "_BATCHCLF_COMPLETE"
"""By which the shell asks for completions, as click knows it."""


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print what SHELL has to read to complete commands, options, keys and values.

    \b
      source <(batchclf completion bash)      in ~/.bashrc; zsh alike, in ~/.zshrc
      batchclf completion fish > ~/.config/fish/completions/batchclf.fish
    """
    completion = get_completion_class(shell)
    assert completion is not None, "click has it"
    group = context.find_root().command
    print_result(completion(group, {}, "batchclf", VARIABLE).source())
