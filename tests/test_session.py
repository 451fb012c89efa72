"""Sessions: three processes agree with plaintext; a dead peer is an error in time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch

import crypten_espn as espn
from crypten_espn import session
from crypten_espn.errors import (
    EspnError,
    MaterialError,
    PeerError,
    PlanError,
    PlanMismatchError,
    RangeError,
    ShapeError,
)
from crypten_espn.wire.channel import Channel
from crypten_espn.wire.connect import connect_channel

from .masked.cases import planned, residual
from .wire.cases import certificates


@pytest.fixture(scope="module")
def model():
    return session.MaskedModel(*planned(*residual()))


def start(server):
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    server.thread = thread
    return server


@pytest.fixture
def running():
    """Start servers; stop them when the test ends."""
    started = []

    def run(server):
        started.append(start(server))
        return server

    yield run
    for server in started:
        server.close()
        server.thread.join(5)
        assert not server.thread.is_alive()


@pytest.fixture
def pair(model, running):
    dealer = running(session.DealerServer("127.0.0.1:0", timeout=10))
    server = running(
        session.ModelServer(model, "127.0.0.1:0", dealer=dealer.address, timeout=10)
    )
    return server, dealer


def test_simulate_in_three_processes():
    network, example = residual()
    private = espn.convert(network, example)
    logits, cost = session.simulate(private, example, example=example)
    assert isinstance(cost, session.SessionCost)
    assert logits.shape == (4, 5)
    assert float((logits - network(example)).abs().max()) < 0.01
    plan, _ = planned(network, example)
    down, up = plan.online_bytes(batch=4)
    assert cost.rounds == plan.messages
    assert cost.bytes_sent == up + 20 * 4
    assert cost.peer_bytes_sent == down + 20 * 4
    assert cost.dealer_bytes_sent == plan.dealer_bytes(batch=4)
    assert cost.seconds > 0 and cost.offline.seconds > 0


def test_a_large_batch_takes_no_more_rounds(pair):
    server, dealer = pair
    x = torch.randn(9, 3, 8, 8)
    with session.connect(server.address, dealer=dealer.address, timeout=10) as client:
        alone = client.predict(x[:1])
        assert client.online.rounds == client.plan.messages
        together = client.predict(x)
        assert client.online.rounds == 2 * client.plan.messages
    assert float((alone - together[:1]).abs().max()) < 0.01


def test_simulate_checks_before_it_starts_a_process():
    network, example = residual()
    private = espn.convert(network, example)
    start = time.monotonic()
    with pytest.raises(ShapeError):
        session.simulate(private, torch.zeros(1, 3, 9, 9), example=example)
    with pytest.raises(RangeError, match="NaN"):
        session.simulate(private, example * float("nan"), example=example)
    assert time.monotonic() - start < 2
    with pytest.raises(PlanError, match="give example="):
        session.masked_model(torch.nn.Identity())


@pytest.mark.parametrize("mode", ["owner", "shared"])
def test_predict_over_sockets(mode, running):
    network, example = residual()
    model = session.MaskedModel(*planned(network, example, mode=mode))
    dealer = running(session.DealerServer("127.0.0.1:0", timeout=10))
    server = running(
        session.ModelServer(model, "127.0.0.1:0", dealer=dealer.address, timeout=10)
    )
    with session.connect(server.address, dealer=dealer.address, timeout=10) as client:
        assert client.plan == model.plan
        client.prepare(2)
        assert client.remaining == 2
        for i in range(3):  # the third prepares on its own
            logits = client.predict(example[i : i + 1])
            expected = network(example[i : i + 1])
            assert float((logits - expected).abs().max()) < 0.01
        client.prepare(1, batch=3)
        assert client.predict(example[:3]).shape == (3, 5)
        client.prepare(1, batch=2)
        with pytest.raises(MaterialError, match="batches of 2"):
            client.predict(example[:3])
        assert client.predict(example[:2]).shape == (2, 5)
    deadline = time.monotonic() + 5  # rank 0 counts after rank 1 has its logits
    while server.served < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.served == 5


def test_two_clients_at_once(pair):
    server, dealer = pair
    network, example = residual()

    def one(results):
        with session.connect(
            server.address, dealer=dealer.address, timeout=10
        ) as client:
            for i in range(3):
                logits = client.predict(example[i : i + 1])
                error = (logits - network(example[i : i + 1])).abs().max()
                results.append(float(error))

    results: list[float] = []
    threads = [threading.Thread(target=one, args=(results,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 6 and max(results) < 0.01


def test_many_in_flight(pair):
    server, dealer = pair
    network, example = residual()
    inputs = [example[i % 4 : i % 4 + 1] for i in range(10)]
    with session.connect(server.address, dealer=dealer.address, timeout=10) as client:
        for _ in range(2):
            results = client.predict_many(inputs, in_flight=4)
            for x, logits in zip(inputs, results, strict=True):
                assert float((logits - network(x)).abs().max()) < 0.01
        assert client.predict_many([]) == []
        with pytest.raises(ShapeError):
            client.predict_many([example[:1], torch.zeros(1, 3, 9, 9)])
    assert server.served == 20


def test_no_weight_reaches_the_client(pair, model, monkeypatch):
    """Nothing rank 1 receives holds a layer's weights, in ring form or as text."""
    server, dealer = pair
    received: list[bytes] = []
    original = Channel._receive

    def record(self, *arguments):
        buffers = original(self, *arguments)
        if self.peer == "the server":
            received.extend(bytes(buffer) for buffer in buffers)
        return buffers

    monkeypatch.setattr(Channel, "_receive", record)
    _, example = residual()
    with session.connect(server.address, dealer=dealer.address, timeout=10) as client:
        client.predict(example[:1])
    assert len(received) > 8
    stream = b"".join(received)
    for array in (*model.weights.integers, *model.weights.biases):
        if array is None or not array.any():
            continue
        flat = array.reshape(-1)[:4]
        assert flat.tobytes() not in stream
        for value in flat:  # nor in the plan's text
            assert f'"weights":[{value}' not in stream.decode("latin-1")


