"""The material file's pages: who it is for, how long its records are, what MACs cover.

page 0           magic, length, header, MAC
page 1           journal
then             records of equal size: arrays, each aligned, zeros, MAC
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from ..errors import MaterialError
from . import journal
from .journal import Journal
from .messages import SERVER, Party

PAGE = 4096

_MAGIC, _ANY_VERSION = b"ESPNMAT4", b"ESPNMAT"
_LENGTH = struct.Struct("<I")
_ALIGNMENT = 64

#: Shape and type of each array of a record, in order.
Layout = Sequence[tuple[tuple[int, ...], np.dtype]]


def check_corrections(holder: str, kept: Party, wanted: Party) -> None:
    """Refuse material that was dealt the other way than it is asked for.

    Args:
        holder: what holds it, as the message calls it.

    Raises:
        MaterialError: it names both.
    """
    if kept != wanted:
        raise MaterialError(
            f"{holder} holds material with corrections to the {kept}; corrections to "
            f"the {wanted} were asked for. Ask for those (corrections=, --corrections) "
            "until it is used up, or name another folder."
        )


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a folder's material is for.

    Args:
        session: 16 bytes that both parties' material of one dealing share.
        rank: whose it is, 0 or 1.
        batch: inputs per inference, up to 2**20.
        count: records, up to 2**20.
        first: index of the first; later dealings of a session count on.
        plan: digest of the plan, 32 bytes.
        model: digest of the weights, 32 bytes; empty for a party that holds none.
        corrections: who received the dealer's.
    """

    session: Annotated[bytes, Meta(min_length=16, max_length=16)]
    rank: Annotated[int, Meta(ge=0, le=1)]
    batch: Annotated[int, Meta(ge=1, le=1 << 20)]
    count: Annotated[int, Meta(ge=1, le=1 << 20)]
    first: Annotated[int, Meta(ge=0, le=1 << 62)] = 0
    plan: Annotated[bytes, Meta(min_length=32, max_length=32)]
    model: Annotated[bytes, Meta(max_length=32)] = b""
    corrections: Party = SERVER

    @property
    def indices(self) -> range:
        """The records' indices."""
        return range(self.first, self.first + self.count)


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first page: what the material is for, and how it is stored.

    Args:
        identity: what it is for.
        record: bytes of a record, whole pages.
        key: of the MACs, drawn for this file.
    """

    identity: Identity
    record: Annotated[int, Meta(ge=PAGE, le=1 << 40, multiple_of=PAGE)]
    key: Annotated[
        bytes, Meta(min_length=journal.KEY_BYTES, max_length=journal.KEY_BYTES)
    ]

    def __repr__(self) -> str:
        return f"Header({self.identity}, record={self.record}, key=<hidden>)"

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return 2 * PAGE + self.identity.count * self.record

    @property
    def text(self) -> bytes:
        """The header as it is stored, and as every MAC covers it."""
        return msgspec.msgpack.encode(self)

    def page(self) -> bytes:
        """Page 0: magic, length, text, MAC, zeros."""
        text = self.text
        mac = journal.tag(self.key, journal.HEADER, 0, (text,))
        return (_MAGIC + _LENGTH.pack(len(text)) + text + mac).ljust(PAGE, b"\0")

    def journal(self, handle: int, path: Path) -> Journal:
        """The journal of an open file with this header."""
        return Journal(handle, PAGE, self.key, self.text, self.identity.indices, path)

    def offset(self, index: int) -> int:
        """Where a record begins."""
        return 2 * PAGE + (index - self.identity.first) * self.record

    @staticmethod
    def from_text(text: bytes) -> Header:
        """The inverse of `text`; whatever is out of range is a msgspec error."""
        return _DECODER.decode(text)

    @classmethod
    def from_page(cls, page: bytes, path: Path) -> Header:
        """Undo `page`.

        Raises:
            MaterialError: another version wrote it, or it is damaged.
        """
        if page[: len(_MAGIC)] != _MAGIC and page.startswith(_ANY_VERSION):
            raise MaterialError(
                f"{path} was written by another version of this package, which marks "
                "used records in another way: delete its folder and prepare material "
                "again"
            )
        start = len(_MAGIC) + _LENGTH.size
        try:
            (length,) = _LENGTH.unpack_from(page, len(_MAGIC))
            header = cls.from_text(page[start : start + length])
        except (msgspec.DecodeError, UnicodeDecodeError, struct.error):
            header = None
        # Equal to what we would write: no spelling but one, and its MAC is right.
        if header is None or header.page() != page:
            raise MaterialError(
                f"{path} is damaged, or no material: delete its folder and prepare "
                "material again"
            )
        return header


def record_bytes(layout: Layout) -> int:
    """Bytes of a record on disk: its arrays, each aligned, and its MAC; whole pages."""
    content = sum(room(shape, dtype) for shape, dtype in layout)
    return -(-(content + journal.TAG_BYTES) // PAGE) * PAGE


def record_tag(
    header: Header, index: int, parts: Sequence[bytes | memoryview]
) -> bytes:
    """The MAC of a record."""
    return journal.tag(header.key, journal.RECORD, index, (header.text, *parts))


def room(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes an array takes in a record; the next one is aligned."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# Made here once: two threads that decode a type for the first time crash msgspec.
_DECODER = msgspec.msgpack.Decoder(Header)
