"""A sidecar over HTTP: right answers, and a named refusal for everything else."""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crypten_espn.bundle import Bundle, Description
from crypten_espn.bundle.images import decode_image
from crypten_espn.errors import PeerError, TransportError
from crypten_espn.masked.inference import client as inference
from crypten_espn.serving.client import Client, connect
from crypten_espn.serving.events import (
    Inference,
    InferenceBegun,
    PlanChanged,
    Reachable,
    Repeated,
    RequestRefused,
    Unreachable,
)
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.quota import Quota
from crypten_espn.serving.server import ModelServer
from crypten_espn.sidecar.limits import SidecarLimits
from crypten_espn.sidecar.running import Sidecar
from crypten_espn.wire.connect import parse_address

from ..masked.cases import planned
from ..serving.conftest import Heard, Run
from .conftest import IMAGES, Beside, Start, photo

INFER = "/v2/models/model/infer"


def test_requests_in_json_and_in_bytes_get_the_networks_logits(beside: Beside) -> None:
    x = beside.inputs[:2]
    answer = beside.infer(beside.request(x))
    assert answer.status == 200 and beside.is_right(x, answer)
    request = beside.request(x, parameters={"binary_data_size": 4 * x.numel()})
    del request["inputs"][0]["data"]
    request["parameters"] = {"binary_data_output": True}
    head = json.dumps(request).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    answer = beside.ask("POST", INFER, head + x.numpy().tobytes(), **length)
    assert answer.status == 200
    start = int(answer.headers["inference-header-content-length"])
    logits = np.frombuffer(answer.body[start:], "<f4").reshape(2, -1)
    assert np.abs(logits - beside.network(x).numpy()).max() < 0.02
    version = "/v2/models/model/versions/1/infer"
    body = json.dumps(beside.request(x[:1])).encode()
    assert beside.is_right(x[:1], beside.ask("POST", version, body))


def test_health_and_metadata_are_answered(beside: Beside) -> None:
    about = beside.ask("GET", "/v2").json
    assert about["name"] == "crypten-espn"
    assert about["extensions"] == ["binary_tensor_data", "classification"]
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert beside.ask("GET", path).status == 200
    for path in ("/v2/models/model", "/v2/models/model/versions/1"):
        assert beside.ask("GET", path).json == beside.model.metadata()
        ready = beside.ask("GET", f"{path}/ready")
        assert ready.status == 200 and ready.json == {"name": "model", "ready": True}


@pytest.mark.parametrize(
    ("method", "path", "status", "named"),
    [
        ("GET", "/v2/models/other", 404, "model 'other' of version '1'"),
        ("GET", "/v2/models/model/versions/2", 404, "of version '2'"),
        ("POST", "/v2/models/other/infer", 404, "'other'"),
        ("GET", "/v2/models/other/ready", 404, "'other'"),
        ("GET", "/v3", 404, "GET '/v3' is not known here"),
        ("GET", INFER, 405, "is not known here"),
        ("PUT", INFER, 405, "is not known here"),
        ("DELETE", "/", 405, "is not known here"),
    ],
)
def test_another_path_model_or_method_is_refused_by_name(
    beside: Beside, method: str, path: str, status: int, named: str
) -> None:
    answer = beside.ask(method, path)
    assert answer.status == status and named in answer.json["error"]


