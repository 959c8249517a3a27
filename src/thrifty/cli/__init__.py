"""The command line. Each command is one file here; what needs an extra is imported when the command runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import thrifty
from thrifty.cli import bench, compile_model, convert, demo, doctor, evaluate, picture, predict, train, tune, zoo
from thrifty.errors import ThriftyError, missing_extra

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Base of typer's complaints about options and arguments, whichever version of click it comes with."""

app = typer.Typer(
    name="thrifty",
    help="Convolutional networks that spend compute per input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, train, evaluate, convert, compile_model, predict, picture, tune, bench, zoo, doctor):
    app.command(name=command.NAME, cls=getattr(command, "COMMAND", None))(command.run)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"thrifty {thrifty.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Convolutional networks that spend compute per input."""


def main() -> None:
    """Run the command line; what the user can mend is told in one line, with a non-zero exit status."""
    try:
        status = app(standalone_mode=False)
    except ThriftyError as error:
        _fail(str(error), 1)
    except MemoryError:
        _fail("there is not enough memory for this.", 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "thrifty":
            raise
        _fail(str(missing_extra(error, "this command")), 1)
    except UsageError as error:
        message = _message(error)  # none where all that was asked for is the help, which has been printed
        _fail(message and f"{message} See: {_help_of(error)}", 2)
    except (KeyboardInterrupt, typer.Abort) as stop:
        _fail(str(stop) or "stopped", 130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)


def _help_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'thrifty'} --help"


def _message(error: Exception) -> str:
    formatted = getattr(error, "format_message", None)
    return formatted() if formatted else str(error)


def _fail(message: str, status: int) -> None:
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
