"""`prism models`: what can be done with the models of a running system."""

import click

from prism.cli.retry import retry_command


@click.group("models")
def models_command() -> None:
    """The models of a running system."""


models_command.add_command(retry_command)
