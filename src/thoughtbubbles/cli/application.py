"""All commands together, and how they end."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand

from thoughtbubbles.cli.data import make_task, prepare
from thoughtbubbles.cli.evaluation import evaluate, exact_match, perplexity
from thoughtbubbles.cli.generation import demo, generate, inspect
from thoughtbubbles.cli.retrofitting import retrofit
from thoughtbubbles.cli.serving import serve
from thoughtbubbles.cli.training import compare, plan, train
from thoughtbubbles.support import VERSION
from thoughtbubbles.support.errors import InputError, RunError, ending
from thoughtbubbles.support.files import user_path

# What the command line itself may get wrong; typer names only its last kind.
UsageError: Any = typer.BadParameter.__base__
COMMANDS = (
    *(prepare, make_task, train, compare, perplexity, generate, evaluate, exact_match, inspect, demo, plan),
    *(retrofit, serve),
)


class _Command(TyperCommand):
    """A command whose paths may begin with `~`, wherever on the command line they stand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        ctx.params = {
            name: user_path(value) if isinstance(value, Path) else value for name, value in ctx.params.items()
        }
        return rest


app = typer.Typer(name="thoughtbubbles", add_completion=False, pretty_exceptions_enable=False)
for command in COMMANDS:
    app.command(cls=_Command)(command)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"thoughtbubbles {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def thoughtbubbles(
    ctx: typer.Context,
    _version: Annotated[
        bool, Option("--version", callback=_say_version, is_eager=True, help="Say the version, and exit.")
    ] = False,
) -> None:
    """Language models that learn to fork and delete residual streams: parallel thinking in latent space."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(InputError.exit_code)


def main() -> None:
    """Run the command.

    Bad input is one line on standard error and exit code 2; a run that cannot go on, or a disk or a network that
    fails, one line and 1. Any other exception is a fault of the program, and keeps its traceback.
    """
    try:
        code = app(standalone_mode=False)
        _flush()
    except BrokenPipeError:  # nobody reads on, as with `| head`
        code = RunError.exit_code
    except Exception as error:
        end = ending(_ours(error))
        if end is None:
            raise
        typer.echo(f"thoughtbubbles: {end}", err=True)
        code = end.exit_code
    sys.exit(code or 0)


def _flush() -> None:
    """Write what is left of the output; if that fails, throw it away, or the interpreter would try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise


def _ours(error: Exception) -> Exception:
    """An error of the command line as bad input, with the option and what was given for it; others as they are."""
    if isinstance(error, typer.Abort):
        return RunError("the input ended")
    if not isinstance(error, UsageError):
        return error
    param = getattr(error, "param", None)
    given = None if param is None else _given(param.opts, sys.argv[1:])
    text = error.format_message() if given is None else f"{given}: {error.message}"
    return InputError(" ".join(text.split()))


def _given(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The option of one of these names as it was given, the last time; None if it was not."""
    found = None
    for place, argument in enumerate(arguments):
        if argument in names:
            found = "=".join(arguments[place : place + 2])
        elif argument.partition("=")[0] in names:
            found = argument
    return found
