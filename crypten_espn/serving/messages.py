"""The messages of a session: typed, strictly decoded, nothing else is understood.

    client -> server   Hello, then Prepare any number of times, then Goodbye
    server -> client   Welcome, the plan and the description; Accepted, then Prepared,
                       for each Prepare
    party -> dealer    Join; from the server also the plan, Orders and Goodbye
    dealer -> party    Joined (client), Paired (server), then Seed (both)

An inference has no message of its own: it begins with the client's first ring
elements, whose tag is the inference's index.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from typing import Annotated, TypeVar, overload

import msgspec

from ..bundle.description import DESCRIPTION_BYTES, Description
from ..errors import (
    DataError,
    LimitError,
    PeerError,
    PlanMismatchError,
    ShapeError,
)
from ..masked.messages import SERVER, Party
from ..masked.plan import Plan
from ..wire.channel import Channel
from .dealers import DEALERS

# Both sides of a connection send this digest before they know a plan.
GREETING = bytes(32)

# A tag on the wire has 32 bits, so an index has too.
INDEX_LIMIT = 1 << 32

# Longest message in bytes; the plan travels apart, under Limits.plan_bytes.
MESSAGE_BYTES = 4096

SessionName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
SeedText = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
# The digest of a certificate; empty where there is none, as without TLS.
Fingerprint = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
Address = Annotated[str, msgspec.Meta(max_length=255)]
Addresses = Annotated[tuple[Address, ...], msgspec.Meta(max_length=DEALERS)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=INDEX_LIMIT)]
Positive = Annotated[int, msgspec.Meta(ge=1, lt=INDEX_LIMIT)]


class Message(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="message"
):
    """Any message; subclasses add their fields."""


class Hello(Message, frozen=True, tag="hello"):
    """A client's first words to a server.

    Args:
        session: whose material this side holds; None for a new session.
        next_index: the first inference this side has not used.
        corrections: who receives the dealer's in this session.
    """

    session: SessionName | None
    next_index: Index
    corrections: Party = SERVER


class Welcome(Message, frozen=True, tag="welcome"):
    """The server's answer; the plan and the description follow.

    Args:
        next_index: the first inference the server has not used.
        description: digest of the description's text.
        keeps: whether it keeps what is prepared when the client leaves.
        quota: inputs that it still answers this client today; None for any number.
        dealers: those it works with, in the order in which this client should try them.
    """

    next_index: Index
    description: Digest
    keeps: bool
    quota: Index | None = None
    dealers: Addresses = ()


class Prepare(Message, frozen=True, tag="prepare"):
    """The client wants `count` inferences of `batch` inputs, from `start` on.

    Args:
        dealer: where the client waits for the server, as the server called it.
    """

    session: SessionName
    start: Index
    count: Positive
    batch: Positive
    dealer: Address = ""


class Accepted(Message, frozen=True, tag="accepted"):
    """The server has its seed and is ready to prepare."""


class Prepared(Message, frozen=True, tag="prepared"):
    """The server holds all the material that was asked for."""


class Goodbye(Message, frozen=True, tag="goodbye"):
    """This side leaves, and nothing is wrong."""


class Join(Message, frozen=True, tag="join"):
    """A party's first words to the dealer.

    The greeting says which of the two it is.

    Args:
        session: what both parties call this dealing.
        digest: of the plan that material is wanted for.
        corrections: who is to receive them, as both parties must say alike.
    """

    session: SessionName
    digest: Digest
    corrections: Party = SERVER


class Joined(Message, frozen=True, tag="joined"):
    """The dealer waits for this client's server."""


class Paired(Message, frozen=True, tag="paired"):
    """The dealer has found this server's client and now takes the plan."""


class Seed(Message, frozen=True, tag="seed"):
    """A party's secret seed.

    Args:
        seed: 16 bytes in hex.
        partner: digest of the certificate the other party showed to the dealer.
    """

    seed: SeedText
    partner: Fingerprint

    def __repr__(self) -> str:
        return "Seed(seed=<hidden>)"


