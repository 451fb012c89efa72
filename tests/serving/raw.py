"""A peer that says what it likes: a channel with a role, and whole messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from crypten_espn.errors import PeerError
from crypten_espn.masked.messages import Party
from crypten_espn.masked.plan import Plan
from crypten_espn.serving.link import Link
from crypten_espn.serving.messages import (
    GREETING,
    Hello,
    Join,
    Joined,
    Paired,
    Seed,
    Welcome,
    hear,
    receive_description,
    receive_plan,
    send_plan,
    tell,
)
from crypten_espn.serving.preparing import reach
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.tls import TLS

NAME = "0123456789abcdef" * 2


def greeted(
    address: str, role: Party, peer_role: str, *, tls: TLS | None = None
) -> Channel:
    """A connection that has said its role, and nothing else."""
    link = Link(tls=tls, timeout=20)
    channel = reach(address, link, role=role, peer_role=peer_role)
    channel.handshake(digest=GREETING)
    return channel


@contextlib.contextmanager
def at_server(
    address: str, plan: Plan, session: str | None = None, *, tls: TLS | None = None
) -> Iterator[Channel]:
    """A client of the server, after the greeting."""
    with greeted(address, "client", "server", tls=tls) as channel:
        tell(channel, Hello(session=session, next_index=0))
        welcome = hear(channel, Welcome)
        receive_plan(channel, limit=1 << 20)
        receive_description(channel, digest=welcome.description, plan=plan)
        channel.handshake(digest=plan.digest)
        yield channel


@contextlib.contextmanager
def waiting(
    address: str, plan: Plan, session: str = NAME, *, tls: TLS | None = None
) -> Iterator[Channel]:
    """A client that waits at the dealer."""
    with greeted(address, "client", "dealer", tls=tls) as channel:
        tell(channel, Join(session=session, digest=plan.digest.hex()))
        hear(channel, Joined)
        yield channel


@contextlib.contextmanager
def paired(
    address: str, plan: Plan, session: str = NAME
) -> Iterator[tuple[Channel, Channel]]:
    """A server and a client at the dealer, both with their seeds."""
    with (
        waiting(address, plan, session) as client,
        greeted(address, "server", "dealer") as server,
    ):
        tell(server, Join(session=session, digest=plan.digest.hex()))
        hear(server, Paired)
        send_plan(server, plan)
        hear(server, Seed)
        hear(client, Seed)
        yield server, client


def refusal(channel: Channel) -> str:
    """The reason by which the other side ends the connection."""
    with pytest.raises(PeerError, match="stopped") as error:
        channel.receive_bytes()
    return str(error.value)


def say(channel: Channel, **fields: object) -> None:
    """Send a message of any fields."""
    channel.send_bytes(json.dumps(fields).encode())
