"""TLS: both sides show a certificate of their role, and of their host."""

from __future__ import annotations

import itertools
import logging
import os
import socket

import numpy as np
import pytest
import trustme

from crypten_espn.errors import PeerError, TransportError
from crypten_espn.keys import make_keys
from crypten_espn.wire.connect import Listener, connect_channel
from crypten_espn.wire.frames import ROLES
from crypten_espn.wire.tls import ROLE_URI, TLS

from .cases import certificates, in_thread

DIGEST = bytes(32)
WRONG = list(itertools.permutations(ROLES, 2))


def meet(here, there, *, expects, wants, address="127.0.0.1"):
    """Both ends' outcomes: the peer's role after the greeting, or the error.

    Args:
        here, there: certificates of the side that listens and of the other.
        expects, wants: which role each takes the other for.
    """

    def greet(opened):
        try:
            with opened() as channel:
                return channel.handshake(digest=DIGEST)
        except PeerError as error:
            return error

    with Listener("127.0.0.1:0", role=here.role, tls=here) as listener:
        port = listener.address.rpartition(":")[2]
        other = in_thread(
            lambda: greet(
                lambda: connect_channel(
                    f"{address}:{port}",
                    role=there.role,
                    peer_role=wants,
                    tls=there,
                    timeout=20,
                )
            )
        )
        incoming = listener.accept(timeout=20)
        first = greet(lambda: incoming.open(peer_roles=expects, timeout=20))
        return first, other.result()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return certificates(tmp_path_factory.mktemp("keys") / "tls")


def test_each_side_knows_the_others_role(tls):
    pairs = [("server", "client"), ("dealer", "server"), ("dealer", "client")]
    for here, there in pairs:
        found = meet(tls[here], tls[there], expects=("server", "client"), wants=here)
        assert found == (there, here)


@pytest.mark.parametrize(("shown", "expected"), WRONG)
def test_a_wrong_role_is_refused_by_name_on_both_sides(tls, shown, expected):
    named = f"expects the certificate of a {expected}, and was shown that of a {shown}"
    (third,) = set(ROLES) - {shown, expected}
    connecting = meet(tls[third], tls[shown], expects=(expected,), wants=third)
    listening = meet(tls[shown], tls[third], expects=(third,), wants=expected)
    for outcome in (*connecting, *listening):
        assert isinstance(outcome, PeerError)
        assert named in str(outcome)


@pytest.mark.parametrize(("shown", "claimed"), WRONG)
def test_no_side_takes_a_role_that_its_certificate_has_not(tls, shown, claimed):
    named = f"This side is the {claimed}, and .* is the certificate of a {shown}"
    with pytest.raises(TransportError, match=named):
        Listener("127.0.0.1:0", role=claimed, tls=tls[shown])
    with pytest.raises(TransportError, match=named):
        connect_channel("127.0.0.1:1", role=claimed, peer_role=shown, tls=tls[shown])


def test_the_host_must_be_the_certificates(tls, tmp_path):
    named = "The certificate of the server at 127.0.0.1 is for model.example"
    keys = make_keys(
        tls["server"].authority.parent, servers=["model.example", "localhost,127.0.0.1"]
    )
    foreign, both = (TLS(k.certificate, k.key, k.authority) for k in keys)
    for outcome in meet(foreign, tls["client"], expects=("client",), wants="server"):
        assert named in str(outcome)
    for address in ("localhost", "127.0.0.1"):
        found = meet(
            both, tls["client"], expects=("client",), wants="server", address=address
        )
        assert found == ("client", "server")


def foreign(folder, *, uris=(), host="127.0.0.1", authority=None):
    """A certificate that another tool made; its files and its authority."""
    authority = authority or trustme.CA()
    made = authority.issue_cert(host, *uris)
    paths = [folder / name for name in ("cert.pem", "cert.key", "ca.pem")]
    made.cert_chain_pems[0].write_to_path(paths[0])
    made.private_key_pem.write_to_path(paths[1])
    authority.cert_pem.write_to_path(paths[2])
    paths[1].chmod(0o600)
    return paths


def test_a_certificate_without_a_role_is_refused_before_listening(tmp_path):
    with pytest.raises(TransportError, match=r"cert\.pem has no role.*espn keys"):
        TLS(*foreign(tmp_path))


