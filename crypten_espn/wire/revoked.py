"""The list of certificates that are no longer accepted, read again when it changes."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from pathlib import Path

from cryptography import x509

from ..errors import RevokedError, TransportError
from .files import stamp

logger = logging.getLogger(__name__)

_SERIAL = re.compile(r"[0-9a-f]{1,40}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_LIMIT = 1 << 24


class RevokedList:
    """Certificates that are refused, whoever signed them.

    A line of the file is a certificate's serial number in hex, as `openssl x509
    -serial` prints it, or its SHA-256 fingerprint, with colons or without; `#` begins
    a comment. Once read, a list stays in force until another one can be read.

    Args:
        path: of the file.

    Raises:
        TransportError: it cannot be read, or a line is neither; the line is named.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._stamp = stamp([self.path])
        self._found = _read(self.path)

    def __contains__(self, certificate: bytes) -> bool:
        """Whether a certificate, in DER, is on the list by now."""
        serial = x509.load_der_x509_certificate(certificate).serial_number
        print_ = hashlib.sha256(certificate).hexdigest()
        found = self._now()
        return print_ in found or f"{serial:x}" in found

    def check(self, certificate: bytes, *, role: str) -> None:
        """Refuse a certificate, in DER, that is on the list.

        Raises:
            RevokedError: it is; the text may be sent to its holder.
        """
        if certificate in self:
            raise RevokedError(
                f"This certificate of a {role} was revoked. Ask whoever issues "
                "certificates for another one."
            )

    def _now(self) -> frozenset[str]:
        with self._lock:
            now = stamp([self.path])
            if now != self._stamp:
                self._stamp = now
                try:
                    self._found = _read(self.path)
                    logger.info("%s: %d are revoked", self.path, len(self._found))
                except TransportError as error:
                    logger.warning("the last list stays in force: %s", error)
            return self._found


def _read(path: Path) -> frozenset[str]:
    try:
        with open(path, "rb") as file:
            text = file.read(_LIMIT).decode("utf-8", "replace")
    except OSError as error:
        raise TransportError(f"{path} cannot be read ({error.strerror}).") from None
    found = set()
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.partition("#")[0].strip().lower().removeprefix("serial=")
        word = word.removeprefix("0x").replace(":", "")
        if _FINGERPRINT.fullmatch(word):
            found.add(word)
        elif _SERIAL.fullmatch(word):
            found.add(f"{int(word, 16):x}")
        elif word:
            raise TransportError(
                f"{path}, line {number} is neither a serial number in hex, up to 40 "
                "digits, nor a SHA-256 fingerprint of 64."
            )
    return frozenset(found)
