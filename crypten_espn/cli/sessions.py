"""`crypten-espn plan`, `serve`, `predict`, `deal` and `material`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from ..array_file import check_batch, load_array, one_input
from ..convert import convert
from ..masked.model import MaskedModel
from ..masked.planning import masked_model
from ..masked.store import material_info
from ..pillar.storage import load_network, network_file
from ..wire.tls import TLS
from .client import connect
from .dealer import DealerServer
from .host import Host
from .link import Limits, Link
from .server import ModelServer

# name, function, summary, examples -> the parser of a new command
NewCommand = Callable[
    [str, Callable[[argparse.Namespace], int], str, list[str]], argparse.ArgumentParser
]

_LIMITS: dict[str, int | float] = {
    f.name: getattr(Limits(), f.name) for f in fields(Limits)
}


def add_commands(new: NewCommand) -> None:
    """Add the commands of a session; each parser's `command` runs it."""
    plan = new(
        "plan",
        _plan,
        "the masked engine's plan of a network: rings, scales, bytes, error",
        [
            "crypten-espn plan network.safetensors --calibration images.npy",
            "crypten-espn plan network.onnx --calibration images.npy --precision high",
        ],
    )
    server = new(
        "serve",
        _serve,
        "own the network and answer clients until interrupted",
        [
            "crypten-espn serve network.safetensors 0.0.0.0:29500 "
            "--dealer dealer:29501 --calibration images.npy "
            "--tls server.pem server.key authority.pem",
        ],
    )
    for parser in (plan, server):
        parser.add_argument(
            "network",
            type=network_file,
            help=".onnx, a trained .safetensors, or a bundled network's name",
        )
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
    client = new(
        "predict",
        _predict,
        "own the input, learn the logits",
        [
            "crypten-espn predict server:29500 --dealer dealer:29501 --input x.npy "
            "--tls client.pem client.key authority.pem",
            "crypten-espn predict 127.0.0.1:29500 --dealer 127.0.0.1:29501 "
            "--input x.npy --out logits.npy",
        ],
    )
    client.add_argument("address", help="host:port of the server")
    client.add_argument("--input", type=Path, required=True, help=".npy of one batch")
    client.add_argument("--out", type=Path, help="where to write the logits as .npy")
    dealer = new(
        "deal",
        _deal,
        "be the dealer: prepare randomness for both parties, see no data",
        [
            "crypten-espn deal 0.0.0.0:29501 --tls dealer.pem dealer.key authority.pem",
        ],
    )
    dealer.add_argument("address", help="host:port to listen on")
    dealer.add_argument(
        "--plan-digest",
        action="append",
        type=_digest,
        metavar="HEX",
        help="deal only for plans with this digest; may be repeated",
    )
    for parser in (server, client):
        parser.add_argument("--dealer", required=True, help="host:port of the dealer")
        parser.add_argument(
            "--material", type=Path, help="folder that keeps prepared randomness"
        )
    for parser in (server, dealer):
        parser.add_argument(
            "--limit",
            action="append",
            type=_limit,
            default=[],
            metavar="NAME=VALUE",
            help="what is put up with; may be repeated (defaults: "
            + ", ".join(f"{name}={value:g}" for name, value in _LIMITS.items())
            + ")",
        )
    for parser in (server, client, dealer):
        _connection_options(parser)
    material = new(
        "material",
        _material,
        "what a folder of prepared randomness still holds",
        ["crypten-espn material prepared/"],
    )
    material.add_argument("folder", type=Path)


def _connection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tls",
        nargs=3,
        metavar=("CERTIFICATE", "KEY", "AUTHORITY"),
        help="PEM files for mutual TLS",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow addresses beyond this machine without TLS: whoever sees the "
        "traffic can then undo the masks",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="log every session to standard error, not only what was refused",
    )


# ---------------------------------------------------------------- what they do


def _plan(args: argparse.Namespace) -> int:
    model = _masked(args)
    print(model)
    print(f"digest {model.plan.digest.hex()}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    _log(args)
    link = Link(args.dealer, args.material, _tls(args), insecure=args.insecure)
    model = _masked(args)
    print(model)
    limits = Limits(**dict(args.limit))
    server = ModelServer(model, args.address, link=link, limits=limits)
    return _until_stopped(server, "listening on")


def _predict(args: argparse.Namespace) -> int:
    _log(args)
    link = Link(args.dealer, args.material, _tls(args), insecure=args.insecure)
    inputs = load_array(args.input)
    with connect(args.address, link=link) as server:
        logits = server.predict(inputs)
    if args.out is None:
        for row in logits.flatten(1).tolist():
            print(" ".join(f"{value:.4f}" for value in row))
    else:
        np.save(args.out, logits.numpy())
        print(f"wrote {args.out}")
    return 0


def _deal(args: argparse.Namespace) -> int:
    _log(args)
    link = Link(tls=_tls(args), insecure=args.insecure)
    limits = Limits(**dict(args.limit))
    server = DealerServer(
        args.address, link=link, limits=limits, plans=args.plan_digest
    )
    return _until_stopped(server, "dealing on")


def _material(args: argparse.Namespace) -> int:
    print(material_info(args.folder))
    return 0


def _until_stopped(server: Host, doing: str) -> int:
    """Run until SIGTERM or SIGINT; then tell every peer, and end well."""
    signals = (signal.SIGTERM, signal.SIGINT)
    with server:
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                before[number] = signal.signal(number, lambda *_: server.stop())
        try:
            print(f"{doing} {server.address}; Ctrl-C ends", flush=True)
            server.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print(f"stopped {doing} {server.address}", flush=True)
    return 0


# ---------------------------------------------------------------- their options


def _masked(args: argparse.Namespace) -> MaskedModel:
    inputs = load_calibration(args.calibration)
    if args.network.suffix == ".onnx":
        private = convert(args.network, inputs[:1])
    else:
        network = load_network(args.network)
        names = str(args.calibration), str(args.network)
        check_batch(inputs, network.input_shape, *names)
        private = convert(network, inputs[:1])
    return masked_model(private, inputs, precision=args.precision)


def load_calibration(path: Path) -> torch.Tensor:
    """An .npy file's inputs; a note if they are a single one.

    Raises:
        DataError, RangeError: as `load_array`.
    """
    inputs = load_array(path)
    note = one_input(inputs)
    if note is not None:
        print(f"crypten-espn: note: {path}: {note}", file=sys.stderr)
    return inputs


def _tls(args: argparse.Namespace) -> TLS | None:
    return None if args.tls is None else TLS(*args.tls)


def _log(args: argparse.Namespace) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    default = _LIMITS.get(name)
    try:
        if default is None:
            raise ValueError
        given = type(default)(value)
        Limits(**{name: given})  # type: ignore[arg-type]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no limit; give NAME=VALUE with a positive number and one of "
            f"{', '.join(_LIMITS)}"
        ) from None
    return name, given


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no digest; give the 64 hex digits that `crypten-espn plan` "
            "prints"
        )
    return digest
