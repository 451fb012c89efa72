"""What a message looks like: a header of 20 bytes, then as many bytes as it says.

    "ESPN" | version 2 bytes | kind 2 | tag 4 | size 8 | size bytes

A header is checked whole before anyone acts on it. What a peer says in words is
cleaned before it is shown.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from ..errors import PeerError

PROTOCOL_VERSION = 3
MAGIC = b"ESPN"
ROLES = ("server", "client", "dealer")
HEADER_BYTES = 20
ABORT_BYTES = 1000  # of UTF-8, the longest reason

_HEADER = struct.Struct("<4sHHIQ")  # magic, version, kind, tag, payload bytes
_HELLO = struct.Struct("<16s32s")  # role, digest
HELLO_BYTES = _HELLO.size
_TOGETHER = 1 << 14  # smaller messages are copied into one packet


class Kind(enum.IntEnum):
    """What a message holds."""

    RING = 1  # ring elements
    BYTES = 2  # a byte string
    HELLO = 3  # role and digest, once at the start
    ABORT = 4  # why the sender stops, in words


_KINDS = {kind.value: kind for kind in Kind}


class Header(NamedTuple):
    """What a message announces: its kind, its tag and the bytes that follow."""

    kind: Kind
    tag: int
    size: int

    @property
    def is_ring(self) -> bool:
        """Whether ring elements follow."""
        return self.kind == Kind.RING


def frame(kind: Kind, tag: int, parts: Sequence[memoryview]) -> Iterable[memoryview]:
    """A message as views to write one after the other; large parts are not copied."""
    return framed(kind, tag, sum(map(len, parts)), parts)


def framed(
    kind: Kind, tag: int, size: int, parts: Iterable[memoryview]
) -> Iterable[memoryview]:
    """`frame` of parts that are not there yet.

    Args:
        size: bytes of all of them.
        parts: each is asked for when those before it are written.
    """
    header = _HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, tag, size)
    if size > _TOGETHER:
        return chain([memoryview(header)], parts)
    message = bytearray(header)
    for part in parts:
        message += part
    return [memoryview(message)]


def parse(data: bytes | bytearray, *, peer: str) -> Header:
    """Read a header.

    Raises:
        PeerError: not this protocol, another version, an unknown kind, or a reason
            longer than `ABORT_BYTES`.
    """
    magic, version, kind, tag, size = _HEADER.unpack(data)
    if magic != MAGIC:
        raise PeerError(f"{peer} does not speak this protocol.")
    if version != PROTOCOL_VERSION:
        raise PeerError(
            f"{peer} speaks protocol version {version}, this side "
            f"{PROTOCOL_VERSION}. Install the same crypten-espn on both."
        )
    if kind not in _KINDS:
        raise PeerError(f"{peer} sent a message of kind {kind}, which does not exist.")
    if kind == Kind.ABORT and size > ABORT_BYTES:
        raise PeerError(f"{peer} stopped, with a reason of {size} bytes.")
    return Header(_KINDS[kind], tag, size)


def hello(role: str, digest: bytes) -> memoryview:
    """The payload of a greeting.

    Args:
        role: one of `ROLES`.
        digest: 32 bytes that both sides must share.
    """
    assert role in ROLES and len(digest) == 32
    return memoryview(_HELLO.pack(role.encode("ascii"), digest))


def parse_hello(data: bytes | memoryview, *, peer: str) -> tuple[str, bytes]:
    """The role and the digest of a greeting.

    Raises:
        PeerError: the role is none of `ROLES`.
    """
    name, digest = _HELLO.unpack(data)
    for role in ROLES:
        if name == role.encode("ascii").ljust(16, b"\0"):
            return role, digest
    shown = printable(name.rstrip(b"\0").decode("utf-8", "replace"))
    raise PeerError(f"{peer} greets as {shown!r}, which is none of {', '.join(ROLES)}.")


def reason(text: str) -> memoryview:
    """The payload of an abort."""
    return memoryview(printable(text).encode("utf-8", "replace")[:ABORT_BYTES])


def printable(text: str, *, limit: int = ABORT_BYTES) -> str:
    """A foreign text that can be shown and logged: no control characters, bounded.

    A terminal obeys escape sequences, and a line break forges a line of a log.
    """
    line = " ".join(text[: 2 * limit].split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
