"""`crypten-espn keys`: an authority and certificates with roles in one command."""

from __future__ import annotations

import datetime
import os
import ssl
import stat

import pytest
from cryptography import x509

from crypten_espn.errors import TransportError
from crypten_espn.keys import make_keys
from crypten_espn.wire.tls import TLS


def load(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_each_party_gets_a_certificate_that_says_what_it_is(tmp_path):
    keys = make_keys(
        tmp_path / "keys",
        servers=["model.example,10.0.0.5", "::1"],
        dealers=["10.0.0.7"],
        clients=["alice", "bob"],
    )
    assert [key.role for key in keys] == ["server"] * 2 + ["dealer"] + ["client"] * 2
    for key in keys:
        assert TLS(key.certificate, key.key, key.authority).role == key.role
        certificate = load(key.certificate)
        certificate.verify_directly_issued_by(load(key.authority))
        span = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert span < datetime.timedelta(days=826)
        names = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
        hosts = [
            *names.get_values_for_type(x509.DNSName),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        ]
        assert hosts == ([] if key.role == "client" else list(key.names))
    assert len({load(key.certificate).serial_number for key in keys}) == 5


def test_openssl_accepts_them_strictly(tmp_path):
    server, client = make_keys(tmp_path, servers=["localhost"], clients=["alice"])
    contexts = []
    for key, protocol in (
        (server, ssl.PROTOCOL_TLS_SERVER),
        (client, ssl.PROTOCOL_TLS_CLIENT),
    ):
        context = ssl.SSLContext(protocol)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(key.certificate, key.key)
        context.load_verify_locations(key.authority)
        contexts.append(context)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        contexts[0].wrap_bio(up, down, server_side=True),
        contexts[1].wrap_bio(down, up, server_hostname="localhost"),
    ]
    done = set()
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    assert done == set(ends) and ends[1].getpeercert() and ends[0].getpeercert()


def test_every_file_is_its_owners_alone(tmp_path):
    old = os.umask(0)
    try:
        make_keys(tmp_path / "keys", servers=["localhost"], clients=["alice"])
    finally:
        os.umask(old)
    folder = tmp_path / "keys"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()]
    assert modes == [0o600] * 6


def test_an_authority_is_used_again_and_nothing_is_overwritten(tmp_path):
    make_keys(tmp_path, clients=["alice"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TransportError, match=r"client-alice\.pem exists already"):
        make_keys(tmp_path, clients=["bob", "alice"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (bob,) = make_keys(tmp_path, clients=["bob"])
    load(bob.certificate).verify_directly_issued_by(load(tmp_path / "authority.pem"))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + 2


def test_no_link_is_followed(tmp_path):
    victim = tmp_path / "victim"
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "client-alice.key").symlink_to(victim)
    with pytest.raises(TransportError, match=r"client-alice\.key exists already"):
        make_keys(folder, clients=["alice"])
    (folder / "authority.key").symlink_to(victim)
    (folder / "authority.pem").symlink_to(victim)
    with pytest.raises(TransportError):
        make_keys(folder, clients=["bob"])
    assert not victim.exists()


def test_an_authority_that_cannot_be_used_is_named(tmp_path):
    make_keys(tmp_path / "a", clients=["alice"])
    make_keys(tmp_path / "b", clients=["alice"])
    key = tmp_path / "a" / "authority.key"
    kept = key.read_bytes()
    key.write_bytes((tmp_path / "b" / "authority.key").read_bytes())
    with pytest.raises(TransportError, match="are not a certificate and its key"):
        make_keys(tmp_path / "a", clients=["bob"])
    key.write_bytes(kept[:100])
    with pytest.raises(TransportError, match="are not a certificate and its key"):
        make_keys(tmp_path / "a", clients=["bob"])
    key.unlink()
    with pytest.raises(TransportError, match=r"holds only authority\.pem"):
        make_keys(tmp_path / "a", clients=["bob"])


@pytest.mark.parametrize(
    "asked, message",
    [
        ({}, "No certificate was asked for"),
        ({"servers": ["model.example:29500"]}, "without a port"),
        ({"servers": ["*.example"]}, "neither a host's name nor an address"),
        ({"dealers": ["300.1.1.1"]}, "neither a host's name nor an address"),
        ({"servers": ["../../etc/passwd"]}, "neither a host's name nor an address"),
        ({"servers": [""]}, "neither a host's name nor an address"),
        ({"clients": ["../alice"]}, "is not a client's name"),
        ({"clients": ["alice", "alice"]}, "exists already|twice"),
    ],
)
def test_what_cannot_be_issued_is_named_and_leaves_nothing(tmp_path, asked, message):
    with pytest.raises(TransportError, match=message):
        make_keys(tmp_path / "keys", **asked)
    assert not (tmp_path / "keys").exists()


def test_the_command_prints_each_partys_options(tmp_path, capsys):
    from crypten_espn.cli import main

    folder = tmp_path / "keys"
    asked = ["--server", "localhost", "--dealer", "127.0.0.1", "--client", "a", "b"]
    assert main(["keys", str(folder), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = [line.split() for line in lines if "--tls" in line]
    assert [TLS(*words[1:]).role for words in options] == [
        "server", "dealer", "client", "client",
    ]  # fmt: skip
    assert "authority.key" in lines[-1]
    assert main(["keys", str(folder), "--client", "a"]) == 2
    assert "exists already" in capsys.readouterr().err
