"""Quotas of a client and day: kept across restarts, and nothing is used beyond."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from crypten_espn.errors import DataError, QuotaError
from crypten_espn.keys import make_keys
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Link
from crypten_espn.serving.quota import Quota
from crypten_espn.serving.server import ModelServer
from crypten_espn.wire.tls import TLS

from .conftest import Run, Served, serving

DAY = datetime.date(2026, 11, 26)


def on(day: datetime.date, path: Path, daily: int = 5) -> Quota:
    return Quota(daily, path, lambda: day)


def test_what_is_used_is_counted_for_each_client_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "quota.json"
    quota = on(DAY, path)
    quota.charge("alice", 3)
    quota.charge("bob", 1)
    assert (quota.left("alice"), quota.left("bob"), quota.left("carol")) == (2, 4, 5)
    again = on(DAY, path)
    assert again.left("alice") == 2
    with pytest.raises(QuotaError, match=r"3 input.*alice may have 2 more today: 5"):
        again.charge("alice", 3)
    again.charge("alice", 2)
    with pytest.raises(QuotaError, match="0 more"):
        again.check("alice")
    assert again.check("bob") == 4
    assert os.stat(path).st_mode & 0o077 == 0


def test_the_next_day_counts_anew_and_an_earlier_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "quota.json"
    on(DAY, path).charge("alice", 5)
    assert on(DAY + datetime.timedelta(1), path).left("alice") == 5
    before = on(DAY - datetime.timedelta(1), path)
    assert before.left("alice") == 0  # a clock that goes back allows nothing
    before.charge("bob", 1)
    assert on(DAY, path).left("bob") == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"alice":3', '"alice":1'),
        lambda text: text.replace("2026-11-26", "2026-11-25"),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: json.dumps({**json.loads(text), "more": 1}),
        lambda text: text.replace('"version":1', '"version":2'),
    ],
)
def test_a_changed_or_half_written_file_is_refused_by_name(
    tmp_path: Path, damage
) -> None:
    path = tmp_path / "quota.json"
    on(DAY, path).charge("alice", 3)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match="damaged or no file of quotas"):
        on(DAY, path)


def test_what_cannot_be_noted_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = on(DAY, tmp_path / "quota.json")
    quota.charge("alice", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(QuotaError, match=r"cannot note what is used .No space"):
            quota.charge("alice", 1)
    assert quota.left("alice") == 4


@pytest.mark.slow
def test_threads_and_processes_that_share_a_file_lose_no_count(tmp_path: Path) -> None:
    path = tmp_path / "quota.json"
    script = (
        "import sys, datetime\n"
        "from crypten_espn.serving.quota import Quota\n"
        f"quota = Quota(100, sys.argv[1], lambda: datetime.date({DAY:%Y, %-m, %-d}))\n"
        "for _ in range(10): quota.charge('alice', 1)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(path)])
    quota = on(DAY, path, daily=100)

    def charge() -> None:
        for _ in range(10):
            quota.charge("alice", 1)

    threads = [threading.Thread(target=charge) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait() == 0
    assert quota.left("alice") == 70


@pytest.mark.slow
def test_a_process_killed_between_charge_and_answer_has_charged(tmp_path: Path) -> None:
    path = tmp_path / "quota.json"
    script = (
        "import os, sys, datetime\n"
        "from crypten_espn.serving.quota import Quota\n"
        f"quota = Quota(5, sys.argv[1], lambda: datetime.date({DAY:%Y, %-m, %-d}))\n"
        "quota.charge('alice', 2)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert on(DAY, path).left("alice") == 3


def limited(model: MaskedModel, run: Run, folder: Path, daily: int) -> Served:
    served = serving(model, run)
    quota = Quota(daily, folder / "quota.json")
    link = Link(served.dealer.address, timeout=20)
    server = run(ModelServer(model, "127.0.0.1:0", link=link, quota=quota))
    return Served(server, served.dealer, served.network, served.inputs)


def test_a_client_is_refused_beyond_its_quota_before_material_is_used(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = limited(model, run, tmp_path, daily=3)
    x = served.inputs
    with connect(served.server.address, link=served.link) as client:
        client.prepare(1, batch=2)
        assert served.is_right(x[:2], client.predict(x[:2]))
        client.prepare(2, batch=2)
        with pytest.raises(QuotaError, match=r"2 input.s. were given.*1 more today"):
            client.predict(x[:2])
        assert client.remaining == 2  # nothing was used
        with pytest.raises(QuotaError, match=r"3 input.s. were given"):
            client.predict_many([x[:1]] * 3)
        assert client.remaining == 2
    # A server that is started again goes on counting.
    again = limited(model, run, tmp_path, daily=3)
    with connect(again.server.address, link=again.link) as client:
        assert again.is_right(x[:1], client.predict(x[:1]))
        client.prepare(2)
        with pytest.raises(QuotaError, match="0 more today: 3 a day are allowed"):
            client.predict(x[:1])
        assert client.remaining == 2
    with pytest.raises(QuotaError, match="the server stopped: QuotaError"):
        connect(again.server.address, link=again.link)
    assert b'refusals_total{reason="QuotaError"} 2.0' in again.server.metrics.text()


def test_a_quota_follows_the_name_in_the_certificate(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    """A new certificate of the same name begins no new day; another name does."""
    host = ["127.0.0.1"]
    made = make_keys(tmp_path / "k", servers=host, dealers=host, clients=["al", "bob"])
    tls = {key.names[0]: TLS(key.certificate, key.key, key.authority) for key in made}
    (tmp_path / "k" / "client-al.pem").rename(tmp_path / "k" / "old.pem")
    (tmp_path / "k" / "client-al.key").rename(tmp_path / "k" / "old.key")
    (new,) = make_keys(tmp_path / "k", clients=["al"])
    old = TLS(tmp_path / "k" / "old.pem", tmp_path / "k" / "old.key", new.authority)
    by_role = {key.role: TLS(key.certificate, key.key, key.authority) for key in made}
    dealer = run(DealerServer("127.0.0.1:0", tls=by_role["dealer"], timeout=20))
    link = Link(dealer.address, tls=by_role["server"], timeout=20)
    quota = Quota(1, tmp_path / "quota.json")
    server = run(ModelServer(model, "127.0.0.1:0", link=link, quota=quota))
    x = torch.zeros(1, *model.plan.input.shape)

    def one(tls: TLS) -> None:
        mine = Link(dealer.address, tls=tls, timeout=20)
        with connect(server.address, link=mine) as client:
            client.predict(x)

    one(old)
    with pytest.raises(QuotaError, match="al may have 0 more"):
        one(TLS(new.certificate, new.key, new.authority))
    one(tls["bob"])
