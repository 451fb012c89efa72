"""Connected channels that are closed when the test ends."""

from __future__ import annotations

import pytest

from crypten_espn.compiled import heat
from crypten_espn.wire.channel import Channel, socket_pair


@pytest.fixture(scope="session", autouse=True)
def _kernels():
    """Nothing is compiled while a peer waits."""
    heat()


@pytest.fixture
def pair():
    """Make connected channels: the server's end, then the client's."""
    made: list[Channel] = []

    def make(timeout):
        made.extend(socket_pair(timeout=timeout))
        return made[-2:]

    yield make
    for channel in made:
        channel.close()
