"""A served model as its users have it: real processes, and bytes as the plan says."""

from __future__ import annotations

import pytest

from benchmarks import hosts
from benchmarks.hosts import Hosts
from benchmarks.processes import connected, family, peak_memory
from crypten_espn.masked.messages import CLIENT, SERVER
from crypten_espn.wire.frames import HEADER_BYTES

from ..masked.cases import planned, residual


@pytest.mark.slow
def test_bytes_of_a_session_are_those_of_its_plan() -> None:
    network, example = residual()
    model = planned(network, example)
    plan = model.plan
    with Hosts(model) as served:
        ports = [hosts.port(served.server), hosts.port(served.dealer)]
        with hosts.reach("127.0.0.1", ports) as client:
            assert list(connected(served.server)) == [served.server.pid]
            client.prepare(2, batch=3)
            answer = client.ask(example[:3])
        (dealt,) = served.events(served.dealer, "dealt", 1)
        (prepared,) = served.events(served.server, "prepared", 1)
        (answered,) = served.events(served.server, "inference", 1)
        hosts.check_offline(
            plan, dealt=dealt["sent"], received=prepared["received"], batch=3, count=2
        )
        assert answered["received"] == answer.sent
        for who, sent in ((CLIENT, answer.sent), (SERVER, answered["sent"])):
            assert 0 < hosts.online_payload(plan, who, sent, batch=3) < sent
        assert served.server.pid in family(served.server.pid)
        assert min(served.peaks) > 10**7 and peak_memory() > 10**7
    assert not served.server.alive and not served.dealer.alive


def test_other_bytes_than_the_plan_says_are_refused_with_both_counts() -> None:
    network, example = residual()
    plan = planned(network, example).plan
    dealt = plan.dealer_bytes(batch=2) + 4 * HEADER_BYTES
    received = hosts.half_bytes(plan, batch=2) + HEADER_BYTES
    hosts.check_offline(plan, dealt=dealt, received=received, batch=2)
    for more, who in (((1, 0), "dealer"), ((0, 1), "client"), ((0, -20), "client")):
        with pytest.raises(RuntimeError, match=rf"the {who} sent .* the plan says"):
            hosts.check_offline(
                plan, dealt=dealt + more[0], received=received + more[1], batch=2
            )
    with pytest.raises(RuntimeError, match=r"the server sent .* its plan says"):
        hosts.online_payload(plan, SERVER, 100, batch=2)