def test_another_plan_is_refused_on_both_sides(pair, model):
    server, _ = pair
    other, _ = planned(*residual(), precision="high")
    with pytest.raises(PlanMismatchError) as error:
        session.connect(server.address, plan=other, timeout=5)
    for digest in (other.digest, model.plan.digest):
        assert digest.hex()[:16] in str(error.value)


def test_without_a_dealer_both_sides_say_so(model, running, pair):
    _, dealer = pair
    alone = running(session.ModelServer(model, "127.0.0.1:0", timeout=5))
    with (
        session.connect(alone.address, dealer=dealer.address, timeout=5) as client,
        pytest.raises(PeerError, match="Rank 0 knows no dealer"),
    ):
        client.prepare()
    server, _ = pair
    with (
        session.connect(server.address, timeout=5) as client,
        pytest.raises(MaterialError, match="no dealer is known"),
    ):
        client.predict(torch.zeros(1, 3, 8, 8))


def test_unreachable_and_silent_servers_are_errors_in_time():
    start = time.monotonic()
    with pytest.raises(PeerError, match="Cannot reach"):
        session.connect("127.0.0.1:1", timeout=0.5)
    from crypten_espn.wire.connect import Listener

    with Listener("127.0.0.1:0", role="server") as silent:
        with pytest.raises(PeerError, match="silent"):
            session.connect(silent.address, timeout=0.5)
        with contextlib.closing(silent.accept(timeout=1)):
            pass
    assert time.monotonic() - start < 5


