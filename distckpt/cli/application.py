"""The application: the five commands under one name."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from distckpt.cli import terminal
from distckpt.cli.diff import diff
from distckpt.cli.exits import exit_of
from distckpt.cli.ls import ls
from distckpt.cli.prune import prune
from distckpt.cli.show import show
from distckpt.cli.verify import verify
from distckpt.errors import DistckptError
from distckpt.version import __version__

_EPILOG = (
    "Exit codes: 0 fine, whole, the same; 1 damage found, or different; 2 wrong usage; 3 no checkpoint there; "
    "4 the storage failed; 5 a checkpoint that is needed is damaged, or of a newer format."
)


class _Group(TyperGroup):
    """Turns what distckpt raises on purpose into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
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
for command in (ls, show, verify, diff, prune):
    application.command(epilog=_EPILOG)(command)


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
    """Look at the checkpoints of a run, check, compare and prune them.

    A URL is a local path, or what fsspec knows, such as s3://bucket/run-7. For S3, AWS's own variables and files
    count: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, ...
    """
