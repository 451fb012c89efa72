"""Files that are read again when they change."""

from __future__ import annotations

import os
from collections.abc import Sequence

Path = str | os.PathLike[str]
Stamp = tuple[tuple[int, int, int] | None, ...]


def stamp(paths: Sequence[Path]) -> Stamp:
    """What changes when one of these files is written or replaced.

    None stands for a file that cannot be looked at.
    """
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
