"""Offline material on disk: one folder per party and session, every record used once.

    material.espn            page 0: header; page 1: journal; then records, whole pages
    material.*.partial       what a writer has not finished

1. A writer fills a partial file and renames it once all is on the disk.
2. `take` marks a record as used, forces the mark to the disk, reads the record, checks
   its MAC and erases it. A copy made later, or a thief, finds no mask that was used.
3. `read_ahead` has the next record in memory without marking it: a connection that ends
   without a request costs nothing.

Records are lists of arrays whose layout the caller knows. The MAC of each covers its
content, its index and the header: session, rank, batch, plan, model, corrections. Its
key is drawn for the file and lies in the header: it finds accidents and mix-ups, not an
owner who forges.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MaterialError
from . import journal
from .header import (
    PAGE,
    Header,
    Identity,
    Layout,
    check_corrections,
    record_bytes,
    record_tag,
    room,
)
from .journal import Journal
from .messages import SERVER, Party
from .private_files import erase, locked, named, opened

DATA = "material.espn"


@dataclass(frozen=True)
class Record:
    """One inference's material.

    Args:
        index: which inference.
        arrays: as the layout says; the caller's own.
    """

    index: int
    arrays: list[np.ndarray]

    def __repr__(self) -> str:
        return f"Record(index={self.index}, arrays=<hidden>)"


@dataclass(frozen=True)
class MaterialInfo:
    """What a folder holds, without any secret.

    Args:
        rank: whose it is.
        batch: inputs per inference.
        count, remaining: inferences prepared, and not yet used.
        bytes_on_disk: what the file takes now; used records take nothing.
        plan: the plan's digest, hex.
        model: the weights' digest, hex; empty for a party that does not hold them.
        session: which dealing both parties' material comes from, hex.
        corrections: who received the dealer's.
    """

    rank: int
    batch: int
    count: int
    remaining: int
    bytes_on_disk: int
    plan: str
    model: str
    session: str
    corrections: Party

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: {self.remaining} of {self.count} inferences left, "
            f"batch {self.batch}, {self.bytes_on_disk:,} bytes, plan {self.plan[:16]}, "
            f"session {self.session[:16]}, corrections to the {self.corrections}"
        )


def material_info(directory: str | os.PathLike[str]) -> MaterialInfo:
    """What a folder holds and how much of it is left.

    Raises:
        MaterialError: it holds none, is open to others, damaged or cut short.
    """
    with open_data(Path(directory)) as data:
        identity = data.header.identity
        return MaterialInfo(
            identity.rank,
            identity.batch,
            identity.count,
            identity.indices.stop - data.journal.next_index(),
            os.fstat(data.handle).st_blocks * 512,
            identity.plan.hex(),
            identity.model.hex(),
            identity.session.hex(),
            identity.corrections,
        )


class MaterialStore:
    """Hands out one party's records, each once, to any number of threads and processes.

    Args:
        directory: as written by `MaterialWriter`.
        rank: must be the party it was made for.
        plan: digest of the plan, must be that it was made for.
        layout: gives a record's layout for a batch size.
        model: rank 0's weights' digest, compared if both are known.
        corrections: who must have received the dealer's.

    Raises:
        MaterialError: it is missing, open to others, damaged, cut short, or made for
            another party, plan or model, or with corrections to the other party.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int,
        plan: bytes,
        layout: Callable[[int], Layout],
        model: bytes = b"",
        corrections: Party = SERVER,
    ) -> None:
        self._folder = Path(directory)
        self._lock = threading.Lock()
        self._ahead: Record | None = None
        with open_data(self._folder) as data:
            self._header = header = data.header
            identity = header.identity
            _refuse_another("rank", str(identity.rank), str(rank), self._folder)
            _refuse_another("plan", identity.plan.hex(), plan.hex(), self._folder)
            if identity.model and model:
                _refuse_another(
                    "model", identity.model.hex(), model.hex(), self._folder
                )
            check_corrections(str(self._folder), identity.corrections, corrections)
            self._layout = layout(identity.batch)
            if record_bytes(self._layout) != header.record:
                raise MaterialError(
                    f"{data.path} has records of {header.record:,} bytes; this plan's "
                    f"take {record_bytes(self._layout):,}: prepare material again"
                )
            self._seen = data.journal.next_index()
            # A process may have died between the mark and the erasing.
            erase(data.handle, 2 * PAGE, header.offset(self._seen) - 2 * PAGE)

    @property
    def identity(self) -> Identity:
        """What the material is for."""
        return self._header.identity

    @property
    def next_index(self) -> int:
        """The first index not yet used; the one after the last if all were."""
        with self._open() as (_, index):
            return index

    @property
    def remaining(self) -> int:
        """Inferences not yet used."""
        return self.identity.indices.stop - self.next_index

    def read_ahead(self) -> None:
        """Have the next record in memory, still unused; nothing if none is left.

        Raises:
            MaterialError: it cannot be read, or is damaged.
        """
        with self._open() as (data, index):
            if index in self.identity.indices and (
                self._ahead is None or self._ahead.index != index
            ):
                self._ahead = self._read(data, index)

    def take(self, *, at_least: int = 0) -> Record:
        """Mark the next record as used, on the disk, then read and erase it.

        Args:
            at_least: skip to this index if it is further; skipped ones are erased too.

        Cost: one fsync, which also takes the last record's erasing to the disk.

        Raises:
            MaterialError: none is left (nothing changes), or the record is damaged; a
                damaged one counts as used.
        """
        with self._open() as (data, following):
            index = max(following, at_least)
            if index not in self.identity.indices:
                raise MaterialError(
                    f"{self._folder} has no material for inference {index}: it holds "
                    f"{self.identity.first} to {self.identity.indices.stop - 1}, of "
                    f"which those before {following} were used. Prepare more."
                )
            data.journal.set(index + 1)
            self._seen = index + 1
            ahead, self._ahead = self._ahead, None
            try:
                if ahead is not None and ahead.index == index:
                    return ahead
                return self._read(data, index)
            finally:
                start = self._header.offset(following)
                erase(data.handle, start, self._header.offset(index + 1) - start)

    def compare(self, peer_next: int) -> None:
        """Refuse a folder that was restored from a copy, where the peer's shows it.

        The client marks a record before it asks for it, so the server is never ahead:
        if it is, the client's folder is an older copy, and its records were used. A
        client that is ahead is no fault: the server skips. A server's folder that alone
        was restored skips likewise. When both folders are restored nobody can see it,
        and masks are used twice, which opens first-layer weights: never restore
        material.

        Args:
            peer_next: the peer's `next_index`.

        Raises:
            MaterialError: the client's folder is behind the server's.
        """
        own = self.next_index
        client, server = (own, peer_next) if self.identity.rank else (peer_next, own)
        if client < server:
            whose = str(self._folder) if self.identity.rank else "the client's folder"
            raise MaterialError(
                f"{whose} was restored from a copy: its next inference is {client}, "
                f"but the server has answered those before {server}. Records would be "
                "used twice: delete both folders and prepare material again"
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[OpenData, int]]:
        """The file and its next unused index, locked."""
        with self._lock, open_data(self._folder) as data:
            if data.header != self._header:
                raise MaterialError(
                    f"{self._folder} was prepared again since it was opened: open it "
                    "again"
                )
            index = data.journal.next_index()
            if index < self._seen:
                raise MaterialError(
                    f"{self._folder} was restored from a copy while it was in use: "
                    "delete it and prepare material again"
                )
            yield data, index

    def _read(self, data: OpenData, index: int) -> Record:
        buffer = np.empty(self._header.record, dtype=np.uint8)
        content, mac = buffer[: -journal.TAG_BYTES], buffer[-journal.TAG_BYTES :]
        done = 0
        while done < buffer.size:
            position = self._header.offset(index) + done
            read = os.preadv(data.handle, [buffer[done:].data], position)
            if read == 0:
                raise MaterialError(f"{data.path} was cut short while in use")
            done += read
        if mac.tobytes() != record_tag(self._header, index, [content.data]):
            raise MaterialError(
                f"{data.path}: the record of inference {index} is damaged or belongs "
                "elsewhere; it cannot be used. Prepare material again"
            )
        arrays, start = [], 0
        for shape, dtype in self._layout:
            flat = content[start : start + math.prod(shape) * np.dtype(dtype).itemsize]
            arrays.append(flat.view(dtype).reshape(shape))
            start += room(shape, dtype)
        return Record(index, arrays)


