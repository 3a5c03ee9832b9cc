"""The application: all commands under one name."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from distckpt.cli import terminal
from distckpt.cli.cp import cp
from distckpt.cli.diff import diff
from distckpt.cli.doctor import doctor
from distckpt.cli.exits import Exit, exit_of
from distckpt.cli.export import export
from distckpt.cli.intake import import_
from distckpt.cli.ls import ls
from distckpt.cli.pin import pin, unpin
from distckpt.cli.prune import prune
from distckpt.cli.report import report
from distckpt.cli.show import show
from distckpt.cli.torture import torture
from distckpt.cli.verify import verify
from distckpt.errors import DistckptError
from distckpt.version import __version__

_EPILOG = (
    "Exit codes: 0 fine, whole, the same; 1 damage found, or different, or unwell; 2 wrong usage; 3 no checkpoint "
    "there; 4 the storage failed; 5 what is needed is damaged, of a newer format, or not safe to open; 6 what was to "
    "be made exists already; 7 a running job owns the directory; 70 a bug in distckpt."
)


class _Group(TyperGroup):
    """Turns what distckpt raises on purpose into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name may hold what the terminal's encoding lacks
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except RecursionError:
            terminal.complain("what the manifest holds is nested too deep to be shown")
            raise typer.Exit(Exit.UNREADABLE) from None
        except DistckptError as error:
            terminal.complain(str(error))
            raise typer.Exit(exit_of(error)) from None


application = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)
for command in (ls, show, verify, diff, prune, pin, unpin, cp, export, report, doctor, torture):
    application.command(epilog=_EPILOG)(command)
application.command("import", epilog=_EPILOG)(import_)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"distckpt {__version__}")
        raise typer.Exit


@application.callback()
def _application(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Look at the checkpoints of a run, check, compare, move and prune them.

    A URL is a local path, or what fsspec knows, such as s3://bucket/run-7. For S3, AWS's own variables and files
    count: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, ...
    """
