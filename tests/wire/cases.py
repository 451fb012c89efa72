"""What the tests of the wire share: a thread beside the test, certificates."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from crypten_espn.keys import make_keys
from crypten_espn.wire.frames import ROLES
from crypten_espn.wire.tls import TLS


def in_thread(function, *arguments):
    """Run a function beside the test; `.result()` joins and re-raises."""
    box = {}

    def run():
        try:
            box["value"] = function(*arguments)
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(20)
        assert not thread.is_alive()
        if "error" in box:
            raise box["error"]
        return box["value"]

    return SimpleNamespace(result=result)


def certificates(folder, *, host="127.0.0.1"):
    """TLS for each role, by one authority made in `folder`."""
    keys = make_keys(folder, servers=[host], dealers=[host], clients=["alice"])
    assert {key.role for key in keys} == set(ROLES)
    return {key.role: TLS(key.certificate, key.key, key.authority) for key in keys}
