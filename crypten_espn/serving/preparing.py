"""How server and client prepare inferences with the dealer.

1. The client joins at the dealer under a session's name that it has just drawn, and
   says who is to receive the corrections.
2. It tells the server this name and what it wants prepared.
3. The server joins under the same name and with the same receiver, which pairs the two,
   and sends the plan.
4. The dealer checks the plan and gives each its seed, and the digest of the certificate
   that the other one showed: each compares it with the one it talks to.
5. The server sends its weights under a mask, once a session, and says when it is ready.
6. For each inference the dealer sends that party the corrections, and the client sends
   the server its half of every opening.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from ..errors import EspnError, PeerError
from ..masked.drivers import over
from ..masked.material import ClientMaterial, Pairing, ServerMaterial
from ..masked.messages import Party
from ..masked.model import MaskedModel
from ..masked.plan import Plan
from ..masked.preparing import ClientPreparation, ServerPreparation
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
    join: Join,
    *,
    again: bool = True,
) -> Channel:
    channel = reach(address, link, role=party, peer_role="dealer", again=again)
    with telling(channel):
        channel.handshake(digest=GREETING)
        tell(channel, join)
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
        model: what is served.
        client: the connection to the client.
        corrections: who receives the dealer's.

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
        model: MaskedModel,
        client: Channel,
        corrections: Party,
    ) -> None:
        self.session, self._corrections = session, corrections
        plan = model.plan
        join = Join(session, plan.digest.hex(), corrections)
        self.channel = _join(dealer, link, "server", join)
        with telling(self.channel):
            hear(self.channel, Paired)
            send_plan(self.channel, plan)
            seed = _seed(self.channel, client)
            self._preparation = ServerPreparation(plan, model.weights, seed)

    def open_weights(self, client: Channel) -> None:
        """Send the client the weights under a mask, once a session."""
        over(self._preparation.open_weights(), {"client": client})

    def prepare(
        self, client: Channel, *, start: int, count: int, batch: int
    ) -> Iterator[ServerMaterial]:
        """Order `count` inferences and make their material, one after the other."""
        channels = {"client": client, "dealer": self.channel}
        tell(self.channel, Order(start=start, count=count, batch=batch))
        first = Pairing(bytes.fromhex(self.session), start, batch, self._corrections)
        for pairing in _following(first, count):
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
        corrections: who receives the dealer's.

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
        corrections: Party,
    ) -> None:
        self.session, self._corrections = session, corrections
        self._plan = plan
        self._preparation: ClientPreparation | None = None
        self.dealer, self.channel = self._first(dealers, link)
        self.channel.timeout = link.timeout

    def _first(
        self, dealers: Sequence[tuple[str, str]], link: Link
    ) -> tuple[str, Channel]:
        end, failures = time.monotonic() + link.timeout, []
        join = Join(self.session, self._plan.digest.hex(), self._corrections)
        for left, (called, address) in zip(
            range(len(dealers), 0, -1), dealers, strict=True
        ):
            # One that holds still takes its share of the time, one that is gone none.
            share = replace(link, timeout=max(0.1, (end - time.monotonic()) / left))
            try:
                channel = _join(address, share, "client", join, again=left == 1)
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
        channels = {"server": server, "dealer": self.channel}
        first = Pairing(bytes.fromhex(self.session), start, batch, self._corrections)
        for pairing in _following(first, count):
            part = self._preparation.prepare(pairing)
            yield over(part, channels, tag=pairing.index)

    def close(self) -> None:
        """Leave the dealer."""
        self.channel.close()


def _following(first: Pairing, count: int) -> Iterator[Pairing]:
    for index in range(first.index, first.index + count):
        yield replace(first, index=index)
