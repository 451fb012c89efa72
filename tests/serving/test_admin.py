"""Health and metrics of a host over HTTP, for one host among several in a process."""

from __future__ import annotations

import http.client
import json
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from crypten_espn.errors import LimitError, TransportError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.admin import Admin
from crypten_espn.serving.client import connect
from crypten_espn.serving.host import Host
from crypten_espn.serving.link import Limits
from crypten_espn.wire.connect import parse_address

from .conftest import Run, Served, serving


def ask(address: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*parse_address(address), timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def values(host: Host) -> dict[str, float]:
    """The host's metrics by name and labels, as a Prometheus server reads them."""
    with Admin(host, "0") as admin:
        status, text = ask(admin.address, "/metrics")
    assert status == 200
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(sample.labels[name] for name in sorted(sample.labels))
            found[f"{sample.name}[{labels}]"] = sample.value
    return found


def test_metrics_tell_what_was_served_prepared_and_refused(
    model: MaskedModel, run: Run
) -> None:
    served = serving(model, run, limits=Limits(count=3))
    with connect(served.server.address, link=served.link) as client:
        client.prepare(1, batch=2)
        client.predict(served.inputs[:2])
        client.prepare(3)
        client.predict(served.inputs[:1])
        during = values(served.server)
        with pytest.raises(LimitError):
            client.prepare(4)
    served.server.close()
    served.dealer.close()
    after, at_dealer = values(served.server), values(served.dealer)
    name = "crypten_espn_server_"
    assert during[f"{name}connections_open[]"] == 1
    assert during[f"{name}sessions_open[]"] == 1
    assert during[f"{name}material_left[]"] == 2
    assert after[f"{name}sessions_open[]"] == after[f"{name}material_left[]"] == 0
    assert after[f"{name}connections_total[client]"] == 1
    assert after[f"{name}inferences_total[]"] == 2
    assert after[f"{name}inputs_total[]"] == 3
    assert after[f"{name}prepared_total[]"] == 4
    assert after[f"{name}refusals_total[count]"] == 1
    assert after[f"{name}burnt_total[]"] == 0
    for phase in ("inference", "material", "compute", "wait"):
        assert after[f"{name}seconds_count[{phase}]"] == 2
        assert after[f"{name}seconds_bucket[+Inf,{phase}]"] == 2
    assert after[f"{name}seconds_count[prepare]"] == 2
    for phase in ("inference", "prepare"):
        for direction in ("sent", "received"):
            assert after[f"{name}bytes_total[{direction},{phase}]"] > 0
    assert at_dealer["crypten_espn_dealer_prepared_total[]"] == 4
    assert at_dealer["crypten_espn_dealer_connections_total[server]"] == 1


def test_hosts_of_one_process_count_apart(model: MaskedModel, run: Run) -> None:
    first, second = serving(model, run), serving(model, run)
    with connect(first.server.address, link=first.link) as client:
        client.predict(first.inputs[:1])
    first.server.close()
    name = "crypten_espn_server_inferences_total[]"
    assert (values(first.server)[name], values(second.server)[name]) == (1, 0)


def test_health_is_ready_until_the_host_stops(served: Served) -> None:
    with Admin(served.server, "127.0.0.1:0") as admin:
        while ask(admin.address, "/health")[0] != 200:
            pass  # its thread has not begun to look for connections
        for path in ("/health/live", "/health/ready"):
            status, text = ask(admin.address, path)
            assert status == 200
            assert json.loads(text) == {"role": "server", "live": True, "ready": True}
        served.server.close()
        status, text = ask(admin.address, "/health")
        assert status == 503 and json.loads(text)["ready"] is False
        assert ask(admin.address, "/health/ready")[0] == 503
        assert ask(admin.address, "/anything")[0] == 404


def test_a_port_alone_is_of_this_machine(served: Served) -> None:
    with Admin(served.dealer, "0") as admin:
        assert admin.address.startswith("127.0.0.1:")


def test_an_address_in_use_is_refused_by_name(served: Served) -> None:
    with pytest.raises(TransportError, match="--admin"):
        Admin(served.server, served.server.address)


def test_whoever_asks_half_a_question_delays_nobody(served: Served) -> None:
    with (
        Admin(served.server, "0") as admin,
        socket.create_connection(parse_address(admin.address), timeout=20) as half,
    ):
        half.sendall(b"GET /metr")
        assert ask(admin.address, "/metrics")[0] == 200