def test_server_that_dies_mid_inference(pair, model, monkeypatch):
    server, dealer = pair
    _, example = residual()
    with session.connect(server.address, dealer=dealer.address, timeout=2) as client:
        client.prepare(1)

        def die(*arguments, **options):
            for channel in server._channels:
                channel.close()
            raise PeerError("gone")

        monkeypatch.setattr(session, "serve_one", die)
        start = time.monotonic()
        with pytest.raises(PeerError):
            client.predict(example[:1])
        assert time.monotonic() - start < 5


def test_client_that_dies_leaves_the_server_serving(pair):
    server, dealer = pair
    network, example = residual()
    client = session.connect(server.address, dealer=dealer.address, timeout=5)
    client.prepare(1)
    client._channel.close()
    client._party.close()
    with session.connect(server.address, dealer=dealer.address, timeout=5) as client:
        logits = client.predict(example[:1])
        assert float((logits - network(example[:1])).abs().max()) < 0.01


@pytest.mark.parametrize(
    "message",
    [
        b"not json",
        b"[]",
        json.dumps({"session": "../../etc"}).encode(),
        json.dumps({"session": "0" * 32}).encode(),
    ],
)
def test_hostile_clients_are_dropped(pair, message):
    server, dealer = pair
    with connect_channel(
        server.address, role="client", peer_role="server", timeout=3
    ) as channel:
        channel.handshake(digest=bytes(32))
        channel.send_bytes(message)
        with pytest.raises(PeerError):
            channel.receive_bytes()
    with session.connect(server.address, dealer=dealer.address, timeout=5) as client:
        assert client.predict(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


def test_material_is_dealt_once_whoever_asks_again(pair, monkeypatch):
    """Rank 0 refuses; if it does not, the dealer does, before a value is sent."""
    server, dealer = pair
    monkeypatch.setattr(session.Client, "_first_free", lambda client: 0)
    with session.connect(server.address, dealer=dealer.address, timeout=10) as client:
        client.prepare(2)
        with pytest.raises(PeerError, match="Inference 0 was prepared before"):
            client.prepare(1)
    with session.connect(server.address, dealer=dealer.address, timeout=10) as client:
        client.prepare(2)
        (party,) = server._sessions.values()
        monkeypatch.setattr(party.reserved, "add", lambda start, count: None)
        with pytest.raises(PeerError, match="Inference 0 was prepared before"):
            client.prepare(1)


def test_material_is_used_once_across_connections(pair):
    """A repeated index is refused by the server before it sends anything."""
    server, dealer = pair
    _, example = residual()
    with session.connect(server.address, dealer=dealer.address, timeout=5) as client:
        client.prepare(2)
        kept = client._party._ready[0]
        first = [array.copy() for array in kept.linear]
        client.predict(example[:1])
        kept.linear[:] = first
        client._party._ready[0] = kept
        client._party.batches[0] = 1
        with pytest.raises(PeerError, match="no unused material"):
            client.predict(example[:1])


SERVER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from crypten_espn import session
    from crypten_espn.masked.plan import Plan
    place = Path(sys.argv[1])
    model = session.MaskedModel(
        Plan.from_json((place / "plan").read_text()), session._load(place / "w.npz")
    )
    server = session.ModelServer(
        model, "127.0.0.1:0", dealer=sys.argv[2], directory=place / "server", timeout=5
    )
    print(server.address, flush=True)
    server.run()
    """
)
CLIENT = textwrap.dedent(
    """
    import sys, torch
    from crypten_espn import session
    address, dealer, folder, total = sys.argv[1:5]
    data = torch.load(folder + "/x.pt")
    with session.connect(
        address, dealer=dealer or None, directory=folder + "/client", timeout=5
    ) as client:
        if client.remaining == 0:
            client.prepare(int(total))
        print("ready", client.remaining, flush=True)
        for line in sys.stdin:
            i = int(line)
            logits = client.predict(data[i : i + 1])
            index = client._next - 1
            print(index, *logits[0].tolist(), flush=True)
    """
)


def spawn(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process):
    process.kill()
    process.wait(10)
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            stream.close()


@pytest.mark.slow
def test_kill_9_of_either_party_resumes_without_reuse(model, running, tmp_path):
    """Inferences from one directory, each party killed once: no index comes twice."""
    network, _ = residual()
    total = 24
    torch.manual_seed(9)
    data = torch.randn(total, 3, 8, 8)
    torch.save(data, tmp_path / "x.pt")
    (tmp_path / "plan").write_text(model.plan.to_json())
    session._save(tmp_path / "w.npz", model.weights)
    dealer = running(session.DealerServer("127.0.0.1:0", timeout=10))
    server = spawn(SERVER, tmp_path, dealer.address)
    address = server.stdout.readline().strip()
    client = spawn(CLIENT, address, dealer.address, tmp_path, total)
    used: list[int] = []
    done = 0
    kills = {5: "client", 12: "server"}
    try:
        assert client.stdout.readline().split() == ["ready", str(total)]
        while True:
            who = kills.pop(done, None)
            if who is not None:
                # In the middle: the request is under way when the party dies.
                client.stdin.write(f"{done}\n")
                client.stdin.flush()
                time.sleep(0.002)
                victim = client if who == "client" else server
                os.kill(victim.pid, signal.SIGKILL)
                line = client.stdout.readline().split()
                if line:  # it was faster than the kill
                    used.append(int(line[0]))
                if who == "server":
                    end(server)
                    server = spawn(SERVER, tmp_path, dealer.address)
                    address = server.stdout.readline().strip()
                end(client)
                client = spawn(CLIENT, address, "", tmp_path, 0)
                assert client.stdout.readline().startswith("ready")
            client.stdin.write(f"{done}\n")
            client.stdin.flush()
            line = client.stdout.readline().split()
            if not line:
                break  # exhausted: the client ended with MaterialError
            used.append(int(line[0]))
            logits = torch.tensor([float(v) for v in line[1:]])
            expected = network(data[done : done + 1])[0]
            assert float((logits - expected).abs().max()) < 0.01
            done += 1
            if done == total:
                break
        assert len(used) == len(set(used)) and used == sorted(used)
        # Each kill loses the record under way and at most the one loaded ahead.
        assert done >= total - 6
    finally:
        end(client)
        end(server)


def test_foreign_material_is_named_on_both_sides(pair, model, running, tmp_path):
    server, dealer = pair
    _, example = residual()
    with session.connect(
        server.address, dealer=dealer.address, directory=tmp_path / "c", timeout=5
    ) as client:
        client.prepare(2)
        client.predict(example[:1])
    with pytest.raises(EspnError):
        # This server kept its half in memory and has forgotten nothing, but another
        # server never had it.
        other = running(session.ModelServer(model, "127.0.0.1:0", timeout=5))
        session.connect(other.address, directory=tmp_path / "c", timeout=5)


def test_tls_session(model, running, tmp_path):
    tls = certificates(tmp_path)
    dealer = running(session.DealerServer("127.0.0.1:0", tls=tls["dealer"], timeout=5))
    server = running(
        session.ModelServer(
            model, "127.0.0.1:0", dealer=dealer.address, tls=tls["server"], timeout=5
        )
    )
    network, example = residual()
    with session.connect(
        server.address, dealer=dealer.address, tls=tls["client"], timeout=5
    ) as client:
        logits = client.predict(example[:1])
    assert float((logits - network(example[:1])).abs().max()) < 0.01
    with pytest.raises(PeerError):
        session.connect(server.address, timeout=1)


def test_weights_file_is_private_and_exact(model, tmp_path):
    session._save(tmp_path / "w.npz", model.weights)
    assert os.stat(tmp_path / "w.npz").st_mode & 0o077 == 0
    again = session._load(tmp_path / "w.npz")
    assert again.digest == model.weights.digest
    assert all(
        np.array_equal(a, b)
        for a, b in zip(again.integers, model.weights.integers, strict=True)
    )
