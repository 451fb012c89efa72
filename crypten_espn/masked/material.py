"""Offline material on disk: one directory per party, every record used once.

    material.espn   header, then `count` records of equal size, each with a checksum
    used            the next unused index, in 16 bytes

An index is marked as used, and the mark forced to disk, before its record is read. A
process that dies in between loses that record and never uses it twice. Files are
readable by their owner only: they hold secret masks. Nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MaterialError
from . import kernels
from .offline import Material, client_values, expand
from .plan import Plan

_MAGIC = b"ESPNMAT1"
_LENGTH = struct.Struct("<I")
_USED = struct.Struct("<QQ")  # next index, and its complement
_PAGE = 4096
_DATA, _PARTIAL, _JOURNAL = "material.espn", "material.partial", "used"


@dataclass(frozen=True)
class MaterialInfo:
    """What a material directory holds, without any secret.

    Args:
        rank: whose it is.
        batch: inputs per inference.
        count, remaining: inferences prepared, and not yet used.
        bytes_on_disk: size of the data file.
        plan: the plan's digest, hex.
        model: the weights' digest, hex; empty for a party that does not hold them.
        session: which dealing both parties' material comes from, hex.
    """

    rank: int
    batch: int
    count: int
    remaining: int
    bytes_on_disk: int
    plan: str
    model: str
    session: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: {self.remaining} of {self.count} inferences left, "
            f"batch {self.batch}, {self.bytes_on_disk:,} bytes, plan {self.plan[:16]}, "
            f"session {self.session[:16]}"
        )


@dataclass(frozen=True)
class _Part:
    """One array of a record."""

    kind: str
    number: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes it takes in a record, a multiple of 64 so that the next is aligned."""
        return (self.size + 63) // 64 * 64


def _layout(plan: Plan, rank: int, batch: int) -> list[_Part]:
    """The arrays of a record in order. Rank 1 expands most of its own from a seed."""
    parts = []
    for number, segment in enumerate(plan.segments):
        shape = (batch, *segment.root.shape)
        act = segment.activation
        if rank == 0 or plan.mode == "shared" or act is None:
            dtype = np.dtype(kernels.ring_dtype(segment.ring))
            parts.append(_Part("linear", number, shape, dtype))
        if act is None or rank == 1:
            continue
        values = (2, act.values, batch * segment.elements)
        parts.append(_Part("values", number, values, np.dtype(np.int64)))
        if plan.mode == "shared":
            dtype = np.dtype(kernels.ring_dtype(plan.sources[number + 1].ring))
            parts.append(_Part("mask", number + 1, shape, dtype))
    return parts


