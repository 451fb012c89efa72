"""Material topped up in the background: right answers, nothing used twice, bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from crypten_espn.errors import PeerError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import Client, connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.events import (
    Inference,
    InferenceBegun,
    Left,
    Prepared,
    TopUpFailed,
)
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.supply import ATTEMPTS, Supply

from .conftest import Heard, Run, Served, serving


def used(heard: Heard) -> set[tuple[str, int]]:
    """What was claimed at both parties, each once."""
    ledgers = []
    for who in ("client", "server"):
        claimed = [(e.session, e.index) for e in heard.of(who, InferenceBegun)]
        assert len(set(claimed)) == len(claimed)
        ledgers.append(set(claimed))
    assert ledgers[0] == ledgers[1]
    return ledgers[0]


def prepared(heard: Heard) -> list[tuple[str, int]]:
    """What was prepared at the client, by session and index."""
    return [
        (event.session, index)
        for event in heard.of("client", Prepared)
        for index in range(event.start, event.start + event.count)
    ]


@pytest.mark.parametrize("stored", [False, True])
def test_material_is_topped_up_while_it_is_used_and_none_is_used_twice(
    stored: bool, model: MaskedModel, run: Run, heard: Heard, tmp_path: Path
) -> None:
    folders = [tmp_path / who if stored else None for who in ("server", "client")]
    served = serving(model, run, directory=folders[0])
    link = Link(served.dealer.address, folders[1], timeout=20)
    x, asked = served.inputs, 14
    with Supply(served.server.address, link, ahead=4, low=2) as supply:
        assert supply.plan == model.plan
        heard.wait("client", Prepared)
        for i in range(asked):
            part = x[i % 4 : i % 4 + 1]
            assert served.is_right(part, supply.ask(part).logits)
        # Not asked for, prepared all the same.
        heard.wait("client", Prepared, count=3)
    assert len(used(heard)) == asked == len(heard.of("client", Inference))
    made = prepared(heard)
    assert len(set(made)) == len(made) > asked
    assert used(heard) <= set(made)
    # Two sessions take turns; nothing needs a third.
    assert len({session for session, _ in made}) == 2


def test_a_supply_goes_on_with_what_its_folder_holds(
    model: MaskedModel, run: Run, heard: Heard, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    link = Link(served.dealer.address, tmp_path / "client", timeout=20)
    x = served.inputs[:1]
    for _ in range(3):
        with Supply(served.server.address, link, ahead=3, low=0) as supply:
            heard.wait("client", Prepared)
            assert served.is_right(x, supply.ask(x).logits)
    assert len(used(heard)) == 3


def test_what_is_prepared_for_batches_is_told(served: Served, heard: Heard) -> None:
    x = served.inputs
    with Supply(served.server.address, served.link, ahead=2, low=0, batch=3) as supply:
        heard.wait("client", Prepared)
        while supply.next_batch is None:
            pass  # prepared, and not yet handed over
        assert supply.next_batch == 3
        assert served.is_right(x[:3], supply.ask(x[:3]).logits)


def test_a_dealer_that_is_back_is_found_by_the_next_top_up(
    served: Served, run: Run, heard: Heard
) -> None:
    x, address = served.inputs[:1], served.dealer.address
    link = Link(address, timeout=20)
    with Supply(served.server.address, link, ahead=2, low=1, pause_s=0.001) as supply:
        heard.wait("client", Prepared)
        served.dealer.close()
        run(DealerServer(address, timeout=20))
        for _ in range(5):
            assert served.is_right(x, supply.ask(x).logits)
    assert len(used(heard)) == 5


def test_a_failed_top_up_is_logged_and_tried_again_up_to_a_bound(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    served = serving(model, run, limits=Limits(count=2))
    x, pause = served.inputs[:1], 2.0**-10
    with Supply(
        served.server.address, served.link, ahead=3, low=0, pause_s=pause
    ) as supply:
        failed = heard.wait("supply", TopUpFailed, count=ATTEMPTS)
        assert [event.attempt for event in failed] == list(range(1, ATTEMPTS + 1))
        pauses = [pause * 2**i for i in range(ATTEMPTS - 1)]
        assert [event.wait_s for event in failed] == [*pauses, 0]
        assert all("asked for in one order" in event.reason for event in failed)
        # What is missing is prepared when it is needed; then it is tried anew.
        assert served.is_right(x, supply.ask(x).logits)
        again = heard.wait("supply", TopUpFailed, count=ATTEMPTS + 1)
        assert again[ATTEMPTS].attempt == 1


@pytest.mark.parametrize(("ahead", "low"), [(0, 0), (2, 3), (2, -1)])
def test_a_mark_that_is_none_is_refused(served: Served, ahead: int, low: int) -> None:
    with pytest.raises(ValueError, match="were given"):
        Supply(served.server.address, served.link, ahead=ahead, low=low)


def test_a_supply_that_cannot_be_made_leaves_no_connection(
    served: Served, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Client] = []

    def once(*args, **options) -> Client:
        if made:
            raise PeerError("only one")
        made.append(connect(*args, **options))
        return made[0]

    monkeypatch.setattr("crypten_espn.serving.supply.connect", once)
    with pytest.raises(PeerError, match="only one"):
        Supply(served.server.address, served.link, ahead=1, low=0)
    assert len(heard.wait("server", Left)) == 1
