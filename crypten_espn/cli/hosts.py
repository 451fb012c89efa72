"""What `serve` and `deal` were told, as each of their processes needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle, load
from ..bundle.sealed import is_bundle
from ..errors import EspnError
from ..masked.messages import Party
from ..serving.dealer import DealerServer
from ..serving.events import log_to_stderr
from ..serving.link import Limits, Link
from ..serving.memory import keep_together
from ..serving.quota import Quota
from ..serving.server import ModelServer
from ..serving.share import Share
from ..wire.tls import TLS
from .networks import planned


@dataclass(frozen=True)
class Common:
    """Options of both; TLS by its files, which every process reads for itself."""

    address: str
    tls: tuple[str, str, str] | None
    revoked: Path | None
    timeout: float
    insecure: bool
    limits: Limits
    verbose: bool
    log_json: bool

    def begin(self) -> None:
        """Set up this process: its log goes to standard error."""
        log_to_stderr(verbose=self.verbose, as_json=self.log_json)
        keep_together()

    @property
    def certificates(self) -> TLS | None:
        """What --tls and --revoked name, read now."""
        return None if self.tls is None else TLS(*self.tls, self.revoked)


@dataclass(frozen=True)
class Network:
    """A bundle, or a network that is planned on inputs."""

    path: Path
    calibration: Path | None
    precision: str | None
    guard: Path | None

    def read(self) -> Bundle:
        """The bundle in a file, or a network planned on the inputs in another.

        Raises:
            EspnError: as `load` or `planned`; calibration for a bundle, or none for
                another network.
        """
        if is_bundle(self.path):
            if (self.calibration, self.precision, self.guard) != (None, None, None):
                raise EspnError(
                    f"{self.path} is a bundle, which has its plan; leave out "
                    "--calibration, --precision and --guard"
                )
            return load(self.path)
        if self.calibration is None:
            raise EspnError(
                f"{self.path} is no bundle and needs --calibration, an .npy of inputs; "
                "or make a bundle of it with `crypten-espn bundle`"
            )
        made = planned(
            self.path, self.calibration, self.precision or "fast", self.guard
        )
        return Bundle(made)


@dataclass(frozen=True)
class Serving:
    """Makes the server of one process."""

    common: Common
    network: Network
    dealers: Sequence[str]
    material: Path | None
    corrections: Party | None
    quota: tuple[int, Path] | None
    bundle: Bundle | None = None

    def __call__(self, share: Share | None = None) -> ModelServer:
        """Read what is served, unless that was done, and listen."""
        told = self.common
        told.begin()
        link = Link(
            self.dealers,
            self.material,
            told.certificates,
            told.timeout,
            told.insecure,
            self.corrections,
        )
        return ModelServer(
            self.bundle or self.network.read(),
            told.address,
            link=link,
            limits=told.limits,
            quota=None if self.quota is None else Quota(*self.quota),
            share=share,
            again=self.network.read,
        )


@dataclass(frozen=True)
class Dealing:
    """Makes the dealer of one process."""

    common: Common
    plans: Sequence[bytes] | None

    def __call__(self, share: Share | None = None) -> DealerServer:
        """Listen."""
        told = self.common
        told.begin()
        link = Link(tls=told.certificates, timeout=told.timeout, insecure=told.insecure)
        return DealerServer(
            told.address, link=link, limits=told.limits, plans=self.plans, share=share
        )
