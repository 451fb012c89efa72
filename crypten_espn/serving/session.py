"""What a server holds for one client, and whose it is on the disk."""

from __future__ import annotations

import threading
from pathlib import Path

from ..bundle import Bundle
from ..masked.material import ServerMaterial
from ..masked.messages import Party
from .boundary import session_tag
from .preparing import ServerDealing
from .stock import Stock

# Beside a session's material: the name in the certificate its client showed.
OWNER = "client.name"


class Session:
    """What the server holds for one client, over all of its connections.

    Attributes:
        bundle: what it is served, to its end.
        name: as both parties and the dealer call it; empty before anything is prepared.
        owner: the name in the client's certificate; empty without TLS.
        corrections: who receives the dealer's.
        users: its connections.
    """

    def __init__(self, bundle: Bundle, owner: str, corrections: Party) -> None:
        model = bundle.model
        self.bundle = bundle
        self.name = ""
        self.owner, self.corrections = owner, corrections
        self.users = 0
        self.stock = Stock(
            ServerMaterial, "server", model.plan, model.weights.digest, corrections
        )
        self.dealing: ServerDealing | None = None
        self.following = 0
        self.preparing = threading.Lock()

    @property
    def tag(self) -> str:
        """What the log calls it; empty before anything is prepared."""
        return session_tag(self.name) if self.name else ""

    def begin(self, name: str) -> None:
        """Go by another name; the dealing before is used up, and was closed."""
        self.name, self.dealing, self.following = name, None, 0

    def close(self) -> None:
        """Leave the dealer."""
        if self.dealing is not None:
            self.dealing.close()


def read_owner(folder: Path) -> str:
    """The name in the certificate whose session this is; empty without TLS."""
    try:
        return (folder / OWNER).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def write_owner(folder: Path, owner: str) -> None:
    """Keep it beside the material."""
    if owner:
        (folder / OWNER).write_text(owner, encoding="utf-8")
