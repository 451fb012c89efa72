"""Mutual TLS between two parties."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass

from ..errors import PeerError


@dataclass(frozen=True)
class TLS:
    """Mutual TLS: both sides show a certificate that `authority` signed.

    Args:
        certificate, key: paths of this side's certificate chain and private key (PEM).
        authority: path of the certificates (PEM) that may sign the other side's.
        server_name: name the server's certificate must carry; None accepts any name,
            since the peer is identified by a certificate the authority signed.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    authority: str | os.PathLike[str]
    server_name: str | None = None

    def context(self, *, server: bool) -> ssl.SSLContext:
        protocol = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if not server:
            context.check_hostname = self.server_name is not None
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.certificate, self.key)
        context.load_verify_locations(self.authority)
        return context


def wrap(
    sock: socket.socket, tls: TLS, *, server: bool, timeout: float, peer: str
) -> ssl.SSLSocket:
    try:
        context = tls.context(server=server)
        sock.settimeout(timeout)
        name = None if server else tls.server_name
        return context.wrap_socket(sock, server_side=server, server_hostname=name)
    except (OSError, ssl.SSLError) as error:
        sock.close()
        raise PeerError(
            f"TLS with {peer} failed: {error}. Both sides need a certificate, its key "
            "and the authority that signed the other side's."
        ) from None