class Order(Message, frozen=True, tag="order"):
    """The server wants `count` inferences of `batch` inputs dealt, from `start` on."""

    start: Index
    count: Positive
    batch: Positive


M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return msgspec.json.encode(message)


def decode(data: bytes, *kinds: type[M]) -> M:
    """The message that `data` is.

    Args:
        data: as received.
        kinds: the messages that may come now.

    Raises:
        PeerError: it is none of them, or one of its fields is missing, unknown, of
            another type, or out of range.
    """
    wanted = functools.reduce(operator.or_, kinds)
    try:
        message: M = msgspec.json.decode(data, type=wanted)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # The decoder may quote what was received.
        said = ascii(str(error))[1:-1][:200]
        names = " or ".join(kind.__name__ for kind in kinds)
        raise PeerError(
            f"A message is not the {names} that was expected: {said}. Install the same "
            "crypten-espn on both sides."
        ) from None
    return message


def tell(channel: Channel, message: Message) -> None:
    """Send one message."""
    channel.send_bytes(encode(message))


@overload
def hear(channel: Channel, kind: type[M], /, *, limit: int = ...) -> M: ...
@overload
def hear(
    channel: Channel, kind: type[M], other: type[N], /, *, limit: int = ...
) -> M | N: ...


def hear(
    channel: Channel, *kinds: type[Message], limit: int = MESSAGE_BYTES
) -> Message:
    """Receive one message of one of these kinds, of at most `limit` bytes.

    Raises:
        PeerError: as `decode`, or the peer is gone, silent, or sends too much.
    """
    data = channel.receive_bytes(limit=limit)
    try:
        return decode(data, *kinds)
    except PeerError as error:
        raise PeerError(f"{channel.peer}: {error}") from None


def send_plan(channel: Channel, plan: Plan) -> None:
    """Send a plan, in a message of its own."""
    channel.send_bytes(plan.to_json().encode())


def receive_plan(channel: Channel, *, limit: int, digest: str | None = None) -> Plan:
    """Receive a plan and check all of it.

    Args:
        channel: to who sends it.
        limit: bytes it may have.
        digest: what its digest must be, in hex.

    Raises:
        LimitError: it is longer than `limit`.
        PlanError: it is not a plan that can be run.
        PlanMismatchError: it has another digest.
    """
    try:
        data = channel.receive_bytes(limit=limit)
    except LimitError as error:
        raise LimitError(str(error), error.limit and "plan_bytes") from None
    # Text that is no UTF-8 reaches the plan's own check, which names the fault.
    plan = Plan.from_json(data.decode("utf-8", "replace"))
    if digest is not None and plan.digest.hex() != digest:
        raise PlanMismatchError(
            f"{channel.peer} sent plan {plan.digest.hex()[:16]} and had announced "
            f"{digest[:16]}."
        )
    return plan


def send_description(channel: Channel, description: Description) -> None:
    """Send a description, in a message of its own."""
    channel.send_bytes(description.text)


def receive_description(channel: Channel, *, digest: str, plan: Plan) -> Description:
    """Receive a description and check all of it.

    Args:
        channel: to who sends it.
        digest: what its digest must be, in hex.
        plan: what it must belong to.

    Raises:
        PeerError: it is longer than `DESCRIPTION_BYTES`, has another digest, is none,
            or does not belong to the plan.
    """
    text = channel.receive_bytes(limit=DESCRIPTION_BYTES)
    found = hashlib.sha256(text).hexdigest()
    if found != digest:
        raise PeerError(
            f"{channel.peer} sent a description {found[:16]} and had announced "
            f"{digest[:16]}; it was changed on the way."
        )
    try:
        description = Description.from_text(text)
        description.check(plan)
    except (DataError, ShapeError) as error:
        raise PeerError(
            f"{channel.peer} sent a description of no use: {error}."
        ) from None
    return description


# Made here once: two threads that decode a type for the first time crash msgspec.
for _kind in Message.__subclasses__():
    msgspec.json.Decoder(_kind)
