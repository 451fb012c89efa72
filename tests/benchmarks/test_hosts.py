"""What a session's processes report is held against the plan, byte for byte."""

from __future__ import annotations

import pytest

from benchmarks import hosts
from crypten_espn.masked.messages import SERVER
from crypten_espn.wire.frames import HEADER_BYTES

from ..masked.cases import planned, residual


def test_other_bytes_than_the_plan_says_are_refused_with_both_counts() -> None:
    network, example = residual()
    plan = planned(network, example).plan
    dealt = plan.dealer_bytes(batch=2) + 4 * HEADER_BYTES
    received = plan.client_bytes(batch=2) + HEADER_BYTES
    hosts.check_offline(plan, dealt=dealt, received=received, batch=2)
    for more, who in (((1, 0), "dealer"), ((0, 1), "client"), ((0, -20), "client")):
        with pytest.raises(RuntimeError, match=rf"the {who} sent .* the plan says"):
            hosts.check_offline(
                plan, dealt=dealt + more[0], received=received + more[1], batch=2
            )
    with pytest.raises(RuntimeError, match=r"the server sent .* its plan says"):
        hosts.online_payload(plan, SERVER, 100, batch=2)