def record_bytes(plan: Plan, rank: int, batch: int) -> int:
    """Bytes of one inference's record on the disk of a party, whole pages."""
    size = sum(part.room for part in _layout(plan, rank, batch)) + _LENGTH.size
    return (size + _PAGE - 1) // _PAGE * _PAGE


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class MaterialWriter:
    """Writes one party's material; nothing is valid before `close`.

    Args:
        directory: made if missing; must not hold unused material.
        plan, rank, batch: what the material is for.
        count: number of inferences that will be added.
        session: bytes that both parties' material of one dealing share.
        seed: this party's seed; kept for rank 1, which expands from it.
        model: digest of the weights, or empty.
        first: index of the first inference; later dealings of a session count on.

    Raises: MaterialError if the directory already holds unused material.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        plan: Plan,
        rank: int,
        batch: int,
        count: int,
        session: bytes,
        seed: bytes,
        model: bytes = b"",
        first: int = 0,
    ) -> None:
        self.directory = self._folder = Path(directory)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (self._folder / _DATA).exists():
            left = material_info(self._folder).remaining
            if left:
                raise MaterialError(
                    f"{self._folder} still holds material for {left} inferences; use "
                    "it up, delete it, or name another directory."
                )
        self._parts = _layout(plan, rank, batch)
        self._size = record_bytes(plan, rank, batch)
        self._count = count
        self._first = first
        self._added = 0
        header: dict[str, Any] = {
            "version": 1,
            "rank": rank,
            "batch": batch,
            "count": count,
            "first": first,
            "record": self._size,
            "plan": plan.digest.hex(),
            "model": model.hex(),
            "session": session.hex(),
            "seed": seed.hex() if rank == 1 else "",
        }
        text = json.dumps(header, sort_keys=True).encode()
        block = _MAGIC + _LENGTH.pack(len(text)) + text + hashlib.sha256(text).digest()
        handle = os.open(
            self._folder / _PARTIAL, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
        )
        self._file = os.fdopen(handle, "wb")
        self._file.write(block.ljust(_PAGE, b"\0"))

    def add(self, material: Material) -> None:
        """Append the material of the next index."""
        expected = self._first + self._added
        if material.index != expected:
            raise MaterialError(
                f"Material {material.index} came where {expected} was expected."
            )
        checksum = 0
        written = 0
        for part in self._parts:
            if part.kind == "linear":
                array = material.linear[part.number]
            elif part.kind == "values":
                values = material.values[part.number]
                assert values is not None
                array = values
            else:
                array = material.masks[part.number]
            data = np.ascontiguousarray(array, dtype=part.dtype).data.cast("B")
            for piece in (data, bytes(part.room - part.size)):
                checksum = zlib.crc32(piece, checksum)
                written += self._file.write(piece)
        self._file.write(b"\0" * (self._size - written - _LENGTH.size))
        self._file.write(_LENGTH.pack(checksum))
        self._added += 1

    def close(self) -> None:
        """Force everything to disk and make it valid.

        Raises: MaterialError if fewer inferences were added than announced.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._added != self._count:
            (self._folder / _PARTIAL).unlink()
            raise MaterialError(
                f"{self._added} of {self._count} inferences were prepared; none kept."
            )
        # Old, used-up records go before their journal does: a crash in between must
        # never make them look unused.
        (self._folder / _DATA).unlink(missing_ok=True)
        _sync_directory(self._folder)
        handle = os.open(
            self._folder / _JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
        )
        with os.fdopen(handle, "wb") as journal:
            journal.write(_USED.pack(0, (1 << 64) - 1))
            journal.flush()
            os.fsync(journal.fileno())
        os.replace(self._folder / _PARTIAL, self._folder / _DATA)
        _sync_directory(self._folder)

    def discard(self) -> None:
        """Drop what was written."""
        self._file.close()
        (self._folder / _PARTIAL).unlink(missing_ok=True)


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _DATA
    try:
        with open(path, "rb") as file:
            block = file.read(_PAGE)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise MaterialError(
            f"{folder} holds no material ({error.strerror}). Prepare some first."
        ) from None
    damaged = MaterialError(
        f"{path} is damaged or was not written by this version; prepare it again."
    )
    if block[: len(_MAGIC)] != _MAGIC or len(block) < _PAGE:
        raise damaged
    (length,) = _LENGTH.unpack_from(block, len(_MAGIC))
    start = len(_MAGIC) + _LENGTH.size
    text = block[start : start + length]
    if hashlib.sha256(text).digest() != block[start + length : start + length + 32]:
        raise damaged
    header = json.loads(text)
    if header["version"] != 1:
        raise damaged
    expected = _PAGE + header["record"] * header["count"]
    if size != expected:
        raise MaterialError(
            f"{path} has {size:,} bytes, its header promises {expected:,}: it was cut "
            "short. Prepare it again."
        )
    return header


def _next_index(journal: int, folder: Path) -> int:
    data = os.pread(journal, _USED.size, 0)
    if len(data) == _USED.size:
        index, complement = _USED.unpack(data)
        if index ^ complement == (1 << 64) - 1:
            return index
    raise MaterialError(
        f"{folder / _JOURNAL} is damaged, so it is unknown what was used. Delete the "
        "directory and prepare it again."
    )


