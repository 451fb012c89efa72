"""How values are read: each kind of option, and options that take several values."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from typer.core import TyperArgument, TyperCommand, TyperOption
from typer.models import ArgumentInfo, OptionInfo

from ..errors import DataError
from ..masked.planning import PRECISIONS
from ..pillar.storage import network_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_ENVIRONMENT = "CRYPTEN_ESPN_"
_CONFIG = (
    "TOML with a table for each command, such as [serve], and in it what else this "
    "help lists, by name; CRYPTEN_ESPN_NAME in the environment goes before it"
)


class Command(TyperCommand):
    """A command whose options may take several values, as in `--client alice bob`.

    An option whose metavar ends in "..." takes all values up to the next option. What
    looks like an option is never a value: in `--out --quiet` one is missing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not any(parameter.name == "config" for parameter in self.params):
            return
        for parameter in self.params:
            if isinstance(parameter, TyperOption | TyperArgument):
                parameter.envvar = _ENVIRONMENT + str(parameter.name).upper()
                parameter.show_envvar = False  # --config's help says it for all

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat an option's name before each of its values, then parse."""
        takers = {
            name: option
            for option in self.params
            if isinstance(option, TyperOption) and not option.is_flag
            for name in option.opts
        }
        words, rest = [], list(args)
        while rest and rest[0] != "--":
            name = rest.pop(0)
            if (option := takers.get(name)) is None:
                words.append(name)
                continue
            # A dash before a digit or a dot begins a number.
            ends = (i for i, word in enumerate(rest) if re.match(r"-[^\d.]", word))
            values = rest[: next(ends, len(rest))]
            if len(values) < option.nargs:
                ctx.fail(f"{name} takes {option.nargs} value(s), {len(values)} given.")
            if (option.metavar or "").endswith("..."):
                words += [word for value in values for word in (name, value)]
            else:
                del values[option.nargs :]
                words += [name, *values]
            del rest[: len(values)]
        return super().parse_args(ctx, words + rest)


def argument(help: str, metavar: str) -> ArgumentInfo:
    """What stands without a name."""
    made: ArgumentInfo = typer.Argument(metavar=metavar, help=help)
    return made


def option(help: str, metavar: str | None = None, *names: str) -> OptionInfo:
    """Any text or path; a flag by its names alone."""
    made: OptionInfo = typer.Option(*names, metavar=metavar, help=help)
    return made


def configuration() -> OptionInfo:
    """A file of defaults for a command's other options and arguments.

    What the command line says comes first, then the environment, where an option is
    CRYPTEN_ESPN_ and its name in capitals, then this file.
    """

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            names = {parameter.name for parameter in context.command.params}
            table = _table(path, str(context.info_name), names)
            for parameter in context.command.params:
                value = table.get(str(parameter.name))
                if getattr(parameter, "multiple", False) and isinstance(value, str):
                    table[str(parameter.name)] = [value]  # one stands for a list of it
            context.default_map = table
        return path

    made: OptionInfo = typer.Option(
        metavar="FILE", help=_CONFIG, is_eager=True, callback=read
    )
    return made


def _table(path: Path, command: str, names: Collection[str | None]) -> dict[str, Any]:
    """One command's table of a file."""
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise DataError(f"{path} is no TOML: {error}.") from None
    table = tables.get(command)
    if not isinstance(table, dict):
        raise DataError(f"{path} has no table [{command}].")
    found = {name.replace("-", "_"): value for name, value in table.items()}
    for name, value in found.items():
        if name not in names or name == "config":
            raise DataError(
                f"{path}: {name!r} in [{command}] is no option of `crypten-espn "
                f"{command}`; see crypten-espn {command} --help."
            )
        if isinstance(value, dict):  # [serve.limit] batch = 16, as --limit batch=16
            found[name] = [f"{key}={number}" for key, number in value.items()]
    return found


def checked(
    help: str,
    metavar: str,
    read: Callable[[str], T],
    good: Callable[[T], bool],
    refusal: str,
) -> OptionInfo:
    """Text that `read` takes without a ValueError to a good value, or a refusal."""

    def parse(text: object) -> T:
        try:
            value = read(str(text))
            if good(value):
                return value
        except ValueError:
            pass
        raise typer.BadParameter(f"{str(text)!r} {refusal}")

    made: OptionInfo = typer.Option(parser=parse, metavar=metavar, help=help)
    return made


def choice(help: str, *allowed: str, several: bool = False) -> OptionInfo:
    """One of the words allowed, or several."""
    metavar = "|".join(allowed) + ("..." if several else "")
    refusal = f"was given; choose from {', '.join(allowed)}"
    return checked(help, metavar, str, allowed.__contains__, refusal)


def whole(help: str, least: int = 1) -> OptionInfo:
    """A whole number."""
    refusal = f"was given; give a whole number from {least} on"
    return checked(help, "INT", _integer, lambda value: value >= least, refusal)


def positive(help: str) -> OptionInfo:
    """A number above 0."""
    refusal = "was given; give a number above 0"
    return checked(help, "FLOAT", float, lambda value: 0 < value < math.inf, refusal)


def not_negative(help: str) -> OptionInfo:
    """A number from 0 on."""
    refusal = "was given; give a number from 0 on"
    return checked(help, "FLOAT", float, lambda value: 0 <= value < math.inf, refusal)


def input_shape(help: str) -> OptionInfo:
    """One input's shape, without the batch."""
    return checked(
        f"one input's shape without the batch, such as 3,32,32 ({help})",
        "SIZES",
        lambda text: torch.Size(map(_integer, text.split(","))),
        lambda shape: min(shape) >= 1,
        "is not a shape; give positive sizes such as 3,32,32",
    )


def _integer(text: str) -> int:
    if not re.fullmatch("[+-]?[0-9]+", text):
        raise ValueError(text)
    return int(text)


# A product has twice an operand's fractional bits, and must fit 63 bits.
SEVERAL_BITS = checked(
    "fractional bits of CrypTen's encoder; several are compared",
    "BITS...",
    _integer,
    range(1, 31).__contains__,
    "is no number of fractional bits; give 1 to 30, such as 16",
)
_NETWORK = ".onnx, a trained .safetensors, or a bundled network's name"
NetworkFile = Annotated[
    Path, typer.Argument(parser=network_file, metavar="NETWORK", help=_NETWORK)
]
INPUTS = ".npy of inputs as the network takes them, (n, channels, height, width)"
_GUARD = (
    "JSON that InputGuard.to_json wrote, in place of the network's own guard; public"
)
GuardFile = Annotated[Path | None, option(_GUARD, "FILE")]
Calibration = Annotated[Path, option(f"{INPUTS}; they bound every layer", "FILE")]
_PRECISION = (
    "the fewest bytes at the error of espn with 12 bits, or 32-bit or 40-bit linear "
    "layers"
)
Precision = Annotated[str, choice(_PRECISION, *PRECISIONS)]
