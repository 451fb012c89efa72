"""Mutual TLS between parties that hold roles.

A certificate says what its holder is by a URI among its subject alternative names,
`urn:crypten-espn:role:server`, `...:client` or `...:dealer`. Both sides check the
other's on every connection, and the connecting side also the host's name or address.
`crypten-espn keys` makes such certificates.
"""

from __future__ import annotations

import contextlib
import copy
import ipaddress
import logging
import os
import select
import socket
import ssl
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509

from ..errors import PeerError, TransportError
from .files import Stamp, stamp
from .frames import ROLES, printable
from .revoked import RevokedList

ROLE_URI = "urn:crypten-espn:role:"
_MAKE = "`crypten-espn keys` makes certificates with roles."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TLS:
    """This side's certificate and key, and who may sign the other side's.

    The files are read when the object is made, and again for every listener and
    connection.

    Args:
        certificate, key: paths of this side's certificate chain and private key (PEM).
        authority: path of the certificates (PEM) that may sign the other side's.
        revoked: path of a list of certificates that are refused all the same, see
            `RevokedList`; read again when it changes.

    Attributes:
        role: what the certificate says this side is.

    Raises:
        TransportError: a file cannot be read or is not what it should be, the
            certificate has no role, or everybody may read the key. A key that only a
            group may read is logged: secrets mounted by an orchestrator are.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    authority: str | os.PathLike[str]
    revoked: str | os.PathLike[str] | None = None
    role: str = field(init=False)
    _list: RevokedList | None = field(init=False, repr=False, compare=False)
    _held: tuple[ssl.SSLContext, ssl.SSLContext] | None = field(
        init=False, repr=False, compare=False, default=None
    )

    def __post_init__(self) -> None:
        for path in (self.certificate, self.key, self.authority):
            _read(path)
        _check_mode(self.key)
        self.context(server=False)
        object.__setattr__(self, "role", _own_role(self.certificate))
        listed = None if self.revoked is None else RevokedList(self.revoked)
        object.__setattr__(self, "_list", listed)

    def held(self) -> TLS:
        """The same files as they are now, whatever becomes of them.

        A connection and what follows from it, such as the dealing of its session,
        then show one certificate.

        Raises:
            TransportError: the files cannot be used by now.
        """
        if self._held is not None:
            return self
        made = copy.copy(self)
        both = self.context(server=False), self.context(server=True)
        object.__setattr__(made, "_held", both)
        return made

    def check_revoked(self, certificate: bytes, *, role: str) -> None:
        """Refuse a peer whose certificate, in DER, is on the list by now.

        Raises:
            RevokedError: it is; the text may be sent to the peer.
        """
        if self._list is not None:
            self._list.check(certificate, role=role)

    def context(self, *, server: bool) -> ssl.SSLContext:
        """TLS 1.3 that asks the other side for its certificate.

        Raises:
            TransportError: names the file that cannot be used.
        """
        if self._held is not None:
            return self._held[server]
        protocol = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The name is compared after the role (`check_peer`), so that a wrong role is
        # called one, whatever name it shows.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # nobody resumes
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (OSError, ValueError) as error:
            raise TransportError(
                f"{_name(self.certificate)} and {_name(self.key)} are no certificate "
                f"and its key, in PEM and without a password ({_detail(error)})."
            ) from None
        try:
            context.load_verify_locations(self.authority)
        except (OSError, ValueError) as error:
            raise TransportError(
                f"{_name(self.authority)} holds no authority's certificate in PEM "
                f"({_detail(error)})."
            ) from None
        return context


class Rotating:
    """Certificates that are read again when their files change.

    Files that do not fit each other, as in the middle of a replacement, are logged and
    the last ones stay in use.

    Args:
        tls: the files.
    """

    def __init__(self, tls: TLS) -> None:
        self._stamp, self._current = _stamp(tls), tls.held()

    def current(self, *, anyway: bool = False) -> TLS:
        """What to show now, as `TLS.held`.

        Args:
            anyway: read the files again whether they changed or not.
        """
        now, old = _stamp(self._current), self._current
        if now == self._stamp and not anyway:
            return old
        self._stamp = now
        try:
            made = TLS(old.certificate, old.key, old.authority, old.revoked).held()
            if made.role != old.role:
                raise TransportError(
                    f"{_name(old.certificate)} is the certificate of a {made.role}, "
                    f"this is a {old.role}."
                )
        except TransportError as error:
            logger.warning("the last certificate stays in use: %s", error)
            return old
        logger.info("%s: read again", _name(old.certificate))
        self._current = made
        return made


def secure(
    sock: socket.socket, context: ssl.SSLContext, *, server: bool, end: float, peer: str
) -> ssl.SSLSocket:
    """Do the TLS handshake on a connected socket; closes it if that fails.

    Args:
        sock: connected.
        context: from `TLS.context`.
        server: whether this side listened.
        end: by time.monotonic(), when the whole handshake must be done.
        peer: what to call the other side.

    Raises:
        PeerError: the peer has no certificate that the authority signed, refuses this
            side's, speaks no TLS, or is not done in time.
    """
    sock.setblocking(False)
    wrapped = None
    try:
        wrapped = context.wrap_socket(
            sock, server_side=server, do_handshake_on_connect=False
        )
        while True:
            try:
                wrapped.do_handshake()
                return wrapped
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            left = end - time.monotonic()
            poller = select.poll()
            poller.register(wrapped, events)
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError("the handshake was not done in time")
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            (wrapped or sock).close()
        detail = describe(error) if isinstance(error, OSError) else str(error)
        raise PeerError(f"TLS with {peer} failed: {detail}.") from None


def check_peer(
    sock: ssl.SSLSocket, *, roles: tuple[str, ...], host: str | None, own: str
) -> str:
    """The role in the peer's certificate.

    Args:
        sock: after the handshake.
        roles: what the peer may be.
        host: the name or address that was connected to, which a server or a dealer
            must be; None for a side that listened.
        own: this side's role.

    Raises:
        PeerError: no role, another one, or a certificate for another host. The text
            may be sent to the peer.
    """
    certificate: Mapping[str, Any] = sock.getpeercert() or {}
    names = certificate.get("subjectAltName", ())
    found = [value for kind, value in names if kind == "URI"]
    role = _role([uri for uri in found if uri.startswith(ROLE_URI)])
    expected = " or a ".join(roles)
    if role is None:
        raise PeerError(
            f"The {own} expects the certificate of a {expected}, and was shown one "
            f"without a role. {_MAKE}"
        )
    if role not in roles:
        raise PeerError(
            f"The {own} expects the certificate of a {expected}, and was shown that of "
            f"a {printable(role, limit=60)}."
        )
    if host is not None and role != "client" and not _matches(names, host):
        valid = [value for kind, value in names if kind in ("DNS", "IP Address")]
        raise PeerError(
            f"The certificate of the {role} at {host} is for "
            f"{printable(', '.join(valid) or 'no host', limit=200)}. Connect by such a "
            f"name, or make one for {host}: crypten-espn keys --{role} {host}"
        )
    return role


def common_name(sock: ssl.SSLSocket) -> str:
    """The name in the peer's certificate, in printable form; empty if it has none."""
    certificate: Mapping[str, Any] = sock.getpeercert() or {}
    parts = [part for group in certificate.get("subject", ()) for part in group]
    names = [value for kind, value in parts if kind == "commonName"]
    return printable(names[-1], limit=64) if names else ""


