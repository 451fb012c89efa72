"""What the path starts as processes of their own, without the site's packages."""

from __future__ import annotations

from collections.abc import Sequence

from .forwarder import forwarder_main
from .probe import probe_main
from .system import enter_main


def main(given: Sequence[str]) -> int:
    """Do one job, as `system.worker` asks for it; its exit status."""
    job, arguments = given[0], list(given[1:])
    if job == "forwarder":
        parties, mbit, idle_restart = arguments
        return forwarder_main(int(parties), float(mbit), idle_restart)
    if job == "enter":
        parent, user, network, *command = arguments
        return enter_main(int(parent), user, network, command)
    role, address, port, amount = arguments
    return probe_main(role, address, int(port), float(amount))
