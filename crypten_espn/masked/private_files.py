"""Folders and files that hold secrets: their owner's only, locked, and erased at last.

Every operating system error becomes a MaterialError that names the path, but where a
function says that it raises OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import MaterialError

_ZEROS = bytes(1 << 20)

# From linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def named(path: Path, *, doing: str, hint: str = "") -> Iterator[None]:
    """Turn an OSError into a MaterialError that names the path.

    Args:
        path: what was worked on.
        doing: what could not be done, as "read".
        hint: how to fix it, a sentence.
    """
    try:
        yield
    except OSError as error:
        why = (
            "it is a symbolic link, and the files themselves are needed"
            if error.errno == errno.ELOOP
            else error.strerror
        )
        raise MaterialError(f"cannot {doing} {path}: {why}. {hint}".strip()) from None


@contextlib.contextmanager
def locked(path: Path, *, make: bool = False) -> Iterator[int]:
    """A private folder's descriptor; others that ask for it wait, threads as well.

    The lock belongs to a descriptor opened here, so a forked child shares none.

    Args:
        path: the folder.
        make: make it, for its owner only, if it is missing.

    Raises:
        MaterialError: it is missing, a link, or open to other users.
    """
    with named(path, doing="use"):
        if path.is_symlink():
            raise MaterialError(
                f"{path} is a symbolic link; name the folder that it leads to"
            )
        if make:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _refuse_others(handle, path, allowed=0o700)
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)


@contextlib.contextmanager
def opened(folder: int, path: Path) -> Iterator[int]:
    """A private file's descriptor, to read and write.

    Args:
        folder: descriptor of the folder it lies in.
        path: folder and name; the name is used, the rest is for messages.

    Raises:
        MaterialError: it cannot be opened, is a link, or open to other users.
    """
    with named(path, doing="open"):
        handle = os.open(path.name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise MaterialError(f"{path} is not a file")
        _refuse_others(handle, path, allowed=0o600)
        yield handle
    finally:
        os.close(handle)


def create(folder: int, name: str) -> int:
    """The descriptor of a new file that only its owner can read.

    Raises:
        OSError: it exists, as a link too, or cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.open(name, flags, 0o600, dir_fd=folder)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that only its owner can read, or replace it in one step.

    It is on the disk when this returns; a reader sees the old one or the new.

    Args:
        path: in a folder that is there.
        chunks: the content.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    # Made with mode 0600.
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_in_use(folder: int, name: str) -> bool:
    """Whether a live process holds the lock of a file, which it keeps while it writes.

    Raises:
        OSError: the file cannot be opened.
    """
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def erase(handle: int, start: int, count: int) -> None:
    """Take bytes off the disk; they read as zeros afterwards.

    A hole is punched where the file system can, so the blocks are given back; zeros are
    written elsewhere. What a drive, a snapshot or a copying file system keeps of the
    old blocks is out of reach: only an encrypted disk helps there. The change reaches
    the disk with the file's next fsync.

    Args:
        handle: a file open for writing.
        start, count: the bytes; whole pages free their blocks.

    Raises:
        OSError: the file cannot be written.
    """
    if count == 0 or _punch(handle, start, count):
        return
    end = start + count
    for position in range(start, end, len(_ZEROS)):
        os.pwrite(handle, _ZEROS[: end - position], position)


def _punch(handle: int, start: int, count: int) -> bool:
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(handle, _KEEP_SIZE | _PUNCH_HOLE, start, count) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_HOLES:
        return False
    raise OSError(code, os.strerror(code))


def _refuse_others(handle: int, path: Path, *, allowed: int) -> None:
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    if mode & 0o077:
        raise MaterialError(
            f"{path} has mode {mode:04o}, open to other users; it holds secret masks: "
            f"chmod {allowed:o} it if nobody read it, or prepare material elsewhere"
        )
