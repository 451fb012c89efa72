"""Certificates that are replaced or revoked while a host runs."""

from __future__ import annotations

import hashlib
import logging
import shutil

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from crypten_espn.errors import RevokedError, TransportError
from crypten_espn.keys import make_keys
from crypten_espn.wire.connect import Listener, connect_channel
from crypten_espn.wire.tls import TLS

from .cases import certificates, in_thread


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


@pytest.fixture
def tls(folder):
    return certificates(folder)


def another(folder, role):
    """A second certificate of a role and the first one's name, by one authority."""
    name = "127.0.0.1" if role != "client" else "alice"
    aside = folder / "aside"
    aside.mkdir(exist_ok=True)
    for end in ("pem", "key"):
        (folder / f"{role}-{name}.{end}").rename(aside / f"{role}.{end}")
    (key,) = make_keys(folder, **{f"{role}s": [name]})
    for end in ("pem", "key"):  # back, and the new one beside
        path = folder / f"{role}-{name}.{end}"
        path.rename(folder / f"new-{role}.{end}")
        (aside / f"{role}.{end}").rename(path)
    made = TLS(folder / f"new-{role}.pem", folder / f"new-{role}.key", key.authority)
    return made


def fingerprint(path):
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def meet(listener, tls, *, address=None):
    """Both ends' channels."""
    other = in_thread(
        lambda: connect_channel(
            address or listener.address,
            role="client",
            peer_role="server",
            tls=tls,
            timeout=20,
        )
    )
    incoming = listener.accept(timeout=20)
    mine = in_thread(lambda: incoming.open(peer_roles=("client",), timeout=20))
    return mine, other


def shown(listener, tls):
    """The certificate that a new connection is shown."""
    mine, other = meet(listener, tls)
    with mine.result(), other.result() as channel:
        return channel.fingerprint


def test_new_connections_are_shown_the_new_certificate(folder, tls, caplog):
    caplog.set_level(logging.INFO, logger="crypten_espn.wire.tls")
    server = tls["server"]
    new = another(folder, "server")
    with Listener("127.0.0.1:0", role="server", tls=server) as listener:
        old = fingerprint(server.certificate)
        mine, other = meet(listener, tls["client"])
        with mine.result() as here, other.result() as there:
            assert there.fingerprint == old
            # The certificate without its key yet: the last pair stays in use.
            shutil.copy(new.certificate, server.certificate)
            assert shown(listener, tls["client"]) == old
            assert "the last certificate stays in use" in caplog.text
            shutil.copy(new.key, server.key)
            assert shown(listener, tls["client"]) == fingerprint(new.certificate) != old
            assert "read again" in caplog.text
            # Who is connected stays so, and what follows shows what was shown.
            here.send_bytes(b"still here")
            assert there.receive_bytes() == b"still here"
            assert here.tls.held() is here.tls


def test_a_certificate_of_another_role_does_not_take_the_place(folder, tls, caplog):
    server, dealer = tls["server"], tls["dealer"]
    with Listener("127.0.0.1:0", role="server", tls=server) as listener:
        old = fingerprint(server.certificate)
        shutil.copy(dealer.certificate, server.certificate)
        shutil.copy(dealer.key, server.key)
        assert shown(listener, tls["client"]) == old
        assert "is the certificate of a dealer, this is a server" in caplog.text
        listener.reload()  # asked for: it is looked at again, and stays
        assert shown(listener, tls["client"]) == old


def test_a_key_that_everybody_may_read_does_not_take_the_place(folder, tls, caplog):
    server, new = tls["server"], another(folder, "server")
    with Listener("127.0.0.1:0", role="server", tls=server) as listener:
        shutil.copy(new.certificate, server.certificate)
        shutil.copy(new.key, server.key)
        server.key.chmod(0o644)
        old = shown(listener, tls["client"])
        assert "Everybody on this host may use the private key" in caplog.text
        server.key.chmod(0o600)
        listener.reload()  # a mode is no change of the file
        assert old != shown(listener, tls["client"]) == fingerprint(new.certificate)


def refused(listener, tls):
    """What both sides raise."""
    mine, other = meet(listener, tls)
    with pytest.raises(RevokedError, match="certificate of a client was revoked"):
        mine.result()
    with (
        other.result() as channel,
        pytest.raises(RevokedError, match="the server stopped: RevokedError"),
    ):
        channel.receive_bytes()


@pytest.mark.parametrize("by", ["serial", "openssl", "fingerprint", "colons"])
def test_a_revoked_client_is_refused_on_both_sides(folder, tls, by):
    client = tls["client"]
    data = client.certificate.read_bytes()
    serial = x509.load_pem_x509_certificate(data).serial_number
    digest = fingerprint(client.certificate)
    line = {
        "serial": f"{serial:x}  # alice",
        "openssl": f"serial={serial:040X}",
        "fingerprint": digest.upper(),
        "colons": ":".join(digest[i : i + 2] for i in range(0, 64, 2)),
    }[by]
    listed = folder / "revoked"
    listed.write_text(f"# nobody else\n\n{line}\n")
    server = TLS(tls["server"].certificate, tls["server"].key, client.authority, listed)
    with Listener("127.0.0.1:0", role="server", tls=server) as listener:
        refused(listener, client)
        assert shown(listener, another(folder, "client"))


def test_the_list_is_read_again_and_also_ends_who_is_connected(folder, tls, caplog):
    client, listed = tls["client"], folder / "revoked"
    listed.write_text("")
    server = TLS(tls["server"].certificate, tls["server"].key, client.authority, listed)
    with Listener("127.0.0.1:0", role="server", tls=server) as listener:
        mine, other = meet(listener, client)
        with mine.result() as here, other.result():
            here.check_revoked()
            listed.write_text(fingerprint(client.certificate))
            with pytest.raises(RevokedError):
                here.check_revoked()
        refused(listener, client)
        listed.write_text("not a number")  # half written: the last list holds
        refused(listener, client)
        assert "the last list stays in force" in caplog.text
        listed.unlink()
        refused(listener, client)
        listed.write_text("# nobody\n")
        assert shown(listener, client)


def test_a_client_refuses_a_revoked_server(folder, tls):
    listed = folder / "revoked"
    listed.write_text(fingerprint(tls["server"].certificate))
    client = tls["client"]
    careful = TLS(client.certificate, client.key, client.authority, listed)
    with Listener("127.0.0.1:0", role="server", tls=tls["server"]) as listener:
        mine, other = meet(listener, careful)
        with pytest.raises(RevokedError, match="certificate of a server was revoked"):
            other.result()
        with mine.result() as channel, pytest.raises(RevokedError):
            channel.receive_bytes()


@pytest.mark.parametrize("line", ["alice", "12 34", "f" * 41, "f" * 65, "-1"])
def test_a_line_that_is_none_is_named_before_listening(folder, tls, line):
    listed = folder / "revoked"
    listed.write_text(f"12ab\n{line}\n")
    server = tls["server"]
    with pytest.raises(TransportError, match=r"revoked, line 2 is neither a serial"):
        TLS(server.certificate, server.key, server.authority, listed)
    with pytest.raises(TransportError, match="nowhere cannot be read"):
        TLS(server.certificate, server.key, server.authority, folder / "nowhere")
