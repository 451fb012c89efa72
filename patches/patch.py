"""What a patch is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Patch:
    """One incompatibility of CrypTen or torch, and its cure.

    Args:
        name: how the patch is named in `applied()` and by the doctor.
        broke: what fails without it.
        seen_on: the versions it was seen on.
        delete_when: what has to change before this file can be deleted.
        probe: True when the feature is broken here; looks at the feature, not at a
            version, and leaves everything as it was.
        install: applies the cure and returns a function that takes it back.
    """

    name: str
    broke: str
    seen_on: str
    delete_when: str
    probe: Callable[[], bool]
    install: Callable[[], Callable[[], None]]
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def applied(self) -> bool:
        return self._undo is not None

    def apply(self) -> None:
        """Install the cure if it is needed and not installed yet."""
        if self._undo is None and self.probe():
            self._undo = self.install()

    def revert(self) -> None:
        """Take the cure back; nothing happens if it is not installed."""
        if self._undo is not None:
            self._undo()
            self._undo = None


def replace(owner: object, name: str, value: object) -> Callable[[], None]:
    """Set owner.name to value and return the function that restores what was there."""
    before = vars(owner)[name]

    def undo() -> None:
        setattr(owner, name, before)

    setattr(owner, name, value)
    return undo


def together(*undos: Callable[[], None]) -> Callable[[], None]:
    """Several undo functions as one, run last first."""

    def undo() -> None:
        for step in reversed(undos):
            step()

    return undo
