"""Which records were used: one number in the material's file, never behind the truth.

The number is the next unused index. It is on the disk before a record is handed out, so
a process that dies loses a record and never uses one twice. Everything in the file is
under one MAC: the header, this number and each record.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ..errors import MaterialError

KEY_BYTES = TAG_BYTES = 16

#: What a MAC is for; with the index it makes the nonce, which never repeats.
HEADER, JOURNAL, RECORD = range(3)

_NONCE = struct.Struct("<IQ")
_ENTRY = struct.Struct(f"<Q{TAG_BYTES}s")

ENTRY_BYTES = _ENTRY.size


def tag(
    key: bytes, purpose: int, index: int, parts: Iterable[bytes | memoryview]
) -> bytes:
    """GMAC of parts, one after the other: AES-GCM's tag of an empty plaintext.

    A key must see each (purpose, index) with one message only.

    Args:
        key: 16 bytes.
        purpose: HEADER, JOURNAL or RECORD.
        index: below 2**64.
        parts: bytes of any length.

    Returns:
        16 bytes.

    Source: NIST SP 800-38D.
    """
    nonce = _NONCE.pack(purpose, index)
    mac = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    for part in parts:
        mac.authenticate_additional_data(part)
    mac.finalize()
    return mac.tag


@dataclass(frozen=True)
class Journal:
    """The next unused index, at a fixed place of an open file.

    Args:
        handle: the file, locked by the caller.
        position: where the entry lies.
        key, identity: what the entry's MAC is made with.
        indices: those of the file's records.
        path: for messages.
    """

    handle: int
    position: int
    key: bytes = field(repr=False)
    identity: bytes = field(repr=False)
    indices: range
    path: Path

    def next_index(self) -> int:
        """The first index not yet used; the one after the last if all were.

        Raises:
            MaterialError: the entry is damaged.
        """
        data = os.pread(self.handle, ENTRY_BYTES, self.position)
        if len(data) == ENTRY_BYTES:
            index: int
            (index, _) = _ENTRY.unpack(data)
            within = self.indices.start <= index <= self.indices.stop
            if within and data == self.entry(index):
                return index
        raise MaterialError(
            f"{self.path} is damaged where it says what was used, so nothing in it can "
            "be used safely: delete its folder and prepare material again"
        )

    def set(self, index: int) -> None:
        """Note the next unused index, on the disk when this returns.

        It is written in place: it changes whole or, where not, its MAC says so.

        Raises:
            OSError: the disk refused it.
        """
        os.pwrite(self.handle, self.entry(index), self.position)
        os.fsync(self.handle)

    def entry(self, index: int) -> bytes:
        """The bytes that stand for an index."""
        number = index.to_bytes(8, "little")
        mac = tag(self.key, JOURNAL, index, (self.identity, number))
        return _ENTRY.pack(index, mac)
