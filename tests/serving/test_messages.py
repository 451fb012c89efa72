"""Every message is read back as it was written, and nothing else is a message."""

from __future__ import annotations

import json

import pytest

from crypten_espn.errors import EspnError, PeerError, PlanError, PlanMismatchError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.messages import (
    MESSAGE_BYTES,
    Goodbye,
    Hello,
    Join,
    Message,
    Order,
    Prepare,
    Seed,
    decode,
    encode,
    hear,
    receive_plan,
    send_plan,
)
from crypten_espn.wire.channel import socket_pair

from .fuzz import DIGEST, EXAMPLES, NAME, mutated

ORDER = {"message": "order", "start": 5, "count": 1, "batch": 1}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(encode(message), type(message)) == message
    assert len(encode(message)) < MESSAGE_BYTES


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"count": -5}, "count"),  # rewinds what follows to 0
        ({"count": 0}, "count"),
        ({"start": -1}, "start"),
        ({"batch": 0}, "batch"),
        ({"batch": 10**30}, "batch"),
        ({"start": 2**32}, "start"),
        ({"start": 5.0}, "start"),
        ({"start": "5"}, "start"),
        ({"start": True}, "start"),
        ({"start": None}, "start"),
        ({"more": 1}, "more"),
        ({"message": "prepare"}, "session"),
        ({"message": "nothing"}, "message"),
        ({"message": 3}, "message"),
    ],
)
def test_an_order_of_other_types_or_sizes_is_refused_by_name(
    changes: dict[str, object], named: str
) -> None:
    with pytest.raises(PeerError, match=named):
        decode(json.dumps(ORDER | changes).encode(), Order, Prepare)


@pytest.mark.parametrize("missing", ["start", "count", "batch"])
def test_a_missing_field_is_named(missing: str) -> None:
    fields = {name: value for name, value in ORDER.items() if name != missing}
    with pytest.raises(PeerError, match=missing):
        decode(json.dumps(fields).encode(), Order)


@pytest.mark.parametrize(
    "name", ["", "../../etc", "A" * 32, "a" * 31, "a" * 33, "a" * 32 + "\n", "\n" * 32]
)
def test_a_session_is_32_hex_digits_since_it_names_a_folder(name: str) -> None:
    fields = {"message": "join", "session": name, "digest": DIGEST}
    with pytest.raises(PeerError, match="session"):
        decode(json.dumps(fields).encode(), Join)


def test_only_the_messages_that_may_come_now_are_read() -> None:
    with pytest.raises(PeerError, match="not the Hello that was expected"):
        decode(encode(Goodbye()), Hello)


def test_what_is_quoted_of_a_message_is_short_and_printable() -> None:
    fields = {"message": "\x1b[2J" * 400}
    with pytest.raises(PeerError) as error:
        decode(json.dumps(fields).encode(), Order, Goodbye)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_seed_is_never_printed() -> None:
    assert NAME not in repr(Seed(seed=NAME, partner=""))


@pytest.mark.slow
def test_mutated_messages_raise_nothing_but_the_packages_errors() -> None:
    kinds = [type(message) for message in EXAMPLES]
    read = refused = 0
    for data in mutated(20_000, seed=1):
        try:
            message = decode(data, *kinds)
        except EspnError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            read += 1
            assert decode(encode(message), type(message)) == message
    assert read > 100 and refused > 10_000


def test_a_longer_message_than_any_is_refused_unread() -> None:
    ours, theirs = socket_pair(timeout=5)
    with ours, theirs:
        theirs.send_bytes(b" " * (MESSAGE_BYTES + 1))
        with pytest.raises(PeerError, match="4097 bytes"):
            hear(ours, Goodbye)


def test_a_plan_comes_whole_or_not_at_all(model: MaskedModel) -> None:
    plan = model.plan
    for change, error, named in (
        (lambda text: text, None, ""),
        (lambda text: text[:-1], PlanError, "not a plan"),
        (lambda text: b"\xff" + text, PlanError, "not a plan"),
        (lambda text: text + b" " * 100_000, PeerError, "bytes"),
    ):
        ours, theirs = socket_pair(timeout=5)
        with ours, theirs:
            text = plan.to_json().encode()
            theirs.send_bytes(change(text))
            if error is None:
                assert receive_plan(ours, limit=len(text)) == plan
            else:
                with pytest.raises(error, match=named):
                    receive_plan(ours, limit=len(text) + 1)
    ours, theirs = socket_pair(timeout=5)
    with ours, theirs:
        send_plan(theirs, plan)
        with pytest.raises(PlanMismatchError, match=plan.digest.hex()[:16]):
            receive_plan(ours, limit=1 << 20, digest="0" * 64)
