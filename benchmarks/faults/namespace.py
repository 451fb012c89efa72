"""A network namespace for the clients, and the link to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

HERE, THERE = "10.213.77.1", "10.213.77.2"


class Link:
    """A pair of virtual interfaces, one of them in a namespace."""

    def __init__(self, number: int) -> None:
        self.name = f"espn{number}"
        self._near, self._far = f"ve{number}a", f"ve{number}b"

    @property
    def command(self) -> list[str]:
        """What to put before a command that is to live there."""
        return ["ip", "netns", "exec", self.name]

    def make(self) -> None:
        _ip("netns", "add", self.name)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far)
        _ip("link", "set", self._far, "netns", self.name)
        _ip("addr", "add", f"{HERE}/24", "dev", self._near)
        _ip("link", "set", self._near, "up")
        _ip("-n", self.name, "addr", "add", f"{THERE}/24", "dev", self._far)
        _ip("-n", self.name, "link", "set", self._far, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")

    def set(self, state: str) -> None:
        """Take the link "down", or "up" again."""
        _ip("link", "set", self._near, state)

    def remove(self) -> None:
        for words in (("link", "del", self._near), ("netns", "del", self.name)):
            subprocess.run(["ip", *words], capture_output=True, check=False)


@contextlib.contextmanager
def namespace() -> Iterator[Link]:
    """Raises: PermissionError, with what is missing, where it cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise PermissionError("namespaces need root, and ip of iproute2")
    link = Link(os.getpid() % 100_000)
    try:
        link.make()
        yield link
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode().strip()
        raise PermissionError(f"a namespace cannot be made here: {words}") from None
    finally:
        link.remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=True)