def describe(error: OSError) -> str:
    """What went wrong with a socket, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted ({error.verify_message})"
    if isinstance(error, ssl.SSLEOFError):
        return "it closed the connection"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if "alert" in reason:
            return (
                f"it refused this side's certificate or protocol ({reason}). Both "
                "sides need a certificate, its key and the authority that signed the "
                "other side's"
            )
        if reason in ("wrong version number", "http request", "record layer failure"):
            return f"it does not speak TLS ({reason})"
        return reason
    return error.strerror or str(error) or type(error).__name__


def _stamp(tls: TLS) -> Stamp:
    return stamp([tls.certificate, tls.key, tls.authority])


def _matches(names: Iterable[tuple[str, str]], host: str) -> bool:
    """Whether a certificate is for a host: by exact name, or by address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        wanted = host.rstrip(".").lower()
        return any(k == "DNS" and v.lower() == wanted for k, v in names)
    for kind, value in names:
        with contextlib.suppress(ValueError):
            if kind == "IP Address" and ipaddress.ip_address(value) == address:
                return True
    return False


def _role(uris: list[str]) -> str | None:
    """What these URIs say; several roles are none."""
    return uris[0].removeprefix(ROLE_URI) if len(uris) == 1 else None


def _own_role(path: str | os.PathLike[str]) -> str:
    try:
        certificate = x509.load_pem_x509_certificate(_read(path))
        names = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound):
        uris = []
    role = _role([uri for uri in uris if uri.startswith(ROLE_URI)])
    if role not in ROLES:
        raise TransportError(
            f"{_name(path)} has no role: {ROLE_URI}ROLE among its subject alternative "
            f"names, once, with {', '.join(ROLES)} as ROLE. {_MAKE}"
        )
    return role


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise TransportError(
            f"{_name(path)} cannot be read ({error.strerror})."
        ) from None


def _check_mode(path: str | os.PathLike[str]) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o007:
        raise TransportError(
            f"Everybody on this host may use the private key {_name(path)} (mode "
            f"{mode:03o}); chmod 600 it."
        )
    if mode & 0o070:
        logger.warning(
            "a group may use the private key %s (mode %03o); 600 is enough",
            _name(path),
            mode,
        )


def _name(path: str | os.PathLike[str]) -> str:
    return os.fspath(path)


def _detail(error: Exception) -> str:
    if isinstance(error, OSError):
        return describe(error)
    return str(error)


def _no_password() -> str:
    raise ValueError("the key has a password")