@contextlib.contextmanager
def _journal(folder: Path) -> Iterator[int]:
    """The journal's descriptor, locked against other processes."""
    try:
        handle = os.open(folder / _JOURNAL, os.O_RDWR)
    except OSError as error:
        raise MaterialError(
            f"{folder} has no record of what was used ({error.strerror}). Prepare the "
            "material again."
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def material_info(directory: str | os.PathLike[str]) -> MaterialInfo:
    """What a directory holds and how much of it is left.

    Raises: MaterialError if it holds none, or it is damaged or cut short.
    """
    folder = Path(directory)
    header = _read_header(folder)
    with _journal(folder) as journal:
        index = _next_index(journal, folder)
    return MaterialInfo(
        header["rank"],
        header["batch"],
        header["count"],
        max(0, header["count"] - index),
        _PAGE + header["record"] * header["count"],
        header["plan"],
        header["model"],
        header["session"],
    )


class MaterialStore:
    """Reads one party's material, each record once.

    Args:
        directory: as written by `MaterialWriter`.
        plan: must be the plan it was made for.
        rank: must be the party it was made for.
        model: rank 0's weights' digest, to be compared if the material has one.

    Raises: MaterialError if it is missing, damaged, cut short, or made for another
        plan, model or party.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        plan: Plan,
        rank: int,
        model: bytes = b"",
    ) -> None:
        self._folder = Path(directory)
        self._header = _read_header(self._folder)
        self._plan = plan
        self.batch: int = self._header["batch"]
        self.count: int = self._header["count"]
        self._first: int = self._header["first"]
        self.session = bytes.fromhex(self._header["session"])
        for what, found, wanted in (
            ("rank", str(self._header["rank"]), str(rank)),
            ("plan", self._header["plan"], plan.digest.hex()),
            ("model", self._header["model"], model.hex()),
        ):
            if found != wanted and not (what == "model" and not (found and wanted)):
                raise MaterialError(
                    f"{self._folder} was made for {what} {found[:16]}, this is {what} "
                    f"{wanted[:16]}. Prepare material for this {what}."
                )
        self._parts = _layout(plan, rank, self.batch)
        if record_bytes(plan, rank, self.batch) != self._header["record"]:
            raise MaterialError(f"{self._folder}: records of an unexpected size.")
        self._rank = rank

    @property
    def next_index(self) -> int:
        """The first index not yet used."""
        with _journal(self._folder) as journal:
            return self._first + _next_index(journal, self._folder)

    @property
    def remaining(self) -> int:
        """Inferences not yet used."""
        return max(0, self._first + self.count - self.next_index)

    def claim(self, *, at_least: int = 0) -> int:
        """Mark the next index as used, on disk, and return it.

        Args:
            at_least: skip to this index if it is further; skipped ones are lost.

        Raises: MaterialError if none is left.
        """
        with _journal(self._folder) as journal:
            index = max(_next_index(journal, self._folder), at_least - self._first)
            if index >= self.count:
                raise MaterialError(
                    f"{self._folder} is exhausted: all {self.count} inferences were "
                    "used. Prepare more."
                )
            used = index + 1
            os.pwrite(journal, _USED.pack(used, used ^ ((1 << 64) - 1)), 0)
            os.fsync(journal)
        return self._first + index

    def load(self, index: int) -> Material:
        """Read a record that `claim` returned.

        Raises: MaterialError if it is not marked as used, or its checksum is wrong.
        """
        record = index - self._first
        if record < 0 or index >= self.next_index:
            raise MaterialError(f"Material {index} was not claimed before use.")
        size = self._header["record"]
        buffer = np.empty(size, dtype=np.uint8)
        with open(self._folder / _DATA, "rb") as file:
            file.seek(_PAGE + record * size)
            if file.readinto(buffer.data) != size:
                raise MaterialError(f"{self._folder} was cut short while in use.")
        content = sum(part.room for part in self._parts)
        (checksum,) = _LENGTH.unpack(buffer[-_LENGTH.size :].tobytes())
        if zlib.crc32(buffer[:content].data) != checksum:
            raise MaterialError(
                f"{self._folder}: record {record} is damaged. Prepare it again."
            )
        segments = len(self._plan.segments)
        empty = np.empty(0, dtype=np.int64)
        material = Material(index, [empty] * segments, [None] * segments, {})
        start = 0
        for part in self._parts:
            data = buffer[start : start + part.size]
            array = data.view(part.dtype).reshape(part.shape)
            start += part.room
            if part.kind == "linear":
                material.linear[part.number] = array
            elif part.kind == "values":
                material.values[part.number] = array
            else:
                material.masks[part.number] = array
        if self._rank == 1:
            seed = bytes.fromhex(self._header["seed"])
            shares = expand(self._plan, seed, index, batch=self.batch)
            material.values = client_values(shares)
            material.masks = shares.masks
        elif self._plan.mode == "shared":
            first = self._plan.sources[0]
            shape = (self.batch, *first.shape)
            material.masks[0] = np.zeros(shape, kernels.ring_dtype(first.ring))
        return material

    def take(self, *, at_least: int = 0) -> Material:
        """Claim the next record, then read it."""
        return self.load(self.claim(at_least=at_least))
