"""Certificates with roles for everybody who takes part, from one authority.

    keys = make_keys("keys", servers=["model.example"], dealers=["10.0.0.7"],
                     clients=["alice"])

A role is a URI among a certificate's subject alternative names, see `wire.tls`. The
authority is made once; later calls use it to issue further certificates.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import TransportError
from .wire.tls import ROLE_URI

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 825
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_CLOCKS = datetime.timedelta(hours=1)  # how much clocks may differ


@dataclass(frozen=True)
class Key:
    """One party's certificate and where its files are.

    Args:
        role: "server", "client" or "dealer".
        names: hosts it is for; a client's own name.
        certificate, key, authority: the three files of `wire.tls.TLS`.
    """

    role: str
    names: tuple[str, ...]
    certificate: Path
    key: Path
    authority: Path

    def __str__(self) -> str:
        return (
            f"{self.role} {', '.join(self.names)}:\n"
            f"  --tls {self.certificate} {self.key} {self.authority}"
        )


def make_keys(
    directory: str | os.PathLike[str],
    *,
    servers: Iterable[str] = (),
    dealers: Iterable[str] = (),
    clients: Iterable[str] = (),
) -> list[Key]:
    """Make an authority, or use the one that is there, and issue certificates.

    Args:
        directory: where the files go, all with mode 600; made with 700.
        servers, dealers: DNS names or addresses by which others connect, a certificate
            for each; several of one host are joined by commas.
        clients: names, a certificate for each.

    Returns: one `Key` for each, in this order.

    Raises:
        TransportError: a name is none, nothing was asked for, a file exists already
            (nothing is overwritten, no link followed), or the authority in the
            directory cannot be used. Nothing was issued.
    """
    asked = [("server", _hosts(text)) for text in servers]
    asked += [("dealer", _hosts(text)) for text in dealers]
    asked += [("client", (_client(text),)) for text in clients]
    if not asked:
        raise TransportError(
            "No certificate was asked for; give --server, --dealer or --client."
        )
    folder = Path(directory)
    authority = folder / "authority.pem"
    keys: list[Key] = []
    for role, names in asked:
        stem = f"{role}-{names[0].replace(':', '_')}"
        paths = folder / f"{stem}.pem", folder / f"{stem}.key"
        for path in paths:
            if os.path.lexists(path) or path in [k.certificate for k in keys]:
                raise TransportError(
                    f"{path} exists already, and nothing is overwritten; remove it, or "
                    "leave this name out."
                )
        keys.append(Key(role, names, *paths, authority))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        issuer, signer = _authority(folder)
        for key in keys:
            _issue(key, issuer, signer)
    except OSError as error:
        raise TransportError(
            f"{error.filename or folder} cannot be written ({error.strerror})."
        ) from None
    return keys


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority of a folder; a new one where there is none."""
    paths = folder / "authority.pem", folder / "authority.key"
    there = [path for path in paths if os.path.lexists(path)]
    if len(there) == 2:
        return _known_authority(*paths)
    if there:
        raise TransportError(
            f"{folder} holds only {there[0].name} of an authority. Put the other file "
            "back, or choose another directory."
        )
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "crypten-espn authority")]
    )
    certificate = (
        _builder(name, name, private.public_key(), days=AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(private, hashes.SHA256())
    )
    _write_pair(paths[0], certificate, paths[1], private)
    return certificate, private


def _known_authority(
    certificate_path: Path, key_path: Path
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    problem = "are not a certificate and its key"
    try:
        certificate = x509.load_pem_x509_certificate(_read(certificate_path))
        private = serialization.load_pem_private_key(_read(key_path), password=None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError(problem)
        if private.public_key() != certificate.public_key():
            raise ValueError(problem)
        problem = "are not an authority's"
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        if not limits.value.ca:
            raise ValueError(problem)
        problem = "are an authority's whose time is over"
        if certificate.not_valid_after_utc <= datetime.datetime.now(
            datetime.timezone.utc
        ):
            raise ValueError(problem)
    except (ValueError, TypeError, x509.ExtensionNotFound):
        raise TransportError(
            f"{certificate_path} and {key_path} {problem}; choose another directory."
        ) from None
    return certificate, private


def _issue(
    key: Key, issuer: x509.Certificate, signer: ec.EllipticCurvePrivateKey
) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    # A common name holds 64 characters; the alternative names are what counts.
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, key.role),
            x509.NameAttribute(NameOID.COMMON_NAME, key.names[0][:64]),
        ]
    )
    hosts = [] if key.role == "client" else [_general(name) for name in key.names]
    role = x509.UniformResourceIdentifier(ROLE_URI + key.role)
    days = CERTIFICATE_DAYS
    certificate = (
        _builder(
            subject, issuer.subject, private.public_key(), days=days, issuer=issuer
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        # A server also connects, to its dealer; the role tells parties apart.
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([role, *hosts]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write_pair(key.certificate, certificate, key.key, private)


def _builder(
    subject: x509.Name,
    issuer_name: x509.Name,
    public: ec.EllipticCurvePublicKey,
    *,
    days: int,
    issuer: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    end = now + datetime.timedelta(days=days)
    if issuer is not None:
        end = min(end, issuer.not_valid_after_utc)
        signer = issuer.extensions.get_extension_for_class(
            x509.SubjectKeyIdentifier
        ).value
        authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            signer
        )
    else:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(end)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(public), critical=False
        )
        .add_extension(authority, critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _hosts(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            continue
        labels = name.split(".")
        fits = all(_LABEL.fullmatch(label) for label in labels) and len(name) <= 253
        if not fits or labels[-1].isdigit():
            raise TransportError(
                f"{name!r} is neither a host's name nor an address; write it as others "
                "connect to it, without a port, such as model.example or 10.0.0.7."
            )
    return names


def _client(text: str) -> str:
    if not _CLIENT.fullmatch(text):
        raise TransportError(
            f"{text!r} is not a client's name: up to 63 letters, digits, '.', '_', '-'."
        )
    return text


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name.lower())


def _write_pair(
    certificate_path: Path,
    certificate: x509.Certificate,
    key_path: Path,
    private: ec.EllipticCurvePrivateKey,
) -> None:
    secret = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write(key_path, secret)
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))


def _write(path: Path, data: bytes) -> None:
    """Write a new file that only its owner may read; it must not exist."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read(1 << 20)
