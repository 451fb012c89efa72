"""Predicted seconds of traffic: delays, bytes, and TCP's slow start."""

from __future__ import annotations

import math

import pytest

from crypten_espn.cost import GLOO_DELAYS, PAYLOAD, Traffic
from crypten_espn.errors import EspnError

BOTH_WAYS = Traffic(10, (3_000_000, 2_000_000), alternating=False)
IN_TURNS = Traffic(10, (3_000_000, 2_000_000), alternating=True)


def test_bytes_queue_when_messages_alternate_and_overlap_when_they_do_not():
    link = {"rtt_s": 0.1, "bits_per_second": 100e6}
    line = 8 / (100e6 * PAYLOAD)
    assert BOTH_WAYS.seconds_at(**link) == pytest.approx(0.5 + 3e6 * line)
    assert IN_TURNS.seconds_at(**link) == pytest.approx(0.5 + 5e6 * line)
    assert IN_TURNS.seconds_at(**link, seconds=2.0) == pytest.approx(2.5 + 5e6 * line)
    gloo = Traffic(10, (0, 0), alternating=False, delays=GLOO_DELAYS)
    assert gloo.seconds_at(**link) == pytest.approx(2.0)


def test_no_line_is_refused():
    for link in (
        {"rtt_s": -1, "bits_per_second": 1},
        {"rtt_s": 1, "bits_per_second": 0},
    ):
        with pytest.raises(EspnError, match="must not be negative"):
            BOTH_WAYS.seconds_at(**link)


def test_slow_start_doubles_until_the_path_is_full_or_all_is_sent():
    # 1.25 MB fill the path: 14,480 bytes doubled six times stay below.
    assert BOTH_WAYS.slow_start_s(rtt_s=0.1, bits_per_second=100e6) == pytest.approx(
        0.6
    )
    few = Traffic(1, (14_480 * 4, 0), alternating=False)
    assert few.slow_start_s(rtt_s=0.1, bits_per_second=math.inf) == pytest.approx(0.2)
    tiny = Traffic(1, (1, 0), alternating=False)
    assert tiny.slow_start_s(rtt_s=0.1, bits_per_second=100e6) == 0
    assert BOTH_WAYS.slow_start_s(rtt_s=0.0, bits_per_second=math.inf) == 0
    assert IN_TURNS.slow_start_s(rtt_s=0.1, bits_per_second=100e6) == 0
