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

from collections.abc import Iterator
from contextlib import suppress

from ..errors import EspnError, MaterialError, PeerError
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


def reach(address: str, link: Link, *, role: Party, peer_role: str) -> Channel:
    """A new connection to another party."""
    return connect_channel(
        address,
        role=role,
        peer_role=peer_role,
        timeout=link.timeout,
        tls=link.tls,
        insecure=link.insecure,
    )


def _join(link: Link, party: Party, session: str, plan: Plan) -> Channel:
    if link.dealer is None:
        raise MaterialError(
            f"No material is left and no dealer is known to the {party}; give dealer=."
        )
    channel = reach(link.dealer, link, role=party, peer_role="dealer")
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
        link: how to reach the dealer.
        session: the name the client drew.
        plan, weights: the model.
        client: the connection to the client.

    Attributes:
        channel: to the dealer.

    Raises:
        MaterialError: no dealer is known.
        PeerError: the dealer cannot be reached or refuses, or the client is not there.
    """

    def __init__(
        self, link: Link, session: str, plan: Plan, weights: Weights, client: Channel
    ) -> None:
        self.session = session
        self.channel = _join(link, "server", session, plan)
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
    """The client's side of one session at the dealer.

    Args:
        link: how to reach the dealer.
        session: a name drawn for it.
        plan: the server's.

    Attributes:
        channel: to the dealer.

    Raises:
        MaterialError: no dealer is known.
        PeerError: the dealer cannot be reached or refuses.
    """

    def __init__(self, link: Link, session: str, plan: Plan) -> None:
        self.session = session
        self._plan = plan
        self._preparation: ClientPreparation | None = None
        self.channel = _join(link, "client", session, plan)
        with telling(self.channel):
            hear(self.channel, Joined)

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
