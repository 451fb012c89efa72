"""The dealer pairs exactly two, deals each inference once, and refuses by name."""

from __future__ import annotations

import logging
import time

import pytest

from crypten_espn.errors import PeerError
from crypten_espn.masked.dealing import Dealing
from crypten_espn.masked.messages import Send
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.plan import Plan
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Limits
from crypten_espn.serving.messages import (
    Join,
    Joined,
    Message,
    Order,
    Paired,
    Seed,
    hear,
    send_plan,
    tell,
)
from crypten_espn.wire.channel import Channel

from .conftest import Run
from .raw import NAME, greeted, paired, refusal, say, waiting


@pytest.fixture
def dealer(run: Run) -> DealerServer:
    return run(DealerServer("127.0.0.1:0", timeout=20))


@pytest.fixture
def plan(model: MaskedModel) -> Plan:
    return model.plan


def takes(server: Channel, plan: Plan, *, start: int, count: int, batch: int) -> None:
    """Order inferences and receive everything that is dealt for them."""
    tell(server, Order(start=start, count=count, batch=batch))
    for index in range(start, start + count):
        # As the messages of a dealing of our own: sizes and tags must fit.
        for sent in Dealing(plan).deal(0, batch):
            assert isinstance(sent, Send)
            sizes = [(array.size, bits) for array, bits in sent.parts]
            server.receive_parts(sizes, tag=index)


def test_inferences_are_dealt_in_rising_order_and_each_once(
    dealer: DealerServer, plan: Plan
) -> None:
    with paired(dealer.address, plan) as (server, _):
        takes(server, plan, start=0, count=2, batch=1)
        takes(server, plan, start=4, count=1, batch=3)
        tell(server, Order(start=4, count=1, batch=1))
        assert "Inference 4 was prepared before" in refusal(server)


def test_a_rewinding_order_is_refused_on_both_sides(
    dealer: DealerServer, plan: Plan
) -> None:
    with paired(dealer.address, plan) as (server, client):
        takes(server, plan, start=0, count=1, batch=1)
        say(server, message="order", start=5, count=-5, batch=1)
        assert "count" in refusal(server)
        assert "count" in refusal(client)


@pytest.mark.parametrize(
    ("order", "named"),
    [
        ({"start": 0, "count": 10**9, "batch": 1}, "1000000000 inferences"),
        ({"start": 0, "count": 1, "batch": 10**9}, "1000000000 inputs"),
        ({"start": 0, "count": 1, "batch": 10**30}, "batch"),
        ({"start": 2**32 - 1, "count": 2, "batch": 1}, "a session has 4294967296"),
        ({"start": 2**31, "count": 1, "batch": 1}, "may be passed over"),
    ],
)
def test_an_order_beyond_a_limit_is_refused_by_name(
    dealer: DealerServer, plan: Plan, order: dict[str, int], named: str
) -> None:
    with paired(dealer.address, plan) as (server, _):
        say(server, message="order", **order)
        assert named in refusal(server)


def test_an_inference_larger_than_the_memory_allowed_is_refused(
    run: Run, plan: Plan
) -> None:
    limits = Limits(material_bytes=100_000)
    dealer = run(DealerServer("127.0.0.1:0", timeout=20, limits=limits))
    with paired(dealer.address, plan) as (server, _):
        tell(server, Order(start=0, count=1, batch=100))
        assert "100,000 are allowed" in refusal(server)


def test_the_masks_of_all_pairs_weights_are_bounded(run: Run, plan: Plan) -> None:
    limits = Limits(material_bytes=30_000)  # one pair's take about 17 kB
    dealer = run(DealerServer("127.0.0.1:0", timeout=20, limits=limits))
    join = Join(session="f" * 32, digest=plan.digest.hex())
    with (
        paired(dealer.address, plan),
        waiting(dealer.address, plan, join.session) as client,
        greeted(dealer.address, "server", "dealer") as server,
    ):
        tell(server, join)
        hear(server, Paired)
        send_plan(server, plan)
        assert "already held" in refusal(server) and "already held" in refusal(client)


def test_a_third_and_a_second_of_one_kind_do_not_disturb_a_pair(
    dealer: DealerServer, plan: Plan
) -> None:
    join = Join(session=NAME, digest=plan.digest.hex())
    with paired(dealer.address, plan) as (server, _):
        for role, named in (
            ("client", "already has its client"),
            ("server", "already has its server and its client"),
        ):
            with greeted(dealer.address, role, "dealer") as third:  # type: ignore[arg-type]
                tell(third, join)
                assert named in refusal(third)
        takes(server, plan, start=0, count=1, batch=1)


def test_a_second_client_does_not_disturb_one_that_waits(
    dealer: DealerServer, plan: Plan
) -> None:
    join = Join(session=NAME, digest=plan.digest.hex())
    with (
        waiting(dealer.address, plan),
        greeted(dealer.address, "client", "dealer") as second,
    ):
        tell(second, join)
        assert "already has its client" in refusal(second)
        with greeted(dealer.address, "server", "dealer") as server:
            tell(server, join)
            hear(server, Paired)


def test_a_server_whose_client_is_not_there_is_told_at_once(
    dealer: DealerServer, plan: Plan
) -> None:
    with greeted(dealer.address, "server", "dealer") as server:
        tell(server, Join(session=NAME, digest=plan.digest.hex()))
        assert "No client of this session waits" in refusal(server)


