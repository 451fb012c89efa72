"""Writing a folder of offline material, and removing one that is used up."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from ..errors import MaterialError
from . import journal
from .header import (
    PAGE,
    Header,
    Identity,
    Layout,
    record_bytes,
    record_tag,
    room,
)
from .private_files import create, is_in_use, locked, named
from .store import DATA, data_in

_PREFIX, _SUFFIX = "material.", ".partial"


class MaterialWriter:
    """Writes one party's material; nothing is valid before `close`.

    As a context manager it closes at the end and discards after an exception.

    Args:
        directory: made if missing, for its owner only.
        identity: what the material is for.
        layout: shape and type of each array of a record.

    Raises:
        MaterialError: the folder holds unused material, another writer is at work in
            it, it is open to other users, or the disk has no room.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        identity: Identity,
        layout: Layout,
    ) -> None:
        self._folder = Path(directory)
        self._layout = tuple((shape, np.dtype(dtype)) for shape, dtype in layout)
        header = Header(
            identity=identity,
            record=record_bytes(self._layout),
            key=secrets.token_bytes(journal.KEY_BYTES),
        )
        try:
            self._header = Header.from_text(header.text)
        except (msgspec.ValidationError, OverflowError) as error:
            raise MaterialError(f"no material can be kept for this: {error}") from None
        self._name = f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        self._next = identity.first
        with locked(self._folder, make=True) as directory_handle:
            _refuse_unused(directory_handle, self._folder)
            _remove_partials(directory_handle, self._folder)
            with self._space():
                handle = create(directory_handle, self._name)
            self._file = os.fdopen(handle, "wb")
            fcntl.flock(handle, fcntl.LOCK_EX)
        with self._removed_on_error(), self._space():
            _reserve(handle, self._header.size)
            first_entry = self._header.journal(handle, self._path).entry(self._next)
            self._file.write(self._header.page() + first_entry.ljust(PAGE, b"\0"))

    def __enter__(self) -> MaterialWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @property
    def _path(self) -> Path:
        return self._folder / self._name

    def add(self, index: int, arrays: Sequence[np.ndarray]) -> None:
        """Append a record.

        Args:
            index: one more than the last, `identity.first` at the start.
            arrays: as the layout says.

        Raises:
            MaterialError: another index or array was expected, or the disk is full; the
                partial file is gone then.
        """
        with self._removed_on_error():
            if index != self._next or index not in self._header.identity.indices:
                raise MaterialError(
                    f"material {index} came where {self._next} was expected, of "
                    f"{self._header.identity.count}"
                )
            found = [(array.shape, array.dtype) for array in arrays]
            if found != list(self._layout):
                raise MaterialError(
                    f"material {index} has arrays {found}; expected are "
                    f"{list(self._layout)}"
                )
            parts: list[bytes | memoryview] = []
            for array, (shape, dtype) in zip(arrays, self._layout, strict=True):
                if array.size:
                    parts.append(np.ascontiguousarray(array).data.cast("B"))
                parts.append(bytes(room(shape, dtype) - array.nbytes))
            written = sum(len(part) for part in parts)
            parts.append(bytes(self._header.record - written - journal.TAG_BYTES))
            with self._space():
                for part in (*parts, record_tag(self._header, index, parts)):
                    self._file.write(part)
            self._next += 1

    def close(self) -> None:
        """Force everything to the disk and make it valid.

        Raises:
            MaterialError: fewer inferences were added than announced, or the disk
                refused them; none is kept then.
        """
        with self._removed_on_error(), self._space():
            count, added = self._header.identity.count, self._next
            if added != self._header.identity.indices.stop:
                added -= self._header.identity.first
                raise MaterialError(
                    f"{added} of {count} inferences were prepared; none kept"
                )
            self._file.flush()
            os.fsync(self._file.fileno())
            with locked(self._folder) as directory:
                # Replaces what was used up, journal and records at once.
                os.replace(self._name, DATA, src_dir_fd=directory, dst_dir_fd=directory)
                os.fsync(directory)
            self._file.close()

    def discard(self) -> None:
        """Drop what was written."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    @contextlib.contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise

    def _space(self) -> contextlib.AbstractContextManager[None]:
        return named(
            self._folder,
            doing="write material to",
            hint=f"It needs {self._header.size:,} bytes; nothing was kept.",
        )


def remove_used_up(directory: str | os.PathLike[str]) -> None:
    """Remove the folder of a session that has ended: every record is used.

    Raises:
        MaterialError: some are left, a writer is at work, or other files lie there.
    """
    folder = Path(directory)
    with locked(folder) as handle:
        _refuse_unused(handle, folder)
        _remove_partials(handle, folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(DATA, dir_fd=handle)
        with named(folder, doing="remove"):
            folder.rmdir()


def _refuse_unused(directory: int, folder: Path) -> None:
    if DATA not in os.listdir(directory):
        return
    with data_in(directory, folder) as data:
        left = data.header.identity.indices.stop - data.journal.next_index()
    if left:
        raise MaterialError(
            f"{folder} still holds material for {left} inferences; use it up, delete "
            "it, or name another folder"
        )


def _remove_partials(directory: int, folder: Path) -> None:
    """Clean up after writers that died; refuse if one is alive."""
    for name in os.listdir(directory):
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            continue
        if is_in_use(directory, name):
            raise MaterialError(
                f"material is being prepared into {folder} already; wait for its end, "
                "or name another folder"
            )
        os.unlink(name, dir_fd=directory)


def _reserve(handle: int, size: int) -> None:
    """Find out now whether the disk has room, not after minutes of preparation."""
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is None:
        return
    try:
        reserve(handle, 0, size)
    except OSError as error:
        # Some file systems cannot; writing will tell.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
