"""`crypten-espn serve`, `deal`, `material` and `keys`."""

import logging
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle, load
from ..bundle.sealed import is_bundle
from ..errors import EspnError
from ..masked.store import material_info
from ..pillar.storage import network_file
from ..serving.dealer import DealerServer
from ..serving.host import Host
from ..serving.link import Limits, Link
from ..serving.server import ModelServer
from ..wire.tls import TLS
from .networks import planned
from .options import INPUTS, GuardFile, argument, checked, choice, option

_LIMITS = asdict(Limits())
_DEFAULTS = ", ".join(f"{name}={value:g}" for name, value in _LIMITS.items())
_LIMIT = f"what is put up with; may be repeated (defaults: {_DEFAULTS})"
_TLS = "PEM files for mutual TLS", "CERTIFICATE KEY AUTHORITY"
_VERBOSE = "log every session to standard error, not only what was refused"
_INSECURE = (
    "allow addresses beyond this machine without TLS: whoever sees the traffic can "
    "then undo the masks"
)
_DIGESTS = checked(
    "deal only for plans with this digest; may be repeated",
    "HEX",
    bytes.fromhex,
    lambda digest: len(digest) == 32,
    "is no digest; give the 64 hex digits that `crypten-espn plan` prints",
)
_HOSTS = "a certificate each; join one host's by commas"
_SERVERS = f"names or addresses that clients connect to, {_HOSTS}"
_DEALERS = f"names or addresses that both parties connect to, {_HOSTS}"
_CLIENTS = "names of clients, a certificate each"

_NETWORK = "a bundle, an .onnx, a trained .safetensors, or a bundled network's name"
_CALIBRATION = f"{INPUTS}; they bound every layer of a network that is no bundle"
_PRECISION = "32-bit or 40-bit linear layers of a network that is no bundle"

Served = Annotated[
    Path, typer.Argument(parser=network_file, metavar="NETWORK", help=_NETWORK)
]
Listen = Annotated[str, argument("host:port to listen on", "ADDRESS")]
Dealer = Annotated[str, option("host:port of the dealer", "ADDRESS")]
Material = Annotated[Path | None, option("folder of prepared randomness", "DIR")]
LimitList = Annotated[list[str] | None, option(_LIMIT, "NAME=VALUE")]
Tls = Annotated[tuple[str, str, str] | None, option(*_TLS)]
Insecure = Annotated[bool, option(_INSECURE, None, "--insecure")]
Verbose = Annotated[bool, option(_VERBOSE, None, "-v", "--verbose")]


def serve(
    network: Served,
    address: Listen,
    dealer: Dealer,
    calibration: Annotated[Path | None, option(_CALIBRATION, "FILE")] = None,
    precision: Annotated[str | None, choice(_PRECISION, "fast", "high")] = None,
    guard: GuardFile = None,
    material: Material = None,
    limit: LimitList = None,
    tls: Tls = None,
    insecure: Insecure = False,
    verbose: Verbose = False,
) -> int:
    """Own the network and answer clients until interrupted.

    examples:
      crypten-espn serve net.espn 0.0.0.0:29500 --dealer dealer:29501 \\
        --tls server.pem server.key authority.pem
      crypten-espn serve network.safetensors 127.0.0.1:29500 \\
        --dealer 127.0.0.1:29501 --calibration images.npy
    """
    limits = _limits(limit)
    link = made_link(dealer, material, tls, insecure, verbose)
    bundle = _bundle(network, calibration, precision, guard)
    print(bundle.model)
    server = ModelServer(bundle, address, link=link, limits=limits)
    return _until_stopped(server, "listening on")


def deal(
    address: Listen,
    plan_digest: Annotated[list[bytes] | None, _DIGESTS] = None,
    limit: LimitList = None,
    tls: Tls = None,
    insecure: Insecure = False,
    verbose: Verbose = False,
) -> int:
    """Be the dealer: prepare randomness for both parties, see no data.

    examples:
      crypten-espn deal 0.0.0.0:29501 --tls dealer.pem dealer.key authority.pem
    """
    limits = _limits(limit)
    link = made_link(None, None, tls, insecure, verbose)
    server = DealerServer(address, link=link, limits=limits, plans=plan_digest)
    return _until_stopped(server, "dealing on")


def material(
    folder: Annotated[Path, argument("as --material named", "FOLDER")],
) -> int:
    """List what a folder of prepared randomness still holds.

    examples:
      crypten-espn material prepared/
    """
    print(material_info(folder))
    return 0


def keys(
    directory: Annotated[Path, argument("where the files go", "DIRECTORY")],
    server: Annotated[list[str] | None, option(_SERVERS, "NAME...")] = None,
    dealer: Annotated[list[str] | None, option(_DEALERS, "NAME...")] = None,
    client: Annotated[list[str] | None, option(_CLIENTS, "NAME...")] = None,
) -> int:
    """Make an authority and certificates with roles for --tls.

    examples:
      crypten-espn keys keys --server model.example --dealer 10.0.0.7 \\
        --client alice bob
      crypten-espn keys keys --server model.example,10.0.0.5
      crypten-espn keys keys --client carol    # the authority is used again
    """
    from ..keys import make_keys

    made = make_keys(
        directory, servers=server or (), dealers=dealer or (), clients=client or ()
    )
    for key in made:
        print(key)
    print(
        f"Give each party its own two files and {made[0].authority}; keep "
        f"{directory / 'authority.key'} where no party runs."
    )
    return 0


def _bundle(
    network: Path, calibration: Path | None, precision: str | None, guard: Path | None
) -> Bundle:
    """The bundle in a file, or a network planned on the inputs in another.

    Raises:
        EspnError: as `load` or `planned`; calibration for a bundle, or none for another
            network.
    """
    if is_bundle(network):
        if (calibration, precision, guard) != (None, None, None):
            raise EspnError(
                f"{network} is a bundle, which has its plan; leave out --calibration, "
                "--precision and --guard"
            )
        return load(network)
    if calibration is None:
        raise EspnError(
            f"{network} is no bundle and needs --calibration, an .npy of inputs; or "
            "make a bundle of it with `crypten-espn bundle`"
        )
    return Bundle(planned(network, calibration, precision or "fast", guard))


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


def _limits(given: list[str] | None) -> Limits:
    limits = Limits()
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            limits = replace(limits, **{name: type(_LIMITS[name])(value)})
        except (KeyError, ValueError):
            raise typer.BadParameter(
                f"{text!r} is no limit; give NAME=VALUE with a positive number and one "
                f"of {', '.join(_LIMITS)}",
                param_hint="'--limit'",
            ) from None
    return limits


def made_link(
    dealer: str | None,
    material: Path | None,
    tls: tuple[str, str, str] | None,
    insecure: bool,
    verbose: bool,
) -> Link:
    """How a command reaches the others, by its options; it logs from here on."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    return Link(dealer, material, tls and TLS(*tls), insecure=insecure)