def test_a_peer_without_a_role_is_refused_by_name(tls, tmp_path, monkeypatch):
    """Such a peer does not check itself; here it claims to have read a role."""
    authority = trustme.CA()
    cert, key, ca = foreign(tmp_path, authority=authority)
    both = tmp_path / "both.pem"
    both.write_bytes(ca.read_bytes() + tls["server"].authority.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("crypten_espn.wire.tls._own_role", lambda path: "client")
        stranger = TLS(cert, key, both)
    server = TLS(tls["server"].certificate, tls["server"].key, both)
    for outcome in meet(server, stranger, expects=("client",), wants="server"):
        assert "and was shown one without a role" in str(outcome)


def test_another_authority_is_refused_on_both_sides(tls, tmp_path):
    stranger = certificates(tmp_path / "other")["client"]
    mixed = TLS(stranger.certificate, stranger.key, tls["server"].authority)
    first, second = meet(tls["server"], mixed, expects=("client",), wants="server")
    assert "TLS with the client failed: its certificate was not accepted" in str(first)
    assert "refused this side's certificate" in str(second)
    first, second = meet(tls["server"], stranger, expects=("client",), wants="server")
    assert "TLS with the server failed: its certificate was not accepted" in str(second)
    assert "refused this side's certificate" in str(first)


def test_an_expired_certificate_is_refused_on_both_sides(tls, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("crypten_espn.keys.CERTIFICATE_DAYS", 0)
        (key,) = make_keys(tls["server"].authority.parent, clients=["expired"])
    expired = TLS(key.certificate, key.key, key.authority)
    first, second = meet(tls["server"], expired, expects=("client",), wants="server")
    assert "its certificate was not accepted (certificate has expired)" in str(first)
    assert "refused this side's certificate" in str(second)


def test_tls_and_plain_tcp_do_not_meet(tls):
    with Listener("127.0.0.1:0", role="server", tls=tls["server"]) as listener:
        plain = connect_channel(listener.address, role="client", peer_role="server")
        plain.send_bytes(b"x" * 100)
        incoming = listener.accept(timeout=20)
        with plain, pytest.raises(PeerError, match=r"does not speak TLS"):
            incoming.open(peer_roles=("client",), timeout=20)


def test_silent_peers_keep_nobody_out(tls):
    with Listener("127.0.0.1:0", role="server", tls=tls["server"]) as listener:
        host, _, port = listener.address.rpartition(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(3)]
        waiting = [listener.accept(timeout=20) for _ in silent]
        other = in_thread(
            lambda: connect_channel(
                listener.address, role="client", peer_role="server", tls=tls["client"]
            )
        )
        incoming = listener.accept(timeout=20)
        with incoming.open(peer_roles=("client",)) as server, other.result() as client:
            client.send(np.arange(9), bits=64)
            assert np.array_equal(server.receive(9, bits=64), np.arange(9))
        with pytest.raises(PeerError, match="the handshake was not done in time"):
            waiting[0].open(peer_roles=("client",), timeout=0.05)
        for stranger in silent:
            stranger.close()
        for incoming in waiting:
            incoming.close()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_files_are_read_before_anything_is_connected(tls, tmp_path, part):
    names = ("certificate", "key", "authority")
    paths = [getattr(tls["server"], name) for name in names]
    paths[part] = tmp_path / "missing.pem"
    with pytest.raises(TransportError, match=r"missing\.pem cannot be read \(No such"):
        TLS(*paths)
    paths[part].write_text("not a certificate")
    paths[part].chmod(0o600)
    with pytest.raises(TransportError, match=r"missing\.pem"):
        TLS(*paths)


def test_a_key_of_another_certificate_is_named(tls):
    with pytest.raises(TransportError, match="are no certificate and its key"):
        TLS(tls["server"].certificate, tls["client"].key, tls["server"].authority)


def test_a_key_that_everybody_may_read_is_refused(tls, tmp_path, caplog):
    client = tls["client"]
    paths = [client.certificate, tmp_path / "client.key", client.authority]
    paths[1].write_bytes(client.key.read_bytes())
    os.chmod(paths[1], 0o644)
    with pytest.raises(TransportError, match=r"client\.key \(mode 644\); chmod 600"):
        TLS(*paths)
    os.chmod(paths[1], 0o640)
    with caplog.at_level(logging.WARNING):
        TLS(*paths)
    assert "client.key (mode 640)" in caplog.text


def test_several_roles_are_none(tmp_path, monkeypatch):
    from cryptography import x509

    real = x509.SubjectAlternativeName

    def several(names):
        extra = x509.UniformResourceIdentifier(ROLE_URI + "dealer")
        return real([*names, extra])

    with monkeypatch.context() as patch:
        patch.setattr(x509, "SubjectAlternativeName", several)
        (made,) = make_keys(tmp_path / "keys", clients=["alice"])
    with pytest.raises(TransportError, match="has no role"):
        TLS(made.certificate, made.key, made.authority)