@dataclass(frozen=True)
class OpenData:
    """The data file while its folder is locked."""

    handle: int
    path: Path
    header: Header

    @property
    def journal(self) -> Journal:
        """What was used."""
        return self.header.journal(self.handle, self.path)


@contextlib.contextmanager
def open_data(folder: Path) -> Iterator[OpenData]:
    """The checked data file of a folder, locked.

    Raises:
        MaterialError: there is none, or it cannot be used.
    """
    if not os.path.lexists(folder / DATA):
        raise MaterialError(f"{folder} holds no material. Prepare some first.")
    with locked(folder) as directory, data_in(directory, folder) as data:
        yield data


@contextlib.contextmanager
def data_in(directory: int, folder: Path) -> Iterator[OpenData]:
    """The same in a folder that the caller has locked."""
    path = folder / DATA
    with opened(directory, path) as handle, named(path, doing="use"):
        header = Header.from_page(os.pread(handle, PAGE, 0), path)
        size = os.fstat(handle).st_size
        if size != header.size:
            raise MaterialError(
                f"{path} has {size:,} bytes, its header promises {header.size:,}: it "
                "was cut short or grew. Prepare material again"
            )
        yield OpenData(handle, path, header)


def _refuse_another(what: str, found: str, wanted: str, folder: Path) -> None:
    if found != wanted:
        raise MaterialError(
            f"{folder} was made for {what} {found[:16]}, this is {what} {wanted[:16]}. "
            f"Prepare material for this {what}."
        )
