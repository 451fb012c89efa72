"""A party's prepared inferences, in memory or on disk, each handed out once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import MaterialError
from ..masked.header import Identity, check_corrections
from ..masked.material import (
    ClientMaterial,
    Layout,
    Pairing,
    ServerMaterial,
    client_layout,
    layout_bytes,
    server_layout,
)
from ..masked.messages import Party
from ..masked.plan import Plan
from ..masked.store import DATA, MaterialStore, Record, open_data
from ..masked.store_writer import MaterialWriter
from ..wire.packing import packed_bytes

# How far an inference may be asked for ahead of the next: requests of several
# connections overtake each other.
WINDOW = 64


def layout_of(plan: Plan, party: Party, batch: int, corrections: Party) -> Layout:
    """Shapes and types of the arrays of one inference's material."""
    layout = server_layout if party == "server" else client_layout
    return layout(plan, batch, corrections=corrections)


def material_bytes(plan: Plan, party: Party, batch: int, corrections: Party) -> int:
    """Bytes of one inference's material; nothing is allocated to find out."""
    return layout_bytes(layout_of(plan, party, batch, corrections))


def stored_session(folder: Path, corrections: Party) -> tuple[str | None, int]:
    """Whose unused material a folder holds: the session, and the next index.

    Args:
        corrections: who must have received the dealer's.

    Returns: (None, 0) if there is none.

    Raises:
        MaterialError: there is some, and it cannot be used.
    """
    if not (folder / DATA).exists():
        return None, 0
    with open_data(folder) as data:
        identity, following = data.header.identity, data.journal.next_index()
    if following == identity.indices.stop:
        return None, 0
    check_corrections(str(folder), identity.corrections, corrections)
    return identity.session.hex(), following


T = TypeVar("T", ServerMaterial, ClientMaterial)


