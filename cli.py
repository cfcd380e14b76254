"""The command `apt-hooks`: its parts are in `commands`; here they are one, and errors one line."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated, Any

import typer

from .errors import STOPPED, AptError

try:
    from .commands import captioning, judging, picking, sampling, training
except KeyboardInterrupt:  # torch takes seconds to load
    print("apt-hooks: stopped", file=sys.stderr)
    sys.exit(STOPPED)

app = typer.Typer(
    name="apt-hooks",
    help="Adaptive Personalized Training (APT) for LoRAs: patch a trainer, choose a preset, check a config.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for part in (training, picking, captioning, sampling, judging):
    app.registered_commands += part.app.registered_commands
    app.registered_groups += part.app.registered_groups

PACKAGES = ("torch", "diffusers", "accelerate", "peft", "transformers", "triton")
"""Of which `--version` tells the versions too: what a fault may come from."""


def _tell_versions(asked: bool) -> None:
    if not asked:
        return
    for name in ("apt-hooks", *PACKAGES):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        typer.echo(f"{name} {found}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_versions,
            is_eager=True,
            help="Show the versions of this and of what it uses.",
        ),
    ] = False,
) -> None:
    """See `help` of the app above, which this docstring would replace."""


# typer has click or its own copy of it, by version; either way this is click's UsageError.
_USAGE_ERROR: Any = typer.BadParameter.__base__


def main() -> None:
    """Run the command; what a user can put right is one line and exit code 1."""
    try:
        code = app(standalone_mode=False)
    except AptError as error:
        sys.exit(f"apt-hooks: error: {error}")
    except typer.Abort:  # what Ctrl-C becomes, by typer's version
        code = STOPPED
    except _USAGE_ERROR as error:
        message = error.format_message().strip()
        if not message or "\n" in message:  # no command at all: the message is the help
            error.show()
            sys.exit(1)
        sys.exit(f"apt-hooks: error: {message} (see --help)")
    if code == STOPPED:
        print("apt-hooks: stopped", file=sys.stderr)
    sys.exit(code)
