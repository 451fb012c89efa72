"""Machine code from Python functions, for loops that no library call expresses.

A kernel is compiled at its first call with a type, which takes seconds: too long inside
a protocol's time-out. So each module of kernels says with `heats` how to call all of
them once, on a few elements, and whoever serves or connects calls `heat` first.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from numba import njit
from numba.core.dispatcher import Dispatcher

F = TypeVar("F", bound=Callable[..., object])

_kernels: list[Dispatcher] = []
_heaters: list[Callable[[], None]] = []
_lock = threading.Lock()


def compiled(function: F) -> F:
    """Compile with an on-disk cache where one can be written, without it elsewhere.

    Additions may be reordered, so that sums use vectors; NaN and infinity keep their
    meaning. What is cached is used until any module beside the kernel's own changes.
    """
    options = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract"},
    }
    try:
        kernel = njit(cache=True, **options)(function)
        # A kernel has others inlined, and numba looks at its own file alone: after a
        # change to theirs it would go on with what they were.
        cached = kernel._cache._cache_file
        cached._source_stamp = _stamp(Path(function.__code__.co_filename).parent)
    except RuntimeError:  # numba: no writable place for the cache
        kernel = njit(**options)(function)
    _kernels.append(kernel)
    return cast(F, kernel)


@cache
def _stamp(folder: Path) -> str:
    """A digest of a folder's modules."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def heats(calls: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a function that calls a module's kernels with all their types."""
    _heaters.append(calls)
    return calls


def heat() -> None:
    """Compile what the imported modules registered; later calls return at once.

    Cost: a minute on a new machine, a second once numba's cache is filled.
    """
    with _lock:
        while _heaters:
            _heaters[-1]()
            _heaters.pop()


def variants(module: str) -> dict[str, list[str]]:
    """The types each kernel of a module is compiled for by now."""
    return {
        kernel.py_func.__name__: [str(types) for types in kernel.signatures]
        for kernel in _kernels
        if kernel.py_func.__module__ == module
    }
