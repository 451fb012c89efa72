"""The command line: crypten-espn demo, doctor, check, train, finetune, serve, ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from . import doctor
from .array_file import check_batch, load_array, one_input
from .convert import MASKED, check, convert
from .demo import run as run_demo
from .errors import EspnError
from .estimate import command as estimate
from .keys import make_keys
from .masked.store import material_info
from .pillar import command as training
from .pillar.networks import Network
from .pillar.recipes import load_network
from .protocols import PROTOCOLS, TRUNCATIONS
from .session import MaskedModel, connect, deal, masked_model, serve
from .simulator import compare_precisions, explain
from .wire.tls import TLS

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
    _session_commands(commands)

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
        "network", type=Path, help="a trained .safetensors, or .onnx"
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


def _session_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    plan = _command(
        commands,
        "plan",
        _plan,
        "the masked engine's plan of a network: rings, scales, bytes, error",
        [
            "crypten-espn plan network.safetensors --calibration images.npy",
            "crypten-espn plan network.safetensors --calibration images.npy "
            "--precision high",
        ],
    )
    server = _command(
        commands,
        "serve",
        _serve,
        "be rank 0: own the network and answer clients until interrupted",
        [
            "crypten-espn serve network.safetensors 0.0.0.0:29500 "
            "--dealer dealer:29501 --calibration images.npy",
        ],
    )
    for parser in (plan, server):
        parser.add_argument("network", type=Path, help="a trained .safetensors")
        parser.add_argument(
            "--calibration",
            type=Path,
            required=True,
            help=".npy of inputs as the network takes them, (n, channels, height, "
            "width); they bound every layer",
        )
        parser.add_argument(
            "--precision",
            choices=("fast", "high"),
            default="fast",
            help="32-bit or 40-bit linear layers (default: %(default)s)",
        )
    server.add_argument("address", help="host:port to listen on")
    client = _command(
        commands,
        "predict",
        _predict,
        "be rank 1: own the input, learn the logits",
        [
            "crypten-espn predict server:29500 --dealer dealer:29501 --input x.npy",
            "crypten-espn predict server:29500 --dealer dealer:29501 --input x.npy "
            "--out logits.npy",
        ],
    )
    client.add_argument("address", help="host:port of the server")
    client.add_argument("--input", type=Path, required=True, help=".npy of one batch")
    client.add_argument("--out", type=Path, help="where to write the logits as .npy")
    dealer = _command(
        commands,
        "deal",
        _deal,
        "be the dealer: prepare randomness for both parties, see no data",
        ["crypten-espn deal 0.0.0.0:29501"],
    )
    dealer.add_argument("address", help="host:port to listen on")
    for parser in (server, client):
        parser.add_argument("--dealer", required=True, help="host:port of the dealer")
        parser.add_argument(
            "--material", type=Path, help="folder that keeps prepared randomness"
        )
    for parser in (server, client, dealer):
        parser.add_argument(
            "--tls",
            nargs=3,
            metavar=("CERTIFICATE", "KEY", "AUTHORITY"),
            help="PEM files for mutual TLS",
        )
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
    material = _command(
        commands,
        "material",
        _material,
        "what a folder of prepared randomness still holds",
        ["crypten-espn material prepared/"],
    )
    material.add_argument("folder", type=Path)


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


def _plan(args: argparse.Namespace) -> int:
    print(_masked(args))
    return 0


def _serve(args: argparse.Namespace) -> int:
    model = _masked(args)
    print(model)
    print(f"listening on {args.address}; Ctrl-C ends", flush=True)
    serve(
        model,
        args.address,
        dealer=args.dealer,
        directory=args.material,
        tls=_tls(args),
    )
    return 0


def _predict(args: argparse.Namespace) -> int:
    inputs = load_array(args.input)
    with connect(
        args.address, dealer=args.dealer, directory=args.material, tls=_tls(args)
    ) as server:
        logits = server.predict(inputs)
    if args.out is None:
        for row in logits.flatten(1).tolist():
            print(" ".join(f"{value:.4f}" for value in row))
    else:
        np.save(args.out, logits.numpy())
        print(f"wrote {args.out}")
    return 0


def _deal(args: argparse.Namespace) -> int:
    print(f"dealing on {args.address}; Ctrl-C ends", flush=True)
    deal(args.address, tls=_tls(args))
    return 0


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
    example = inputs if args.calibration is None else _calibration(args.calibration)
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


def _material(args: argparse.Namespace) -> int:
    print(material_info(args.folder))
    return 0


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


def _masked(args: argparse.Namespace) -> MaskedModel:
    network = load_network(args.network)
    inputs = _calibration(args.calibration)
    check_batch(inputs, network.input_shape, str(args.calibration), str(args.network))
    return masked_model(convert(network, inputs[:1]), inputs, precision=args.precision)


def _calibration(path: Path) -> torch.Tensor:
    inputs = load_array(path)
    note = one_input(inputs)
    if note is not None:
        print(f"crypten-espn: note: {path}: {note}", file=sys.stderr)
    return inputs


def _tls(args: argparse.Namespace) -> TLS | None:
    return None if args.tls is None else TLS(*args.tls)


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
