"""The `kvserve` command: loads its subcommands lazily from the entry-point group ``kvserve.commands``."""

import importlib.metadata
import sys

import click

from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.names import ExitCode

GROUP = "kvserve.commands"


class Commands(click.Group):
    """A group whose commands are imported only when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, installed or not."""
        return sorted(importlib.metadata.entry_points(group=GROUP).names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, or a stand-in that says which extra is missing."""
        for entry in importlib.metadata.entry_points(group=GROUP, name=cmd_name):
            try:
                command = entry.load()
            except ModuleNotFoundError as error:
                return _missing(cmd_name, entry.module, error)
            if not isinstance(command, click.Command):
                raise TypeError(f"entry point {entry.value} is no click command")
            return command
        return None


def _missing(name: str, module: str, error: ModuleNotFoundError) -> click.Command:
    extra = module.partition(".")[0].removeprefix("kvserve_")
    extra = "connector" if extra == "strategies" else extra
    extra = "calibrate" if module.startswith("kvserve_strategies.calibration") else extra
    text = f"needs the Python package {error.name!r}: pip install 'kvserve[{extra}]'"

    @click.command(name, help=f"(not installed: {text})", add_help_option=False)
    @click.argument("_rest", nargs=-1, type=click.UNPROCESSED)
    def stand_in(_rest: tuple[str, ...]) -> None:
        raise click.ClickException(f"{name} {text}")

    stand_in.context_settings = {"ignore_unknown_options": True}
    return stand_in


@click.command(cls=Commands)
@click.version_option(package_name="kvserve")
def kvserve() -> None:
    """Pick the right KV-cache compression for every transfer between vLLM pods."""


def main() -> None:
    """Run the command line; an error raised on purpose is one line and an exit code, never a traceback."""
    try:
        kvserve()
    except KVServeError as error:
        click.echo(f"error: {error}", err=True)
        bad_input = isinstance(error, SpecError)
        sys.exit(int(ExitCode.BAD_INPUT if bad_input else ExitCode.FAILED))
