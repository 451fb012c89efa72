"""Options from a file and from the environment, below those of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crypten_espn import cli
from crypten_espn.cli import sessions
from crypten_espn.serving.crew import Crew
from crypten_espn.serving.host import Host


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Host, str | None]]:
    """Hosts that commands would have run, with their admin address."""
    found: list[tuple[Host, str | None]] = []

    def until(host: Host, doing: str, admin: str | None) -> int:
        with host:
            found.append((host, admin))
        return 0

    monkeypatch.setattr(sessions, "_until_stopped", until)
    return found


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


FULL = """
[deal]
address = "127.0.0.1:0"
limit = ["batch=7", "waiting_s=2.5"]
admin = "127.0.0.1:9"
insecure = true

[serve]
dealer = "127.0.0.1:1"
"""


def test_a_file_gives_arguments_options_and_flags(
    tmp_path: Path, started: list[tuple[Host, str | None]]
) -> None:
    assert cli.main(["deal", "--config", config(tmp_path, FULL)]) == 0
    ((host, admin),) = started
    assert host.address.startswith("127.0.0.1:") and admin == "127.0.0.1:9"
    assert (host.limits.batch, host.limits.waiting_s) == (7, 2.5)


def test_limits_may_be_a_table_of_their_own(
    tmp_path: Path, started: list[tuple[Host, str | None]]
) -> None:
    text = "[deal]\naddress = '127.0.0.1:0'\n[deal.limit]\nbatch = 9\ngrace_s = 1.5\n"
    assert cli.main(["deal", "--config", config(tmp_path, text)]) == 0
    ((host, _),) = started
    assert (host.limits.batch, host.limits.grace_s) == (9, 1.5)


def test_the_environment_goes_before_the_file_and_the_command_line_before_both(
    tmp_path: Path,
    started: list[tuple[Host, str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CRYPTEN_ESPN_CONFIG", config(tmp_path, FULL))
    monkeypatch.setenv("CRYPTEN_ESPN_LIMIT", "batch=8 count=3")
    monkeypatch.setenv("CRYPTEN_ESPN_ADMIN", "127.0.0.1:8")
    assert cli.main(["deal"]) == 0
    assert cli.main(["deal", "--admin", "7", "--limit", "batch=6"]) == 0
    (first, second) = started
    assert (first[0].limits.batch, first[0].limits.count, first[1]) == (
        *(8, 3),
        "127.0.0.1:8",
    )
    assert (second[0].limits.batch, second[1]) == (6, "7")


def test_options_of_several_values_come_from_the_environment_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRYPTEN_ESPN_TLS", "a.pem a.key b.pem")
    assert cli.main(["deal", "127.0.0.1:0"]) == 2
    assert "a.pem cannot be read" in capsys.readouterr().err


def test_predict_takes_its_dealer_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRYPTEN_ESPN_DEALER", "127.0.0.1:1")
    monkeypatch.setenv("CRYPTEN_ESPN_ADDRESS", "127.0.0.1:1")
    assert cli.main(["predict", "--input", "no-x.npy"]) == 2
    assert "no-x.npy" in capsys.readouterr().err


@pytest.mark.parametrize("dealer", ["'127.0.0.1:1'", "['127.0.0.1:1', 'other:2']"])
def test_a_file_names_one_dealer_or_several(
    dealer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"[predict]\naddress = '127.0.0.1:1'\ndealer = {dealer}\n"
    options = ["--config", config(tmp_path, text), "--input", "no-x.npy"]
    assert cli.main(["predict", *options]) == 2
    assert "no-x.npy" in capsys.readouterr().err


def test_several_workers_listen_on_the_one_address(
    started: list[tuple[Host, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Crew, "__enter__", lambda crew: crew)  # none is started
    assert cli.main(["deal", "127.0.0.1:0", "--workers", "3"]) == 0
    ((crew, _),) = started
    assert isinstance(crew, Crew) and crew.role == "dealer"
    assert crew.address.startswith("127.0.0.1:")
    assert cli.main(["deal", "0.0.0.0:0", "--workers", "3"]) == 2  # in the clear


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[deal]\naddres = 'x'\n", "'addres' in [deal] is no option"),
        ("[deal]\nconfig = 'x'\n", "'config' in [deal] is no option"),
        ("[serve]\n", "has no table [deal]"),
        ("deal = 3\n", "has no table [deal]"),
        ("[deal\n", "is no TOML"),
        ("[deal]\naddress = '127.0.0.1:0'\n[deal.limit]\nbatch = -1\n", "is no limit"),
        ("[deal]\naddress = '127.0.0.1:0'\nlimit = ['b=1']\n", "is no limit"),
    ],
)
def test_a_file_that_says_something_else_is_refused_by_name(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = cli.main(["deal", "--config", config(tmp_path, text)])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert named in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["deal", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--quota", "5"], "it needs --quota-file, or --material"),
        (["--quota-file", "quota.json"], "it needs --quota"),
        (["--revoked", "list"], "it needs --tls"),
        (["--quota", "0"], "give a whole number from 1 on"),
    ],
)
def test_options_that_need_another_say_so(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--dealer", "127.0.0.1:1", "--calibration", "no.npy"]
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "fashion-resnet", "127.0.0.1:0", *places, *options])
    assert end.value.code == 2 and named in capsys.readouterr().err
