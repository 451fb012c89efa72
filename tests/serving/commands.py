"""Commands that listen, as processes of their own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def running(words: Sequence[str]) -> Iterator[str]:
    """A command's process, from the line that names its address until it is ended.

    Args:
        words: behind "crypten-espn".

    Yields: "host:port", where it listens.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "crypten_espn.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        said = None
        for line in process.stdout:
            said = re.search(r"(?:listening|dealing) on (?:http://)?(\S+:\d+);", line)
            if said:
                break
        assert said, f"{words} ended without listening"
        yield said[1]
    finally:
        process.terminate()
        out, _ = process.communicate()
    assert process.returncode == 0 and "stopped" in out
