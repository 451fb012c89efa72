"""Machine code from Python functions, for loops that no library call expresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with an on-disk cache where one can be written, without it elsewhere.

    Additions may be reordered, so that sums use vectors; NaN and infinity keep their
    meaning.
    """
    options = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract"},
    }
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba: no writable place for the cache
        return njit(**options)(function)