class Stock(Generic[T]):
    """One session's material at one party.

    Args:
        kind: the party's material.
        party: which party.
        plan: what the material is for.
        model: digest of the server's weights; empty at the client.
        corrections: who receives the dealer's.
    """

    def __init__(
        self,
        kind: type[T],
        party: Party,
        plan: Plan,
        model: bytes,
        corrections: Party,
    ) -> None:
        self._kind: type[T] = kind
        self._party, self._plan, self._model = party, plan, model
        self._corrections: Party = corrections
        self._session = bytes(16)
        self._store: MaterialStore | None = None
        self._ready: dict[int, T] = {}
        self._promised = 0
        self._floor = 0
        self._lock = threading.Lock()

    def open(self, folder: Path, *, session: str, floor: int = 0) -> None:
        """Hand out what a folder holds.

        Args:
            folder: of a writer's.
            session: whose material it must be, in hex.
            floor: the first index that may still be used.

        Raises:
            MaterialError: it is missing, damaged, or of another session, plan, model
                or party, or its corrections went to the other one.
        """
        rank = 0 if self._party == "server" else 1
        store = MaterialStore(
            folder,
            rank=rank,
            plan=self._plan.digest,
            layout=self._layout,
            model=self._model,
            corrections=self._corrections,
        )
        if store.identity.session.hex() != session:
            raise MaterialError(
                f"{folder} holds another session's material than the one it is asked "
                "for. Prepare material together again."
            )
        self._store = store
        self._session, self._floor = bytes.fromhex(session), floor

    def compare(self, peer_next: int) -> None:
        """Refuse stored material that was restored from a copy, where it shows.

        Raises:
            MaterialError: as `MaterialStore.compare`.
        """
        if self._store is not None:
            self._store.compare(peer_next)

    @property
    def remaining(self) -> int:
        """Inferences that were not used."""
        stored = 0 if self._store is None else self._store.remaining
        return stored + len(self._ready)

    @property
    def next_index(self) -> int:
        """The first index not yet used of what is stored; 0 in memory."""
        return 0 if self._store is None else self._store.next_index

    @property
    def next_batch(self) -> int | None:
        """Inputs that the next inference is for; None if none is left."""
        with self._lock:
            if self._ready:
                return self._ready[min(self._ready)].pairing.batch
            if self._store is None or not self._store.remaining:
                return None
            return self._store.identity.batch

    @property
    def input_sizes(self) -> Container[int]:
        """Bytes that a client's input may take, at the moment they are looked at."""
        return _InputSizes(self.takes_input)

    def takes_input(self, size: int) -> bool:
        """Whether some of the material is for inputs of so many bytes on the wire."""
        with self._lock:
            batches = {m.pairing.batch for m in self._ready.values()}
        if self._store is not None:
            batches.add(self._store.identity.batch)
        first = self._plan.sources[0]
        return any(
            size == packed_bytes(batch * first.elements, first.ring)
            for batch in batches
        )

    @property
    def held(self) -> int:
        """Bytes in memory, or promised to be."""
        return self._promised

    @contextmanager
    def adding(
        self, pairing: Pairing, *, count: int, folder: Path | None
    ) -> Iterator[_Adding[T]]:
        """Take in new material, all of it or none.

        Args:
            pairing: session, first index and batch; corrections as this stock's.
            count: inferences.
            folder: where to keep them; None for memory.

        Raises:
            MaterialError: the folder holds unused material, another process prepares
                into it, or the disk is full or cannot be written.
        """
        if folder is None:
            size = count * self.bytes_of(pairing.batch)
            with self._lock:
                self._promised += size
            adding = _Adding[T](None)
            try:
                yield adding
            except BaseException:
                with self._lock:
                    self._promised -= size
                raise
            with self._lock:
                self._ready |= adding.made
            return
        identity = Identity(
            session=pairing.session,
            rank=0 if self._party == "server" else 1,
            batch=pairing.batch,
            count=count,
            first=pairing.index,
            plan=self._plan.digest,
            model=self._model,
            corrections=self._corrections,
        )
        layout = self._layout(pairing.batch)
        with MaterialWriter(folder, identity=identity, layout=layout) as writer:
            yield _Adding(writer)
        self.open(folder, session=pairing.session.hex(), floor=pairing.index)

    def read_ahead(self) -> None:
        """Have the next stored material in memory, still unused.

        What cannot be read is left to whoever takes it: that uses it up, so that the
        session goes on behind it.
        """
        if self._store is not None:
            with suppress(MaterialError):
                self._store.read_ahead()

    def batch_of(self, index: int) -> int:
        """Inputs in inference `index`, which is not used by asking.

        Raises:
            MaterialError: it was used, or never prepared.
        """
        with self._lock:
            found, store = self._ready.get(index), self._store
            if found is not None:
                return found.pairing.batch
        if store is None or index not in store.identity.indices:
            raise self._unused(index)
        return store.identity.batch

    def take(self, index: int) -> T:
        """The material of inference `index`; it counts as used from now on.

        Raises:
            MaterialError: it was used, or never prepared, or others come before it.
        """
        with self._lock:
            found = self._ready.pop(index, None)
            if found is None and self._store is not None:
                return self._claim(self._store, index)
            if found is not None:
                self._promised -= self._size(found)
        if found is None:
            raise self._unused(index)
        return found

    def take_next(self, *, batch: int) -> T:
        """The next material, if it is for inputs of this batch.

        Raises:
            MaterialError: none is left, or it is for another batch; nothing changes.
        """
        with self._lock:
            if self._ready:
                index = min(self._ready)
                self._check_batch(self._ready[index].pairing.batch, batch)
                found = self._ready.pop(index)
                self._promised -= self._size(found)
                return found
            if self._store is None:
                raise MaterialError("No material is left; prepare some.")
            self._check_batch(self._store.identity.batch, batch)
            return self._material(self._store, self._store.take())

    def _claim(self, store: MaterialStore, index: int) -> T:
        following = max(store.next_index, self._floor)
        if index < following or index not in store.identity.indices:
            raise self._unused(index)
        if index - following >= WINDOW:
            raise MaterialError(
                f"Inference {index} was asked for and {following} is next; at most "
                f"{WINDOW} may be under way at once."
            )
        while True:
            record = store.take(at_least=self._floor)
            material = self._material(store, record)
            if record.index >= index:
                return material
            self._promised += self._size(material)
            self._ready[record.index] = material

    def _unused(self, index: int) -> MaterialError:
        return MaterialError(
            f"Inference {index} has no unused material at the {self._party}; "
            "nothing was sent."
        )

    def _material(self, store: MaterialStore, record: Record) -> T:
        batch, to = store.identity.batch, self._corrections
        pairing = Pairing(self._session, record.index, batch, to)
        return self._kind.from_arrays(self._plan, pairing, record.arrays)

    def bytes_of(self, batch: int) -> int:
        """What one inference of so many inputs takes."""
        return material_bytes(self._plan, self._party, batch, self._corrections)

    def _layout(self, batch: int) -> Layout:
        return layout_of(self._plan, self._party, batch, self._corrections)

    def _size(self, material: T) -> int:
        return self.bytes_of(material.pairing.batch)

    @staticmethod
    def _check_batch(prepared: int, given: int) -> None:
        if prepared != given:
            raise MaterialError(
                f"The next material is for batches of {prepared}, the input has "
                f"{given}. Split or pad the input, or prepare for {given}."
            )


class _InputSizes:
    def __init__(self, takes: Callable[[int], bool]) -> None:
        self._takes = takes

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self._takes(size)


class _Adding(Generic[T]):
    """Where new material goes until all of it is there."""

    def __init__(self, writer: MaterialWriter | None) -> None:
        self._writer = writer
        self.made: dict[int, T] = {}

    def add(self, material: T) -> None:
        """Take in the next material."""
        index = material.pairing.index
        if self._writer is None:
            self.made[index] = material
        else:
            self._writer.add(index, material.arrays())