def test_an_input_that_is_refused_stays_here_and_costs_nothing(
    beside: Beside,
    heard: Heard,
) -> None:
    x = beside.inputs[:1]
    nan = json.dumps(beside.request(x)).replace("[", "[NaN, ", 1).encode()
    size = {"binary_data_size": 4 * x.numel()}
    for wrong, named in (
        (beside.request(3 * x), "RangeError: .*unlike those"),
        (beside.request(1e30 * x), "RangeError"),
        (beside.request(1e300 * x.double()), "RangeError: .*NaN or infinite"),
        (beside.request(x[..., :7]), "ShapeError"),
        (beside.request(x, datatype="INT64"), "DataError"),
        (beside.request(x.repeat(17, 1, 1, 1)), "LimitError"),
    ):
        answer = beside.infer(wrong)
        assert answer.status == (413 if named == "LimitError" else 400)
        assert_named(answer.json["error"], named)
    answer = beside.ask("POST", INFER, nan)
    assert answer.status == 400 and answer.json["error"].startswith("DataError")
    request = beside.request(x, parameters=size)
    del request["inputs"][0]["data"]
    head = json.dumps(request).encode()
    for value in (np.nan, np.inf):
        data = np.full(x.numel(), value, dtype="<f4").tobytes()
        answer = beside.ask(
            "POST",
            INFER,
            head + data,
            Inference_Header_Content_Length=str(len(head)),
        )
        assert answer.status == 400
        assert_named(answer.json["error"], "RangeError: .*NaN or infinite")
    assert not heard.of("client", InferenceBegun)
    reasons = {event.reason for event in heard.of("app", RequestRefused)}
    assert {"RangeError", "ShapeError", "DataError"} <= reasons
    assert beside.is_right(x, beside.infer(beside.request(x)))


def assert_named(text: str, pattern: str) -> None:
    assert re.match(pattern, text), text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [INFER, "/image"])
def test_a_page_of_another_site_is_refused(
    beside: Beside, path: str, headers: dict[str, str], heard: Heard
) -> None:
    body = json.dumps(beside.request(beside.inputs[:1])).encode()
    answer = beside.ask("POST", path, body, **headers)
    assert answer.status == 403 and answer.json["error"]
    assert not heard.of("client", InferenceBegun)


def test_its_own_page_and_its_own_names_are_answered(beside: Beside) -> None:
    _, port = parse_address(beside.address)
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        answer = beside.ask("GET", "/image", Host=host, Origin=f"http://{host}")
        assert answer.status == 200, answer.json


