"""`crypten-espn serve`, `deal`, `material` and `keys`."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from typer.models import OptionInfo

from ..bundle.sealed import is_bundle
from ..masked.messages import Party
from ..masked.planning import PRECISIONS
from ..masked.store import material_info
from ..pillar.storage import network_file
from ..serving.admin import Admin
from ..serving.crew import Crew
from ..serving.host import Host
from ..serving.link import TIMEOUT_S, Limits
from ..serving.messages import INDEX_LIMIT
from ..serving.quota import Quota
from ..wire.connect import check_plaintext
from ..wire.tls import TLS
from .hosts import Common, Dealing, Network, Serving
from .options import (
    INPUTS,
    GuardFile,
    argument,
    checked,
    choice,
    configuration,
    option,
    positive,
    whole,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

L = TypeVar("L", bound="DataclassInstance")


def limit_option(defaults: DataclassInstance) -> OptionInfo:
    """`--limit NAME=VALUE` for these limits."""
    shown = ", ".join(f"{name}={value:g}" for name, value in asdict(defaults).items())
    about = f"what is put up with; may be repeated (defaults: {shown})"
    return option(about, "NAME=VALUE")


_TLS = "PEM files for mutual TLS", "CERTIFICATE KEY AUTHORITY"
_VERBOSE = "log every session to standard error, not only what was refused"
_INSECURE = (
    "allow addresses beyond this machine without TLS: whoever sees the traffic can "
    "then undo the masks"
)
_REVOKED = (
    "certificates that are refused, a serial number or SHA-256 fingerprint a line; "
    "read again when it changes"
)
_WORKERS = "processes that share the address; limits hold for each of them"
_ADMIN = "HTTP for /health and /metrics; a port alone is of 127.0.0.1"
_LOG_JSON = "log every event to standard error, as a JSON object a line"
_TIMEOUT = "seconds another party may be silent while something is under way"
_QUOTA = "inputs that are answered to one client in a day (UTC)"
_DAILY = checked(
    _QUOTA,
    "INT",
    int,
    range(1, INDEX_LIMIT).__contains__,
    f"was given; give a whole number from 1 on, below {INDEX_LIMIT}",
)
_ONLY = (
    "offer clients corrections to this party alone (default: what each asks for); to "
    "the client they leave the server's line and disk to others"
)
_RECEIVER = (
    "who receives the dealer's corrections (default: server); the client's line is "
    "spared if the server does, the server's if the client does"
)
_QUOTA_FILE = "where they are counted (default: quota.json in the --material folder)"
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

_DEALER = (
    "host:port of the dealer; may be repeated: each session then has one that server "
    "and client both name"
)
_NETWORK = "a bundle, an .onnx, a trained .safetensors, or a bundled network's name"
_CALIBRATION = f"{INPUTS}; they bound every layer of a network that is no bundle"
_PRECISION = "of a network that is no bundle; see `crypten-espn plan --help`"

Served = Annotated[
    Path, typer.Argument(parser=network_file, metavar="NETWORK", help=_NETWORK)
]
Listen = Annotated[str, argument("host:port to listen on", "ADDRESS")]
Dealer = Annotated[list[str], option(_DEALER, "ADDRESS")]
Material = Annotated[Path | None, option("folder of prepared randomness", "DIR")]
LimitList = Annotated[list[str] | None, limit_option(Limits())]
Tls = Annotated[tuple[str, str, str] | None, option(*_TLS)]
Insecure = Annotated[bool, option(_INSECURE, None, "--insecure")]
Verbose = Annotated[bool, option(_VERBOSE, None, "-v", "--verbose")]
Workers = Annotated[int, whole(_WORKERS)]
LogJson = Annotated[bool, option(_LOG_JSON, None, "--log-json")]
Timeout = Annotated[float, positive(_TIMEOUT)]
Revoked = Annotated[Path | None, option(_REVOKED, "FILE")]
AdminAddress = Annotated[str | None, option(_ADMIN, "HOST:PORT", "--admin")]
Corrections = Annotated[Party | None, choice(_RECEIVER, "server", "client")]
Config = Annotated[Path | None, configuration()]


def serve(
    network: Served,
    address: Listen,
    dealer: Dealer,
    calibration: Annotated[Path | None, option(_CALIBRATION, "FILE")] = None,
    precision: Annotated[str | None, choice(_PRECISION, *PRECISIONS)] = None,
    guard: GuardFile = None,
    material: Material = None,
    workers: Workers = 1,
    corrections: Annotated[Party | None, choice(_ONLY, "server", "client")] = None,
    limit: LimitList = None,
    quota: Annotated[int | None, _DAILY] = None,
    quota_file: Annotated[Path | None, option(_QUOTA_FILE, "FILE")] = None,
    tls: Tls = None,
    revoked: Revoked = None,
    timeout: Timeout = TIMEOUT_S,
    insecure: Insecure = False,
    admin: AdminAddress = None,
    verbose: Verbose = False,
    log_json: LogJson = False,
    config: Config = None,
) -> int:
    """Own the network and answer clients until interrupted.

    examples:
      crypten-espn serve net.espn 0.0.0.0:29500 --dealer dealer:29501 \\
        --tls server.pem server.key authority.pem
      crypten-espn serve network.safetensors 127.0.0.1:29500 \\
        --dealer 127.0.0.1:29501 --calibration images.npy
    """
    common = _common(address, limit, tls, revoked, timeout, insecure, verbose, log_json)
    counted = _quota(quota, quota_file, material)
    told = Network(network, calibration, precision, guard)
    common.begin()
    if counted is not None:
        Quota(*counted)
    bundle = told.read()
    print(bundle.model)
    # Every worker reads a bundle for itself; what took planning is given to it.
    given = None if workers > 1 and is_bundle(network) else bundle
    make = Serving(common, told, dealer, material, corrections, counted, given)
    host = make() if workers == 1 else _crew(make, "server", workers)
    return _until_stopped(host, "listening on", admin)


def deal(
    address: Listen,
    plan_digest: Annotated[list[bytes] | None, _DIGESTS] = None,
    workers: Workers = 1,
    limit: LimitList = None,
    tls: Tls = None,
    revoked: Revoked = None,
    timeout: Timeout = TIMEOUT_S,
    insecure: Insecure = False,
    admin: AdminAddress = None,
    verbose: Verbose = False,
    log_json: LogJson = False,
    config: Config = None,
) -> int:
    """Be the dealer: prepare randomness for both parties, see no data.

    examples:
      crypten-espn deal 0.0.0.0:29501 --tls dealer.pem dealer.key authority.pem
    """
    common = _common(address, limit, tls, revoked, timeout, insecure, verbose, log_json)
    make = Dealing(common, plan_digest)
    common.begin()
    host = make() if workers == 1 else _crew(make, "dealer", workers)
    return _until_stopped(host, "dealing on", admin)


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


def _common(
    address: str,
    limit: list[str] | None,
    tls: tuple[str, str, str] | None,
    revoked: Path | None,
    timeout: float,
    insecure: bool,
    verbose: bool,
    log_json: bool,
) -> Common:
    limits = limits_of(Limits(), limit)
    certificates(tls, revoked)  # read before anything else
    return Common(address, tls, revoked, timeout, insecure, limits, verbose, log_json)


def _crew(make: Serving | Dealing, role: str, workers: int) -> Crew:
    """Several processes that are one host."""
    told = make.common
    check_plaintext(told.address, told.certificates, told.insecure)
    grace = told.limits.grace_s
    return Crew(make, told.address, role=role, workers=workers, grace_s=grace)


def _until_stopped(server: Host | Crew, doing: str, admin: str | None) -> int:
    """Run until SIGTERM or SIGINT, finish what is under way, and end well.

    SIGHUP reads the certificates and the bundle again.
    """
    handlers = {
        signal.SIGTERM: server.stop,
        signal.SIGINT: server.stop,
        signal.SIGHUP: server.reload,
    }
    with ExitStack() as stack:
        stack.enter_context(server)
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number, act in handlers.items():
                before[number] = signal.signal(number, lambda *_, act=act: act())
        try:
            if admin is not None:
                watched = stack.enter_context(Admin(server, admin))
                print(f"health and metrics on http://{watched.address}")
            print(f"{doing} {server.address}; Ctrl-C ends", flush=True)
            server.run()
            server.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print(f"stopped {doing} {server.address}", flush=True)
    return 0


def certificates(
    files: tuple[str, str, str] | None, revoked: Path | None
) -> TLS | None:
    """What --tls and --revoked name.

    Raises:
        BadParameter: there is a list and no certificate.
    """
    if files is not None:
        return TLS(*files, revoked)
    if revoked is not None:
        raise typer.BadParameter("it needs --tls", param_hint="'--revoked'")
    return None


def _quota(
    daily: int | None, file: Path | None, material: Path | None
) -> tuple[int, Path] | None:
    if daily is None:
        if file is not None:
            raise typer.BadParameter("it needs --quota", param_hint="'--quota-file'")
        return None
    if file is not None:
        return daily, file
    if material is None:
        raise typer.BadParameter(
            "it needs --quota-file, or --material, to be kept across restarts",
            param_hint="'--quota'",
        )
    return daily, material / "quota.json"


def limits_of(defaults: L, given: list[str] | None) -> L:
    """These limits with what was given in their place.

    Raises:
        BadParameter: one is no limit, or no positive number.
    """
    limits, known = defaults, asdict(defaults)
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            limits = replace(limits, **{name: type(known[name])(value)})
        except (KeyError, ValueError):
            raise typer.BadParameter(
                f"{text!r} is no limit; give NAME=VALUE with a positive number and one "
                f"of {', '.join(known)}",
                param_hint="'--limit'",
            ) from None
    return limits
