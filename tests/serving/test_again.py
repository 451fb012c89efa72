"""A client whose connection is lost goes on where that is safe."""

from __future__ import annotations

from pathlib import Path

import pytest

from crypten_espn.errors import MaterialError, PeerError, PlanMismatchError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.events import InferenceBegun, Reconnected, Refused
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.server import ModelServer

from ..masked.cases import planned, residual
from .conftest import Heard, Run, Served, serving
from .stalled import stalled


def restarted(
    served: Served, model: MaskedModel, run: Run, folder: Path | None = None
) -> ModelServer:
    """Another server where the first one was."""
    address = served.server.address
    served.server.close()
    link = Link(served.dealer.address, folder, timeout=20)
    return run(ModelServer(model, address, link=link))


def used(heard: Heard) -> list[tuple[str, int]]:
    """What was claimed, at both parties; each once."""
    for who in ("client", "server"):
        claimed = [(e.session, e.index) for e in heard.of(who, InferenceBegun)]
        assert len(set(claimed)) == len(claimed)
    return claimed


def test_a_client_that_was_idle_too_long_connects_again(
    model: MaskedModel, run: Run, heard: Heard
) -> None:
    served = serving(model, run, limits=Limits(idle_s=0.1))
    x = served.inputs[:1]
    with connect(served.server.address, link=served.link) as client:
        (refused,) = heard.wait("server", Refused)
        assert refused.reason == "idle_s"
        served.server.limits = Limits()  # from here on nobody is too slow
        assert served.is_right(x, client.predict(x))
        # Told before it asked, or in the middle of it.
        reason = heard.of("client", Reconnected)[0].reason
        assert "was silent for 0.1 s" in reason or "is closed" in reason


@pytest.mark.parametrize("stored", [False, True])
def test_a_server_restarted_between_prepare_and_predict_is_gone_on_with(
    stored: bool, model: MaskedModel, run: Run, heard: Heard, tmp_path: Path
) -> None:
    folders = [tmp_path / who if stored else None for who in ("server", "client")]
    served = serving(model, run, directory=folders[0])
    x = served.inputs[:1]
    link = Link(served.dealer.address, folders[1], timeout=20)
    with connect(served.server.address, link=link) as client:
        client.prepare(4)
        assert served.is_right(x, client.predict(x))
        restarted(served, model, run, folders[0])
        assert served.is_right(x, client.predict(x))
        # Material in memory is gone with its server, that on disk is gone on with.
        assert client.remaining == (2 if stored else 0)
        assert client.predict_many([x, x], in_flight=2)
    indices = [index for _, index in used(heard)]
    assert len(indices) == 4
    if stored:
        assert indices[:2] == [0, 1]
    assert len(heard.of("client", Reconnected)) == 1


def test_material_that_the_restarted_server_has_not_is_refused_by_name(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    link = Link(served.dealer.address, tmp_path / "client", timeout=20)
    with connect(served.server.address, link=link) as client:
        client.prepare(2)
        restarted(served, model, run)
        with pytest.raises((MaterialError, PeerError), match="no material of the sess"):
            client.predict(served.inputs[:1])


@pytest.mark.parametrize("pinned", [True, False])
def test_another_plan_after_a_restart_is_followed_unless_one_was_asked_for(
    pinned: bool, served: Served, model: MaskedModel, run: Run, heard: Heard
) -> None:
    other = planned(*residual(), precision="high")
    plan, x = model.plan if pinned else None, served.inputs[:1]
    with connect(served.server.address, link=served.link, plan=plan) as client:
        client.predict(x)
        restarted(served, other, run)
        if pinned:
            with pytest.raises(PlanMismatchError):
                client.predict(x)
        else:
            assert served.is_right(x, client.predict(x))
            assert client.plan.digest == other.plan.digest
    assert len(used(heard)) == (1 if pinned else 2)


def test_an_inference_cut_in_the_middle_is_an_error_and_the_next_one_goes_on(
    model: MaskedModel, run: Run, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input was sent: whether to ask again is the caller's to say."""
    served = serving(model, run, limits=Limits(grace_s=0.1))
    x = served.inputs[:1]
    with connect(served.server.address, link=served.link) as client:
        client.prepare(2)
        with stalled(monkeypatch, client, x) as held:
            heard.wait("server", InferenceBegun)
            restarted(served, model, run)
            held.go_on()
        assert isinstance(held.error, PeerError)
        assert served.is_right(x, client.predict(x))
    assert len(used(heard)) == 2


def test_a_dealer_restarted_between_preparations_is_found_again(
    served: Served, run: Run, heard: Heard
) -> None:
    x = served.inputs[:1]
    with connect(served.server.address, link=served.link) as client:
        client.prepare(1)
        address = served.dealer.address
        served.dealer.close()
        assert served.is_right(x, client.predict(x))  # the dealer is absent online
        run(DealerServer(address, timeout=20))
        assert served.is_right(x, client.predict(x))
        assert served.is_right(x, client.predict(x))
    assert len(set(used(heard))) == 3


def test_a_dealer_that_is_gone_is_named_within_the_time_out(
    model: MaskedModel, run: Run
) -> None:
    served = serving(model, run)
    served.dealer.close()
    link = Link(served.dealer.address, timeout=0.5)
    with (
        connect(served.server.address, link=link) as client,
        pytest.raises(PeerError, match="Cannot reach the dealer"),
    ):
        client.predict(served.inputs[:1])


def test_a_server_that_stays_away_is_named_with_why_it_left(
    served: Served,
) -> None:
    link = Link(served.dealer.address, timeout=0.5)
    with connect(served.server.address, link=link) as client:
        served.server.close()
        with pytest.raises(PeerError, match=r"Cannot reach.*lost:.*shutting down"):
            client.predict(served.inputs[:1])
