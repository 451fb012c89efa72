"""The command line: crypten-espn demo, doctor, check, train, finetune, serve, ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import doctor
from .convert import check
from .demo import run as run_demo
from .errors import EspnError
from .pillar import command as training
from .pillar.recipes import load_network

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an expected error into one line and exit status 2."""
    args = _parser().parse_args(arguments)
    command: Command = args.command
    try:
        return command(args)
    except EspnError as error:
        print(f"crypten-espn: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("crypten-espn: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crypten-espn",
        description="Private neural-network inference with polynomial activations.",
        epilog="crypten-espn COMMAND --help shows each command's options and examples.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _command(
        commands,
        "demo",
        _demo,
        "two parties classify 256 real images by every protocol",
        ["crypten-espn demo", "crypten-espn demo --out results"],
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        help="where demo.json and demo.png go (default: out)",
    )

    _command(
        commands,
        "doctor",
        _doctor,
        "versions, patches and what is missing, with its cure",
        ["crypten-espn doctor"],
    )

    checker = _command(
        commands,
        "check",
        _check,
        "name every layer of a network that cannot be private, with its cure",
        [
            "crypten-espn check model.onnx --shape 3,224,224",
            "crypten-espn check network.safetensors",
        ],
    )
    checker.add_argument("network", type=Path, help=".onnx or a trained .safetensors")
    checker.add_argument(
        "--shape",
        type=_shape,
        help="one input's shape without the batch, such as 3,32,32 (.onnx only)",
    )

    trainer = _command(
        commands,
        "train",
        training.run,
        "train a network with polynomial activations",
        [
            "crypten-espn train --recipe fashion-resnet",
            "crypten-espn train --recipe cifar10-resnet18 --data ~/datasets --epochs 1",
        ],
    )
    training.add_arguments(trainer)
    tuner = _command(
        commands,
        "finetune",
        training.run,
        "turn a trained ReLU network into a polynomial one in a few epochs",
        ["crypten-espn finetune --recipe fashion-resnet --start relu.safetensors"],
    )
    training.add_arguments(tuner, finetune=True)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: Command,
    summary: str,
    examples: list[str],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def _demo(args: argparse.Namespace) -> int:
    return run_demo(args.out)


def _doctor(args: argparse.Namespace) -> int:
    print(doctor.report())
    return 0


def _check(args: argparse.Namespace) -> int:
    if args.network.suffix == ".onnx":
        if args.shape is None:
            raise EspnError(
                "an .onnx file needs --shape, one input without the batch, such as "
                "--shape 3,224,224"
            )
        report = check(args.network, torch.zeros(1, *args.shape))
    else:
        network = load_network(args.network)
        report = check(network, torch.zeros(1, *network.input_shape))
    print(report)
    return 0 if report.ok else 1


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; give positive sizes such as 3,32,32"
        )
    return shape


if __name__ == "__main__":
    sys.exit(main())