def test_a_session_can_be_dealt_for_again_when_it_has_ended(
    dealer: DealerServer, plan: Plan
) -> None:
    for _ in range(2):
        with paired(dealer.address, plan) as (server, client):
            takes(server, plan, start=0, count=1, batch=1)
            say(server, message="goodbye")
            server.close()
            with pytest.raises(ConnectionError):
                client.receive_bytes()


def test_a_client_does_not_wait_for_ever(run: Run, plan: Plan) -> None:
    limits = Limits(waiting_s=0.2)
    dealer = run(DealerServer("127.0.0.1:0", timeout=20, limits=limits))
    with waiting(dealer.address, plan) as client:
        assert "No server joined this client within 0.2 s" in refusal(client)
    with waiting(dealer.address, plan):
        pass  # its place is free again


def test_a_client_that_leaves_gives_its_place_back(
    dealer: DealerServer, plan: Plan
) -> None:
    join = Join(session=NAME, digest=plan.digest.hex())
    with waiting(dealer.address, plan) as client:
        client.abort("changed its mind")
    for _ in range(400):
        with greeted(dealer.address, "client", "dealer") as another:
            tell(another, join)
            try:
                hear(another, Joined)
            except PeerError as error:  # until it is noticed
                assert "already has its client" in str(error)
                time.sleep(0.05)
            else:
                return
    pytest.fail("the place was never free again")


def test_the_oldest_of_too_many_waiting_clients_makes_room(
    run: Run, plan: Plan
) -> None:
    dealer = run(DealerServer("127.0.0.1:0", timeout=20, limits=Limits(waiting=2)))
    names = [f"{number:032x}" for number in range(3)]
    with (
        waiting(dealer.address, plan, names[0]) as first,
        waiting(dealer.address, plan, names[1]),
        waiting(dealer.address, plan, names[2]),
    ):
        assert "makes room for a newer one" in refusal(first)


def test_plans_that_differ_are_named_on_both_sides(
    dealer: DealerServer, plan: Plan
) -> None:
    with (
        waiting(dealer.address, plan) as client,
        greeted(dealer.address, "server", "dealer") as server,
    ):
        tell(server, Join(session=NAME, digest="0" * 64))
        for channel in (server, client):
            said = refusal(channel)
            assert plan.digest.hex()[:16] in said and "0" * 16 in said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"not a plan", "not a plan"),
        (b'{"version": 1}', "not a plan"),
        (b"[" * 3000, "not a plan"),
        (b'{"version": 1, "\\u001b[2J\\n": 1}', "not a plan"),
        (b" " * 5000, "5000 bytes"),
    ],
)
def test_a_plan_is_checked_before_anything_is_dealt(
    run: Run, plan: Plan, text: bytes, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(plan_bytes=4000)
    dealer = run(DealerServer("127.0.0.1:0", timeout=20, limits=limits))
    with (
        waiting(dealer.address, plan) as client,
        greeted(dealer.address, "server", "dealer") as server,
    ):
        tell(server, Join(session=NAME, digest=plan.digest.hex()))
        hear(server, Paired)
        server.send_bytes(text)
        assert named in refusal(server) and named in refusal(client)
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_dealer_with_a_list_deals_for_its_plans_alone(run: Run, plan: Plan) -> None:
    willing = run(DealerServer("127.0.0.1:0", timeout=20, plans={plan.digest}))
    with paired(willing.address, plan) as (server, _):
        takes(server, plan, start=0, count=1, batch=1)
    unwilling = run(DealerServer("127.0.0.1:0", timeout=20, plans={bytes(32)}))
    with (
        waiting(unwilling.address, plan) as client,
        greeted(unwilling.address, "server", "dealer") as server,
    ):
        tell(server, Join(session=NAME, digest=plan.digest.hex()))
        assert "does not deal for plan" in refusal(server)
        assert "does not deal for plan" in refusal(client)


def test_a_server_that_dies_ends_its_clients_wait(
    dealer: DealerServer, plan: Plan
) -> None:
    with paired(dealer.address, plan) as (server, client):
        server.close()
        assert "Lost the server" in refusal(client)


def test_a_server_that_comes_at_once_waits_until_its_client_was_told(
    dealer: DealerServer, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def slowly(channel: Channel, message: Message) -> None:
        tell(channel, message)
        if isinstance(message, Joined):
            time.sleep(0.2)  # the server may come: it finds the seat
        said.append(type(message))

    monkeypatch.setattr("crypten_espn.serving.dealer.tell", slowly)
    with paired(dealer.address, plan) as (server, _):
        takes(server, plan, start=0, count=1, batch=1)
    assert said == [Joined, Paired, Seed, Seed]


def test_an_unforeseen_failure_reaches_both_sides_and_the_log_without_its_text(
    dealer: DealerServer,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("the seed is 1234")

    monkeypatch.setattr(Dealing, "deal", fail)
    with paired(dealer.address, plan) as (server, client):
        tell(server, Order(start=0, count=1, batch=1))
        for channel in (server, client):
            said = refusal(channel)
            assert "internal error" in said and "1234" not in said
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [r.name for r in errors] == ["crypten_espn.serving.dealer"]
    assert "KeyError at" in caplog.text and "1234" not in caplog.text
