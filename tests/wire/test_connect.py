"""Listening and connecting: addresses, plain TCP, failures that are survived."""

from __future__ import annotations

import errno
import logging
import socket

import pytest

from crypten_espn.errors import PeerError, TransportError
from crypten_espn.wire.connect import Listener, connect_channel, parse_address

from .cases import in_thread


def connect(address, **options):
    return connect_channel(address, role="client", peer_role="server", **options)


def test_addresses_are_host_and_port():
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_address("host:29500") == ("host", 29500)
    for bad in ("host", ":80", "host:", "host:99999", "host:x", "::1:80", "h:\u0663"):
        with pytest.raises(PeerError, match="host:port"):
            parse_address(bad)


def test_a_server_that_does_not_listen_is_named_and_tried_until_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PeerError, match=f"Cannot reach the server at 127.0.0.1:{port}"):
        connect(f"127.0.0.1:{port}", timeout=0.2)
    # It comes up while the client is trying.
    other = in_thread(lambda: connect(f"127.0.0.1:{port}", timeout=20))
    with Listener(f"127.0.0.1:{port}", role="server") as listener:
        incoming = listener.accept(timeout=20)
        incoming.open(peer_roles=("client",)).close()
    other.result().close()


def test_a_host_that_is_none_fails_at_once(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(PeerError, match=r"the server, no\.such:1, cannot be resolved"):
        connect("no.such:1", timeout=3600)
    with pytest.raises(PeerError, match=r"listen on, no\.such:1, cannot be resolved"):
        Listener("no.such:1", role="server")


def test_port_0_is_for_listening_only():
    with pytest.raises(PeerError, match="names no port to connect to"):
        connect("127.0.0.1:0", timeout=3600)
    with Listener("127.0.0.1:0", role="server") as listener:
        assert 0 < parse_address(listener.address)[1] < 65536
        with pytest.raises(PeerError, match=r"Cannot listen on .* in use"):
            Listener(listener.address, role="server")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:29500"])
def test_plain_tcp_beyond_this_host_is_refused_by_name(address):
    with pytest.raises(TransportError, match=r"--tls.*crypten-espn keys.*--insecure"):
        Listener(address, role="server")
    if not address.endswith(":0"):
        with pytest.raises(TransportError, match=r"192\.0\.2\.1.*--tls.*--insecure"):
            connect(address, timeout=3600)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.8.8:0", "localhost:0"])
def test_plain_tcp_inside_this_host_is_allowed(address):
    with Listener(address, role="server") as listener:
        other = in_thread(lambda: connect(listener.address, timeout=20))
        incoming = listener.accept(timeout=20)
        with incoming.open(peer_roles=("client",)) as server, other.result() as client:
            client.send_bytes(b"here")
            assert server.receive_bytes() == b"here"


def test_plain_tcp_beyond_this_host_is_possible_when_asked_for():
    with Listener("0.0.0.0:0", role="server", insecure=True) as listener:
        assert listener.address.startswith("0.0.0.0:")


def test_nobody_who_connects_is_an_error_in_time():
    with (
        Listener("127.0.0.1:0", role="server") as listener,
        pytest.raises(PeerError, match=r"Nobody connected to .* within 0\.05 s"),
    ):
        listener.accept(timeout=0.05)


def test_closing_a_listener_ends_accept():
    listener = Listener("127.0.0.1:0", role="server")
    other = in_thread(listener.accept)
    listener.close()
    with pytest.raises(PeerError, match="is closed"):
        other.result()


def test_a_host_without_descriptors_goes_on_accepting(monkeypatch, caplog):
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.ECONNABORTED]

    def failing(self):
        if failures:
            raise OSError(failures.pop(), "no luck")
        return accept(self)

    with Listener("127.0.0.1:0", role="server") as listener:
        client = connect(listener.address, timeout=20)
        monkeypatch.setattr(socket.socket, "accept", failing)
        with caplog.at_level(logging.WARNING):
            incoming = listener.accept(timeout=20)
        with incoming.open(peer_roles=("client",)) as server, client:
            client.send_bytes(b"here")
            assert server.receive_bytes() == b"here"
    assert [record.getMessage().count("no luck") for record in caplog.records] == [1, 1]


def test_pace_is_asked_for_and_never_fails():
    with Listener("127.0.0.1:0", role="server") as listener:
        client = connect(listener.address, timeout=5)
        server = listener.accept(timeout=5).open(peer_roles=("client",))
        with client, server:
            for channel in (client, server):
                channel.pace()
            client.send_bytes(b"x" * 100_000)
            assert server.receive_bytes() == b"x" * 100_000


def test_a_vanished_host_is_noticed_on_both_sides_of_a_connection():
    """TCP's keepalive, for waits that have no time-out of their own."""
    with Listener("127.0.0.1:0", role="server") as listener:
        other = in_thread(
            lambda: connect_channel(
                listener.address, role="client", peer_role="server", timeout=20
            )
        )
        incoming = listener.accept(timeout=20)
        with incoming.open(peer_roles=("client",)) as here, other.result() as there:
            for channel in (here, there):
                sock = channel._stream.sock
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                assert idle <= 60
