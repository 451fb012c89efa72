"""The command line: crypten-espn demo, doctor, check, train, finetune, serve, ...

A command is a function: its parameters are the options, its docstring the help, with
the examples below the first paragraph, and what it returns the exit status.
"""

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import EspnError
from .applications import sidecar
from .bundles import bundle
from .calibration import calibrate
from .clients import predict, prepare
from .networks import check, estimate, explain, plan
from .options import Command, option
from .sessions import deal, keys, material, serve
from .training import finetune, train


def demo(
    out: Annotated[Path, option("folder of demo.json, demo.png", "DIR")] = Path("out"),
) -> int:
    """Let two parties classify 256 real images by every protocol.

    examples:
      crypten-espn demo
      crypten-espn demo --out results
    """
    from ..demo import run

    return run(out)


def doctor() -> int:
    """List versions, patches and what is missing, with its cure.

    examples:
      crypten-espn doctor
    """
    from ..doctor import report

    print(report())
    return 0


_COMMANDS = (
    demo, doctor, check, estimate, explain, plan, bundle, serve, predict, prepare,
    sidecar, deal, material, keys, train, finetune, calibrate,
)  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        print(f"crypten-espn {__version__}")
        raise typer.Exit


_VERSION = typer.Option(
    "--version", callback=_print_version, is_eager=True, help="Show it and exit."
)


def _root(version: Annotated[bool, _VERSION] = False) -> None:
    """Private neural-network inference with polynomial activations."""


def app() -> typer.Typer:
    """Return all commands, with the protocols that are in the table now."""
    # Plain text, for help is read in pipes and logs too. No shell completion: it would
    # import torch at every press of the key.
    commands = typer.Typer(
        callback=_root,
        epilog="crypten-espn COMMAND --help shows each command's options and examples.",
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=False,
        rich_markup_mode=None,
    )
    for function in _COMMANDS:
        summary, _, examples = (inspect.getdoc(function) or "").partition("\n\n")
        shown = "\b\n" + examples  # after \b lines stay as they are
        commands.command(cls=Command, help=summary, short_help=summary, epilog=shown)(
            function
        )
    return commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an expected error into one line and exit status 2.

    Raises:
        SystemExit: after --help and --version, and, with status 2, for arguments that
            cannot be parsed.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = typer.main.get_command(app())
    try:
        with command.make_context("crypten-espn", given) as context:
            status: int = command.invoke(context)
            return status
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except typer.TyperException as error:
        print(
            f"crypten-espn: {error.format_message()}\n"
            "crypten-espn COMMAND --help shows options and examples.",
            file=sys.stderr,
        )
        sys.exit(error.exit_code)
    except EspnError as error:
        print(f"crypten-espn: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as head, has enough; nothing more to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("crypten-espn: interrupted", file=sys.stderr)
        return 130
