"""The command line: crypten-espn demo, doctor, check, train, finetune, serve, ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from . import __version__, doctor
from .array_file import check_batch, load_array
from .convert import check, convert
from .demo import run as run_demo
from .engines import MASKED
from .errors import EspnError
from .estimate import command as estimate
from .explain import compare_precisions, explain
from .keys import make_keys
from .pillar import command as training
from .pillar.networks import Network
from .pillar.storage import load_network, network_file
from .protocols import PROTOCOLS, TRUNCATIONS
from .serving.command import add_commands, load_calibration

# A product has twice an operand's fractional bits, and must fit 63 bits.
_MOST_BITS = 30

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
    parser.add_argument(
        "--version", action="version", version=f"crypten-espn {__version__}"
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
            "crypten-espn check fashion-resnet",
        ],
    )
    checker.add_argument(
        "network",
        type=network_file,
        help=".onnx, a trained .safetensors, or a bundled network's name",
    )
    checker.add_argument(
        "--shape",
        type=_shape,
        help="one input's shape without the batch, such as 3,32,32 (.onnx only)",
    )

    estimator = _command(
        commands,
        "estimate",
        estimate.run,
        "what private inference would cost: rounds, bytes, seconds, capacity, money",
        [
            "crypten-espn estimate resnet18 --rtt 20 --bandwidth 1000",
            "crypten-espn estimate resnet50 --shape 3,224,224 --classes 1000 --macs 40",
            "crypten-espn estimate model.onnx --shape 3,224,224 --clients 1000",
        ],
    )
    estimator.add_argument(
        "--shape",
        type=_shape,
        help="one input's shape without the batch, such as 3,32,32 (default: the "
        "network's own)",
    )
    estimate.add_arguments(estimator)

    _explain_command(commands)
    add_commands(partial(_command, commands))
    _keys_command(commands)

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


def _explain_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    explainer = _command(
        commands,
        "explain",
        _explain,
        "why a private result differs: every layer's error, headroom and overflow",
        [
            "crypten-espn explain network.safetensors --input images.npy",
            "crypten-espn explain network.safetensors --input images.npy "
            "--protocol espn --precision-bits 12",
            "crypten-espn explain network.safetensors --input images.npy "
            "--protocol espn --precision-bits 8 12 16 20 24",
        ],
    )
    explainer.add_argument(
        "network",
        type=network_file,
        help="a trained .safetensors, .onnx, or a bundled network's name",
    )
    explainer.add_argument(
        "--input",
        type=Path,
        required=True,
        help=".npy of inputs as the network takes them, (n, channels, height, width)",
    )
    explainer.add_argument(
        "--protocol",
        choices=(MASKED, *PROTOCOLS),
        help="what computes it (default: masked, with --precision-bits espn)",
    )
    explainer.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        help="of CrypTen's protocols (default: local)",
    )
    explainer.add_argument(
        "--precision-bits",
        type=_bits,
        nargs="+",
        metavar="BITS",
        help="fractional bits of CrypTen's encoder; several are compared",
    )
    explainer.add_argument(
        "--precision",
        nargs="+",
        choices=("fast", "high"),
        help="of the masked engine; several are compared",
    )
    explainer.add_argument(
        "--calibration",
        type=Path,
        help=".npy of inputs that bound the masked engine's layers (default: the "
        "input)",
    )


def _keys_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    keys = _command(
        commands,
        "keys",
        _keys,
        "make an authority and certificates with roles for --tls",
        [
            "crypten-espn keys keys --server model.example --dealer 10.0.0.7 "
            "--client alice bob",
            "crypten-espn keys keys --server model.example,10.0.0.5",
            "crypten-espn keys keys --client carol    # the authority is used again",
        ],
    )
    keys.add_argument("directory", type=Path, help="where the files go")
    for role, what in (
        ("server", "names or addresses that clients connect to"),
        ("dealer", "names or addresses that both parties connect to"),
        ("client", "names of clients"),
    ):
        keys.add_argument(
            f"--{role}",
            nargs="+",
            default=[],
            metavar="NAME",
            help=f"{what}, a certificate each"
            + ("" if role == "client" else "; join one host's by commas"),
        )


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


def _explain(args: argparse.Namespace) -> int:
    inputs = load_array(args.input)
    bits, chosen = args.precision_bits, args.precision
    protocol = args.protocol or ("espn" if bits else MASKED)
    if (bits if protocol == MASKED else chosen or args.calibration) is not None:
        raise EspnError(
            "--precision-bits and --truncation belong to CrypTen's protocols, "
            f"--precision and --calibration to the masked engine; {protocol} was chosen"
        )
    onnx = args.network.suffix == ".onnx"
    example = inputs if args.calibration is None else load_calibration(args.calibration)
    network = args.network if onnx else load_network(args.network)
    if isinstance(network, Network):
        for path, given in ((args.input, inputs), (args.calibration, example)):
            check_batch(given, network.input_shape, str(path), str(args.network))
    private = convert(
        network,
        example,
        protocol=protocol,
        truncation=args.truncation,
    )
    if len(bits or chosen or ()) > 1:
        if protocol == MASKED:
            print(compare_precisions(private, inputs, precision=chosen))
        else:
            print(compare_precisions(private, inputs, precision_bits=bits))
        return 0
    found = explain(
        private,
        inputs,
        precision_bits=bits[0] if bits else None,
        precision=chosen[0] if chosen else "fast",
    )
    print(found)
    return 0 if found.overflow is None else 1


def _keys(args: argparse.Namespace) -> int:
    made = make_keys(
        args.directory, servers=args.server, dealers=args.dealer, clients=args.client
    )
    for key in made:
        print(key)
    print(
        f"Give each party its own two files and {made[0].authority}; keep "
        f"{args.directory / 'authority.key'} where no party runs."
    )
    return 0


def _bits(text: str) -> int:
    try:
        bits = int(text)
    except ValueError:
        bits = 0
    if not 1 <= bits <= _MOST_BITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of fractional bits; give 1 to {_MOST_BITS}, such "
            "as 16"
        )
    return bits


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
