"""How server and client prepare inferences with the dealer.

1. The client joins at the dealer under a session's name that it has just drawn.
2. It tells the server this name and what it wants prepared.
3. The server joins under the same name, which pairs the two, and sends the plan.
4. The dealer checks the plan and gives each its seed, and the digest of the certificate
   that the other one showed: each compares it with the one it talks to.
5. The server sends its weights under a mask, once a session, and says when it is ready.
6. For each inference the dealer sends the server its part, the client sends its half of
   every opening.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from ..errors import EspnError, PeerError
from ..masked.drivers import over
from ..masked.material import ClientMaterial, Pairing, ServerMaterial
from ..masked.plan import Plan
from ..masked.preparing import ClientPreparation, ServerPreparation
from ..masked.weights import Weights
from ..wire.channel import Channel
from ..wire.connect import connect_channel
from .boundary import telling
from .link import Link
from .messages import (
    GREETING,
    Goodbye,
    Join,
    Joined,
    Order,
    Paired,
    Party,
    Seed,
    hear,
    send_plan,
    tell,
)


def reach(
    address: str, link: Link, *, role: Party, peer_role: str, again: bool = True
) -> Channel:
    """A new connection to another party.

    Args:
        again: try again while nothing listens there.
    """
    return connect_channel(
        address,
        role=role,
        peer_role=peer_role,
        timeout=link.timeout,
        tls=link.tls,
        insecure=link.insecure,
        again=again,
    )


def _join(
    address: str,
    link: Link,
    party: Party,
    session: str,
    plan: Plan,
    *,
    again: bool = True,
) -> Channel:
    channel = reach(address, link, role=party, peer_role="dealer", again=again)
    with telling(channel):
        channel.handshake(digest=GREETING)
        tell(channel, Join(session=session, digest=plan.digest.hex()))
    return channel


def _seed(dealer: Channel, partner: Channel) -> bytes:
    """This party's seed, if the dealer has paired it with the party it talks to."""
    seed = hear(dealer, Seed)
    if seed.partner != partner.fingerprint:
        raise PeerError(
            f"The dealer paired this session with another certificate than that of "
            f"{partner.peer}. Nothing was sent; prepare again."
        )
    return bytes.fromhex(seed.seed)


class ServerDealing:
    """The server's side of one session at the dealer.

    Args:
        dealer: its address.
        link: how to reach it.
        session: the name the client drew.
        plan, weights: the model.
        client: the connection to the client.

    Attributes:
        channel: to the dealer.

    Raises:
        PeerError: the dealer cannot be reached or refuses, or the client is not there.
    """

    def __init__(
        self,
        dealer: str,
        link: Link,
        session: str,
        plan: Plan,
        weights: Weights,
        client: Channel,
    ) -> None:
        self.session = session
        self.channel = _join(dealer, link, "server", session, plan)
        with telling(self.channel):
            hear(self.channel, Paired)
            send_plan(self.channel, plan)
            seed = _seed(self.channel, client)
            self._preparation = ServerPreparation(plan, weights, seed)

    def open_weights(self, client: Channel) -> None:
        """Send the client the weights under a mask, once a session."""
        over(self._preparation.open_weights(), {"client": client})

    def prepare(
        self, client: Channel, *, start: int, count: int, batch: int
    ) -> Iterator[ServerMaterial]:
        """Order `count` inferences and make their material, one after the other."""
        channels = {"client": client, "dealer": self.channel}
        tell(self.channel, Order(start=start, count=count, batch=batch))
        for pairing in _pairings(self.session, start, count, batch):
            part = self._preparation.prepare(pairing)
            yield over(part, channels, tag=pairing.index)

    def close(self) -> None:
        """Leave the dealer."""
        with suppress(EspnError):
            tell(self.channel, Goodbye())
        self.channel.close()


class ClientDealing:
    """The client's side of one session at the first dealer that lets it in.

    Args:
        dealers: what the server calls each, and its address; see `dealers.trusted`.
        link: how to reach it.
        session: a name drawn for it.
        plan: the server's.

    Attributes:
        channel: to the dealer.
        dealer: what the server calls it.

    Raises:
        PeerError: no dealer can be reached within the time-out, or each refuses.
    """

    def __init__(
        self,
        dealers: Sequence[tuple[str, str]],
        link: Link,
        session: str,
        plan: Plan,
    ) -> None:
        self.session = session
        self._plan = plan
        self._preparation: ClientPreparation | None = None
        self.dealer, self.channel = self._first(dealers, link)
        self.channel.timeout = link.timeout

    def _first(
        self, dealers: Sequence[tuple[str, str]], link: Link
    ) -> tuple[str, Channel]:
        end, failures = time.monotonic() + link.timeout, []
        for left, (called, address) in zip(
            range(len(dealers), 0, -1), dealers, strict=True
        ):
            # One that holds still takes its share of the time, one that is gone none.
            share = replace(link, timeout=max(0.1, (end - time.monotonic()) / left))
            try:
                channel = _join(
                    address, share, "client", self.session, self._plan, again=left == 1
                )
                with telling(channel):
                    hear(channel, Joined)
                return called, channel
            except PeerError as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        raise PeerError(f"No dealer was found. {' '.join(map(str, failures))}")

    def begin(self, server: Channel) -> None:
        """Take the seed, and from the server its weights under a mask."""
        seed = _seed(self.channel, server)
        self._preparation = ClientPreparation(self._plan, seed)
        over(self._preparation.open_weights(), {"server": server})

    def prepare(
        self, server: Channel, *, start: int, count: int, batch: int
    ) -> Iterator[ClientMaterial]:
        """Make the material of `count` inferences, one after the other."""
        assert self._preparation is not None, "begin() comes first"
        for pairing in _pairings(self.session, start, count, batch):
            part = self._preparation.prepare(pairing)
            yield over(part, {"server": server}, tag=pairing.index)

    def close(self) -> None:
        """Leave the dealer."""
        self.channel.close()


def _pairings(session: str, start: int, count: int, batch: int) -> Iterator[Pairing]:
    name = bytes.fromhex(session)
    for index in range(start, start + count):
        yield Pairing(name, index, batch)
