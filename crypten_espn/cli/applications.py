"""`crypten-espn sidecar`: HTTP for applications beside the client."""

from __future__ import annotations

import re
import signal
import threading
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from ..serving.client import Client, connect
from ..serving.events import log_to_stderr
from ..serving.link import TIMEOUT_S, Link
from ..serving.supply import Supply
from ..sidecar.limits import SidecarLimits
from .clients import Server
from .options import checked, option, whole
from .sessions import (
    Config,
    Corrections,
    Dealer,
    Insecure,
    LogJson,
    Material,
    Revoked,
    Timeout,
    Tls,
    Verbose,
    certificates,
    limit_option,
    limits_of,
)

if TYPE_CHECKING:
    from ..sidecar.running import Sidecar

_LISTEN = "host:port that applications ask, on loopback"
_EXPOSE = (
    "listen beyond this host's loopback, under these names or addresses: inputs then "
    "reach the sidecar in the clear, and whoever reaches it uses this client's quota"
)
_AHEAD = (
    "inferences prepared at a time in the background; 0 prepares each when it is needed"
)
_LOW = "the mark: with so many left, or fewer, the next are prepared (default: half)"
_BATCH = "inputs in each inference; requests that wait share one, others fill it up"


def _name(help: str) -> OptionInfo:
    return checked(
        help,
        "NAME",
        str,
        lambda name: re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) is not None,
        "is no name; give letters, digits, dots, dashes and underscores",
    )


def sidecar(
    address: Server,
    dealer: Dealer,
    listen: Annotated[str, option(_LISTEN, "ADDRESS")] = "127.0.0.1:8000",
    name: Annotated[str, _name("of the model, in URLs")] = "model",
    input_name: Annotated[str, _name("of its input tensor")] = "input",
    output_name: Annotated[str, _name("of its output tensor")] = "logits",
    ahead: Annotated[int, whole(_AHEAD, least=0)] = 4,
    low: Annotated[int | None, whole(_LOW, least=0)] = None,
    batch: Annotated[int, whole(_BATCH)] = 1,
    expose: Annotated[list[str] | None, option(_EXPOSE, "NAME...")] = None,
    limit: Annotated[list[str] | None, limit_option(SidecarLimits())] = None,
    material: Material = None,
    corrections: Corrections = None,
    tls: Tls = None,
    revoked: Revoked = None,
    timeout: Timeout = TIMEOUT_S,
    insecure: Insecure = False,
    verbose: Verbose = False,
    log_json: LogJson = False,
    config: Config = None,
) -> int:
    """Answer an application over HTTP, by the Open Inference Protocol v2.

    examples:
      crypten-espn sidecar server:29500 --dealer dealer:29501 \\
        --listen 127.0.0.1:8000 --name resnet --tls client.pem client.key authority.pem
      crypten-espn sidecar 127.0.0.1:29500 --dealer 127.0.0.1:29501 --ahead 16
    """
    from ..sidecar.running import Sidecar
    from ..sidecar.tensors import Names

    limits = limits_of(SidecarLimits(), limit)
    log_to_stderr(verbose=verbose, as_json=log_json)
    files = certificates(tls, revoked)
    link = Link(dealer, material, files, timeout, insecure, corrections)
    mark = ahead // 2 if low is None else low
    if mark > ahead:
        raise typer.BadParameter(
            f"{mark} was given, above --ahead {ahead}", param_hint="'--low'"
        )

    def reach() -> Client | Supply:
        if ahead:
            return Supply(address, link, ahead=ahead, low=mark, batch=batch)
        return connect(address, link=link)

    with Sidecar(
        reach,
        listen,
        names=Names(name, input_name, output_name),
        expose=expose or (),
        size=batch,
        limits=limits,
    ) as running:
        _until_stopped(running)
    print(f"stopped listening on {running.address}", flush=True)
    return 0


def _until_stopped(running: Sidecar) -> None:
    """Run until SIGTERM or SIGINT, finish what is under way, and end well."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda *_: running.stop())
    try:
        print(f"listening on http://{running.address}; Ctrl-C ends", flush=True)
        running.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
