"""The commands of a session: what they check first, and what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crypten_espn import cli
from crypten_espn.errors import MaterialError
from crypten_espn.graph import export
from crypten_espn.pillar.guard import InputGuard
from crypten_espn.serving.link import Link
from crypten_espn.serving.supply import Supply

from ..masked.cases import residual
from .conftest import Served


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    "command",
    [
        (
            *("serve", "no-network.onnx", "127.0.0.1:0", "--dealer", "127.0.0.1:1"),
            *("--calibration", "no-images.npy"),
        ),
        ("predict", "127.0.0.1:1", "--dealer", "127.0.0.1:1", "--input", "no-x.npy"),
        ("deal", "127.0.0.1:0"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_certificates_are_read_before_anything_else(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    status, out, err = run(capsys, *command, "--tls", "a.pem", "a.key", "b.pem")
    assert status == 2 and out == ""
    assert "a.pem cannot be read" in err and "Traceback" not in err


def test_plaintext_beyond_this_machine_needs_to_be_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(capsys, "deal", "0.0.0.0:0")
    assert status == 2 and out == "" and "--insecure" in err


@pytest.mark.parametrize(
    "limit", ["nothing=3", "batch", "batch=", "batch=0", "batch=-1", "batch=1.5"]
)
def test_a_limit_that_is_none_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["deal", "127.0.0.1:0", "--limit", limit])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "is no limit" in err and "waiting_s" in err


def test_a_digest_that_is_none_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["deal", "127.0.0.1:0", "--plan-digest", "1234"])
    assert ended.value.code == 2
    assert "64 hex digits" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "deal", "predict"])
def test_help_states_options_and_defaults(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--insecure" in text and "--verbose" in text
    if command != "predict":
        assert "connections=256" in text and "waiting_s=60" in text


def test_plan_takes_an_onnx_file_and_prints_the_digest_that_deal_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    network, inputs = residual()
    (tmp_path / "network.onnx").write_bytes(export(network, inputs[:1]))
    np.save(tmp_path / "images.npy", inputs.numpy())
    status, out, _ = run(
        capsys,
        *("plan", str(tmp_path / "network.onnx")),
        *("--calibration", str(tmp_path / "images.npy")),
    )
    digest = out.splitlines()[-1].removeprefix("digest ")
    assert status == 0 and len(bytes.fromhex(digest)) == 32
    assert digest[:16] in "".join(out.splitlines()[:-1])
    assert "input guard: none" in out


def test_what_a_server_would_not_keep_is_not_prepared(
    capsys: pytest.CaptureFixture[str], served: Served, tmp_path: Path
) -> None:
    folder = tmp_path / "client"
    status, out, err = run(
        capsys,
        *("prepare", served.server.address, "--dealer", served.dealer.address),
        *("--material", str(folder), "--count", "2"),
    )
    assert status == 2 and out == "" and not folder.exists()
    assert "MaterialError: The server keeps no material" in err
    # What is used at once may pass through the folder.
    np.save(tmp_path / "x.npy", served.inputs[:1].numpy())
    status, _, _ = run(
        capsys,
        *("predict", served.server.address, "--dealer", served.dealer.address),
        *("--material", str(folder), "--input", str(tmp_path / "x.npy")),
    )
    assert status == 0
    link = Link(served.dealer.address, folder, timeout=20)
    with pytest.raises(MaterialError, match="keeps no material"):
        Supply(served.server.address, link, ahead=2, low=1)


def test_plan_takes_a_guard_from_a_file_and_its_digest_is_another(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    network, inputs = residual()
    (tmp_path / "network.onnx").write_bytes(export(network, inputs[:1]))
    np.save(tmp_path / "images.npy", inputs.numpy())
    guard = tmp_path / "guard.json"
    command = [
        *("plan", str(tmp_path / "network.onnx")),
        *("--calibration", str(tmp_path / "images.npy"), "--guard", str(guard)),
    ]
    status, _, err = run(capsys, *command)
    assert status == 2 and "guard.json cannot be read as a guard" in err
    guard.write_text("{}")
    status, _, err = run(capsys, *command)
    assert status == 2 and "InputGuard.to_json writes one" in err
    digests = []
    for scale in (1, 4):
        guard.write_text(InputGuard.fit(scale * inputs).to_json())
        status, out, _ = run(capsys, *command)
        assert status == 0 and f"of x at most {4 * scale}" in out
        digests.append(out.splitlines()[-1])
    assert digests[0] != digests[1]
