"""The `prism` command."""

import importlib

import click

COMMANDS = {
    "up": ("prism.cli.up", "up_command"),
    "status": ("prism.cli.status", "status_command"),
    "explain": ("prism.cli.explain", "explain_command"),
    "models": ("prism.cli.models", "models_command"),
    "events": ("prism.cli.events", "events_command"),
    "demo": ("prism.cli.demo", "demo_command"),
    "simulate": ("prism.bench.simulation.command", "simulate_command"),
    "plan": ("prism.bench.simulation.plan_command", "plan_command"),
    "calibrate": ("prism.bench.calibration.command", "calibrate_command"),
    "doctor": ("prism.gpu_worker.doctor.command", "doctor"),
    "make-tiny-models": ("prism.cli.tiny_models", "make_tiny_models_command"),
}

# Named, not imported: what these packages come with stands on this one, and need not be there.
COME_WITH = {"prism.bench": "prism-serving-bench", "prism.gpu_worker": "prism-serving-gpu_worker"}


class LazyGroup(click.Group):
    """A group that imports a command only when it is asked for: some need torch, most should not wait."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order above."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command `cmd_name`, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("prism"):
                raise
            package = COME_WITH.get(".".join(module.split(".")[:2]), "prism-serving-cli")
            raise click.ClickException(
                f"`prism {cmd_name}` comes with the package {package}, which is not installed"
            ) from error
        return command


@click.group(cls=LazyGroup)
@click.version_option(package_name="prism-serving-cli", prog_name="prism")
def main() -> None:
    """Prism serves many LLMs on few GPUs."""


if __name__ == "__main__":
    main()
