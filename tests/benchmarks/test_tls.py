"""What TLS adds to the messages of an inference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import party, tls
from benchmarks.rows import Results, Spread
from crypten_espn.masked.messages import CLIENT, SERVER
from crypten_espn.wire.tls import TLS

from .result_cases import WAN
from .test_party import as_parties


@pytest.mark.parametrize("secured", [False, True])
def test_both_parties_send_the_messages_in_their_order(
    tmp_path: Path, secured: bool
) -> None:
    files = tls.certificates(tmp_path, "127.0.0.1")
    sizes = [(CLIENT, 7), (SERVER, 100_000), (CLIENT, 3), (SERVER, 1)]

    def body(control: party.Control) -> party.Result:
        mine = TLS(*files[CLIENT if control.rank else SERVER]) if secured else None
        system = tls.MessageSystem(sizes, control, "127.0.0.1", mine)
        try:
            system.prepare()
            return [system.online()() for _ in range(2)][1]
        finally:
            system.close()

    server, client = as_parties(body)
    assert (server.rounds, server.bytes_sent) == (4, 100_001)
    assert (client.rounds, client.bytes_sent) == (4, 10)


def test_the_difference_is_of_medians_on_one_path(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = Results()
    for engine, seconds in (("tcp", 2.0), ("tcp+TLS", 2.03)):
        online = Spread.of([seconds])
        results.add(
            dataclasses.replace(
                WAN, activation="messages", engine=engine, online_s=online
            )
        )
    results.add(dataclasses.replace(WAN, engine="tcp", network="cheetah"))
    (line,) = tls.differences(results)
    assert line == "minionn, wan: 2 s, with TLS 2.03 s: +1.5%"