def test_every_answer_forbids_other_sites_and_other_scripts(beside: Beside) -> None:
    for answer in (
        beside.ask("GET", "/"),
        beside.ask("GET", "/v3"),
        beside.ask("GET", "/v2", Host="evil.example"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "*" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers


def test_a_body_is_refused_by_its_size_before_it_is_read(start: Start) -> None:
    beside = start(limits=SidecarLimits(batch=1, image_bytes=100, held_bytes=50_000))
    for path, limit in ((INFER, beside.model.body_bytes), ("/image", 100)):
        answer = announced(beside, path, limit + 1)
        assert answer.startswith(b"HTTP/1.1 413") and b"the most" in answer
    answer = announced(beside, INFER, 60_000)
    assert answer.startswith(b"HTTP/1.1 503") and b"LimitError" in answer
    chunks = b"10000\r\n" + bytes(1 << 16) + b"\r\n0\r\n\r\n"
    answer = announced(beside, "/image", None, chunks)
    assert answer.startswith(b"HTTP/1.1 413")
    whole = beside.ask("POST", INFER, b"{}", Content_Encoding="gzip")
    assert whole.status == 415 and "'gzip'" in whole.json["error"]
    for length in ("-1", "x", "9" * 16):
        named = {"Inference_Header_Content_Length": length}
        whole = beside.ask("POST", INFER, b"{}", **named)
        assert whole.status == 400 and "Content-Length" in whole.json["error"]


def announced(beside: Beside, path: str, size: int | None, body: bytes = b"") -> bytes:
    """What is answered to a body of which only this beginning is sent."""
    length = f"Content-Length: {size}"
    if size is None:
        length = "Transfer-Encoding: chunked"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}"
    with socket.create_connection(parse_address(beside.address), timeout=60) as sock:
        sock.sendall(f"{head}\r\n\r\n".encode() + body)
        with sock.makefile("rb") as answer:
            return answer.read()


def test_a_body_that_does_not_come_is_refused_and_delays_nobody(start: Start) -> None:
    beside = start(limits=SidecarLimits(request_s=0.2))
    assert announced(beside, INFER, 10).startswith(b"HTTP/1.1 408")
    x = beside.inputs[:1]
    assert beside.is_right(x, beside.infer(beside.request(x)))


def test_a_request_of_more_than_a_batch_is_cut(start: Start, heard: Heard) -> None:
    beside = start(size=3)
    x = beside.inputs.repeat(2, 1, 1, 1)
    assert beside.is_right(x, beside.infer(beside.request(x)))
    assert [event.batch for event in heard.of("client", Inference)] == [3, 3, 2]


def test_a_quota_that_is_used_up_is_told_by_name(start: Start, tmp_path: Path) -> None:
    day = datetime.date(2026, 11, 26)
    beside = start(quota=Quota(2, tmp_path / "quota.json", today=lambda: day))
    x = beside.inputs[:1]
    for _ in range(2):
        assert beside.infer(beside.request(x)).status == 200
    answer = beside.infer(beside.request(x))
    assert answer.status == 503 and answer.json["error"].startswith("QuotaError: ")


def test_a_limit_of_the_server_is_told_by_name(start: Start) -> None:
    beside = start(server_limits=Limits(batch=2), size=4)
    answer = beside.infer(beside.request(beside.inputs))
    assert answer.status == 503 and answer.json["error"].startswith("LimitError: ")
    x = beside.inputs[:1]
    assert beside.is_right(x, beside.infer(beside.request(x)))


def test_a_server_that_is_gone_is_told_and_found_again(
    start: Start, heard: Heard, run: Run
) -> None:
    beside = start(timeout=5)
    x, address = beside.inputs[:1], beside.server.address
    assert beside.infer(beside.request(x)).status == 200
    beside.server.close()
    # A sidecar that only waits notices it too.
    (gone,) = heard.wait("asking", Unreachable)
    assert "Cannot reach the server" in gone.reason
    assert beside.ask("GET", "/v2/health/ready").status == 503
    assert beside.ask("GET", "/v2/health/live").status == 200
    link = Link(beside.dealer.address, timeout=20)
    run(ModelServer(beside.server.bundle, address, link=link))
    heard.wait("asking", Reachable)
    assert beside.ask("GET", "/v2/health/ready").status == 200
    assert beside.is_right(x, beside.infer(beside.request(x)))


def test_a_request_whose_connection_breaks_is_asked_once_more(
    beside: Beside, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under new masks: the material of the first attempt is never used again."""
    x = beside.inputs[:1]
    broken: list[bool] = []

    def breaking(*args):
        part = inference(*args)
        answer = yield next(part)
        if not broken:
            broken.append(True)
            raise PeerError("The connection broke.")
        try:
            while True:
                answer = yield part.send(answer)
        except StopIteration as end:
            return end.value

    monkeypatch.setattr("crypten_espn.serving.client.inference", breaking)
    assert beside.is_right(x, beside.infer(beside.request(x)))
    (repeated,) = heard.of("asking", Repeated)
    assert repeated.inputs == 1 and "The connection broke" in repeated.reason
    begun = [(e.session, e.index) for e in heard.of("client", InferenceBegun)]
    assert len(begun) == len(set(begun)) == 2


def test_more_requests_than_may_wait_are_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = start(limits=SidecarLimits(waiting=1))
    x, go, begun = beside.inputs[:1], threading.Event(), threading.Event()
    encode = type(beside.model.plan).decode

    def held(*args, **options):
        begun.set()
        assert go.wait(60)
        return encode(*args, **options)

    monkeypatch.setattr(type(beside.model.plan), "decode", held)
    statuses: list[int] = []

    def one() -> None:
        statuses.append(beside.infer(beside.request(x)).status)

    first = threading.Thread(target=one)
    first.start()
    assert begun.wait(60)
    others = [threading.Thread(target=one) for _ in range(4)]
    for thread in others:
        thread.start()
    while len(statuses) < 3:
        pass
    go.set()
    for thread in (first, *others):
        thread.join(60)
    assert sorted(statuses) == [200, 200, 503, 503, 503]


def never() -> Client:
    raise AssertionError("nothing is connected to before it listens")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"])
def test_it_does_not_listen_beyond_this_host_unless_told_to(address: str) -> None:
    with pytest.raises(TransportError, match=r"beyond this host.*--expose"):
        Sidecar(never, address)


def test_an_address_in_use_is_named(beside: Beside) -> None:
    with pytest.raises(TransportError, match=r"Cannot listen on .* for --listen"):
        Sidecar(never, beside.address)


def test_it_answers_to_the_names_that_it_is_exposed_under(beside: Beside) -> None:
    link = Link(beside.dealer.address, timeout=20)
    with Sidecar(
        lambda: connect(beside.server.address, link=link),
        "0.0.0.0:0",
        expose=["sidecar.internal"],
    ) as exposed:
        thread = threading.Thread(target=exposed.run)
        thread.start()
        there = Beside(**{**vars(beside), "sidecar": exposed})
        _, port = parse_address(exposed.address)
        try:
            for host, status in (("sidecar.internal", 200), ("other", 403)):
                assert there.ask("GET", "/v2", Host=f"{host}:{port}").status == status
        finally:
            exposed.stop()
            thread.join(60)


@pytest.mark.parametrize("count", [5, 3], ids=["same shapes", "other shapes"])
def test_a_server_with_another_network_is_followed(
    start: Start, heard: Heard, run: Run, count: int
) -> None:
    beside = start()
    x, address = beside.inputs[:1], beside.server.address
    assert beside.infer(beside.request(x)).status == 200
    beside.server.close()
    layers = torch.nn.Flatten(), torch.nn.Linear(192, count)
    network = torch.nn.Sequential(*layers).eval().requires_grad_(False)
    other = planned(network, beside.inputs)
    link = Link(beside.dealer.address, timeout=20)
    bundle = Bundle(other, Description(classes=tuple("abcde"[:count])))
    run(ModelServer(bundle, address, link=link))
    (change,) = heard.wait("asking", PlanChanged)
    assert change.now == other.plan.digest.hex()[:16] != change.before
    beside.network = network
    assert beside.is_right(x, beside.infer(beside.request(x)))
    (output,) = beside.ask("GET", "/v2/models/model").json["outputs"]
    assert output["shape"] == [-1, count]
    assert beside.ask("GET", "/image").json["images"] is False


def test_an_image_gets_classes_and_what_the_server_saw(
    start: Start, tmp_path: Path
) -> None:
    beside = start()
    data = photo()
    answer = beside.ask("POST", "/image", data).json
    x = decode_image(data, preprocessing=IMAGES, shape=(3, 8, 8))
    best = int(beside.network(x).argmax())
    assert answer["classes"][0]["name"] == f"class {best}"
    scores = [one["score"] for one in answer["classes"]]
    assert scores == sorted(scores, reverse=True) and abs(sum(scores) - 1) < 1e-6
    assert answer["seconds"] > 0 and min(answer["sent"], answer["received"]) > 0
    kind, _, encoded = answer["masked"].partition(",")
    assert kind == "data:image/png;base64"
    seen = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert seen.size == (8, 8) and seen.mode == "RGB"
    again = beside.ask("POST", "/image", data).json
    assert again["masked"] != answer["masked"]  # under another mask


@pytest.mark.parametrize("data", [b"", b"no image", b"GIF89a"])
def test_what_is_no_image_is_refused(beside: Beside, data: bytes) -> None:
    answer = beside.ask("POST", "/image", data)
    assert answer.status == 400 and answer.json["error"].startswith("DataError: the im")


def test_images_are_refused_where_nothing_is_said_of_them(start: Start) -> None:
    beside = start(described=Description())
    assert beside.ask("GET", "/image").json["images"] is False
    answer = beside.ask("POST", "/image", photo())
    assert answer.status == 400 and "does not say how images" in answer.json["error"]


def test_a_fault_of_its_own_tells_nothing(
    beside: Beside, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("secret 1.2345")

    monkeypatch.setattr("crypten_espn.sidecar.tensors.Model.write", failing)
    answer = beside.infer(beside.request(beside.inputs[:1]))
    assert answer.status == 500 and answer.json == {"error": "internal error"}
    assert "RuntimeError at" in caplog.text and "secret" not in caplog.text
