"""Parties start together, count alike, and leave their samples when one dies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import activations, inference, link, party
from benchmarks.party import measuring
from benchmarks.party.measuring import MARK
from benchmarks.party.on_crypten import corrections
from benchmarks.rows import Results


def as_parties(body: Callable[[party.Control], Any]) -> list[Any]:
    """Run `body` in two threads joined by a control connection; the values by rank."""
    port = link.free_port()
    values: list[Any] = [None, None]

    def run(rank: int) -> None:
        control = party.Control(rank, "127.0.0.1", port)
        try:
            values[rank] = body(control)
        finally:
            control.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return values


def test_both_start_at_the_same_moment_even_if_one_is_late() -> None:
    def body(control: party.Control) -> tuple[float, float]:
        time.sleep(0.2 * control.rank)
        planned = control.start_together()
        return planned, time.monotonic()

    (first, left), (second, right) = as_parties(body)
    assert first == second
    assert abs(left - right) < 0.05 and left >= first and right >= second


def test_values_cross_and_a_dead_peer_is_an_error() -> None:
    def body(control: party.Control) -> Any:
        got = control.swap({"from": control.rank, "big": "x" * 100_000})
        if control.rank == 1:
            return got["from"]
        with pytest.raises(ConnectionError, match="party 1 is gone"):
            control.receive()
        return got["from"]

    assert as_parties(body) == [1, 0]


class Counted:
    """A system without a computation."""

    activation, engine = "counted", "none"

    def __init__(self, control: party.Control, seconds: float) -> None:
        self.rank, self.seconds, self.runs = control.rank, seconds, 0

    def prepare(self) -> float:
        return 0.0

    def offline(self) -> int:
        return 100

    def online(self) -> Callable[[], party.Result]:
        self.runs += 1
        time.sleep(self.seconds * (1 + self.rank))
        error = None if self.rank == 0 else 0.25
        return lambda: party.Result(3, 10 + self.rank, error, None)

    def close(self) -> None:
        pass


def run_counted(
    limit_s: float, *, seconds: float = 0.05, repeat: int = 2, fill_s: float = 0.0
) -> tuple[list[Any], list[int]]:
    """What rank 0 emits apart from progress, and how often each party ran."""
    emitted: list[Any] = []

    def body(control: party.Control) -> int:
        system = Counted(control, seconds)
        party.measure(
            [system],
            control,
            model="m",
            batch=1,
            repeat=repeat,
            fill_s=fill_s,
            limit_s=limit_s,
            emit=emitted.append,
        )
        return system.runs

    runs = as_parties(body)
    progress = [sample["progress"] for sample in emitted if "progress" in sample]
    assert progress[0] == [0, 1 + repeat]  # before anything is known
    assert [done for done, _ in progress[1:]] == list(range(runs[0]))
    return [sample for sample in emitted if "progress" not in sample], runs


def test_the_slower_party_counts_and_the_first_run_does_not() -> None:
    emitted, runs = run_counted(60.0)
    assert runs == [3, 3] and len(emitted) == 3
    for sample in emitted[:2]:
        assert 0.1 <= sample["online_s"] < 0.2
        assert sample["bytes_sent"] == [10, 11] and sample["rounds"] == 3
        assert sample["max_abs_error"] == 0.25 and sample["offline_bytes"] == 100
    assert emitted[2]["done"] and emitted[2]["rtt_ms"] < 100


def test_short_systems_run_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MANY", 7)
    emitted, runs = run_counted(60.0, seconds=0.0005, repeat=3, fill_s=60.0)
    assert runs == [8, 8] and len(emitted) == 8


def test_long_systems_run_less_often_and_their_first_run_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "LONG_RUN_S", 0.1)
    emitted, runs = run_counted(1.1, seconds=0.15, repeat=5)
    # At most 3 x 0.3 s, fewer on a busy machine; then the end.
    assert runs[0] == runs[1] <= 3 and len(emitted) == runs[0] + 1
    assert "skipped" not in emitted[0]


def test_a_system_over_the_limit_is_left_out_and_said_so() -> None:
    emitted, runs = run_counted(0.08)
    assert runs == [1, 1]
    assert [sample.get("activation") for sample in emitted] == ["counted", None]
    assert emitted[0]["skipped"].endswith("is over the limit of 0.08 s")


def test_progress_says_where_a_long_run_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {"model": "resnet50", "activation": "crypten-relu", "batch": 1}
    where["engine"] = "crypten+gloo"
    collector = party.Collector(Results(), "wan", 100.0, 100.0, 1)
    collector.take({**where, "progress": [2, 9]})
    assert capsys.readouterr().err == ""  # not a terminal
    collector.flush()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    collector.take({**where, "progress": [2, 9]})
    collector.flush()
    shown = capsys.readouterr().err
    assert "resnet50 on wan" in shown and "2/9" in shown
    assert "crypten-relu (gloo)" in shown


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "elements"),
    [
        ("generate_additive_triple", ((2, 3), (3, 5), "matmul"), {}, 10),
        ("generate_additive_triple", ((4, 1), (1, 6), "mul"), {"device": None}, 24),
        (
            "generate_additive_triple",
            ((1, 3, 8, 8), (4, 3, 3, 3), "conv2d"),
            {"padding": (1, 1), "stride": [2, 2]},
            64,
        ),
        ("generate_binary_triple", ((2, 1, 7), (2, 5, 7)), {}, 70),
        ("square", (torch.Size([3, 4]),), {}, 12),
        ("one_sided_products", (torch.Size([9]), 3), {}, 9),
        ("powers", (torch.Size([9]), 4), {}, 27),
        ("rescaling", (torch.Size([9]), 12), {}, 18),
        ("B2A_rng", (torch.Size([2, 2]),), {"device": None}, 4),
    ],
)
def test_elements_a_dealer_sends(
    function: str, args: tuple[Any, ...], kwargs: dict[str, Any], elements: int
) -> None:
    assert corrections(function, args, kwargs) == elements


def test_samples_of_a_benchmark_that_dies_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {
        **{"model": "m", "activation": "espn", "engine": "crypten+gloo", "batch": 1},
        **{"online_s": 1.0, "offline_s": 0.5, "rounds": 3, "bytes_sent": [4, 5]},
        **{"offline_bytes": 6, "max_abs_error": 0.0, "argmax_agreement": None},
    }
    (tmp_path / "dying.py").write_text(
        "import json, sys, time\n"
        "if json.loads(sys.argv[2])['rank'] == 1:\n"
        "    time.sleep(60)\n"
        f"print({MARK + json.dumps(sample)!r}, flush=True)\n"
        "time.sleep(0.2)\n"
        "raise SystemExit('out of memory')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = Results(tmp_path / "rows.json")
    ended_well = party.run_on_networks(
        results,
        ["loopback"],
        module="dying",
        task={},
        provider="TFP",
        threads=1,
        idle_restart=True,
        timeout_s=30.0,
    )
    assert not ended_well
    (row,) = Results.read(tmp_path / "rows.json").rows
    assert (row.rounds, row.bytes_sent, row.total_s.median) == (3, (4, 5), 1.5)
    assert "out of memory" in results.skipped[0].reason
    assert "party 0 ended with status 1" in capsys.readouterr().err


def test_samples_of_an_interrupted_run_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {
        **{"model": "minionn", "activation": "masked", "engine": "masked", "batch": 1},
        **{"online_s": 1.0, "offline_s": 0.5, "rounds": 16, "bytes_sent": [4, 5]},
        **{"offline_bytes": 6, "max_abs_error": 0.0, "argmax_agreement": 1.0},
    }

    def interrupted(*_: Any, on_line: Callable[[int, str], None], **__: Any) -> None:
        for seconds in (1.0, 2.0, 6.0):
            on_line(0, MARK + json.dumps({**sample, "online_s": seconds}))
        raise KeyboardInterrupt

    monkeypatch.setattr(link.Path, "run", interrupted)
    path = tmp_path / "rows.json"
    assert inference.main(["--networks", "loopback", "wan", "--json", str(path)]) == 130
    (row,) = Results.read(path).rows
    assert (row.network, row.online_s.median, row.online_s.repeats) == (
        "loopback",
        2,
        3,
    )
    assert "finished rows are kept" in capsys.readouterr().err


@pytest.mark.timeout(180)
def test_two_hosts_run_what_one_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    port = link.free_port()
    commands = [
        [
            *(sys.executable, "-m", "benchmarks.inference", "--rank", str(rank)),
            *("--rendezvous", f"127.0.0.1:{port}", "--models", "minionn"),
            *("--protocols", "masked", "espn", "--channels", "direct"),
            *("--repeat", "1", "--fill-s", "0", "--json", str(path)),
        ][: None if rank == 0 else -2]
        for rank in (0, 1)
    ]
    parties = [subprocess.Popen(command) for command in commands]
    try:
        assert [one.wait(timeout=150) for one in parties] == [0, 0]
    finally:
        for one in parties:
            one.kill()
    rows = {row.system: row for row in Results.read(path).rows}
    assert set(rows) == {"masked", "espn (direct)"}
    for row in rows.values():
        assert (row.network, row.rounds, row.argmax_agreement) == ("hosts", 16, 1.0)
        assert 0 < row.rtt_ms < 1000 and row.online_s.median > 0


def test_unknown_network_fails_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    assert (
        activations.main(["--networks", "loopback", "moon", "--json", str(path)]) == 2
    )
    assert "unknown network profile 'moon'" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.timeout(180)
def test_two_runs_agree_in_rounds_and_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--points", "300", "--networks", "loopback", "--repeat", "2"]
    arguments += ["--fill-s", "0"]
    arguments += ["--protocols", "masked", "espn", "opened_mask-exact", "crypten-relu"]
    first, second = (str(tmp_path / f"{number}.json") for number in (1, 2))
    assert activations.main([*arguments, "--json", first]) == 0
    assert activations.main([*arguments, "--json", second, "--compare", first]) == 0
    assert "rounds and bytes are those of" in capsys.readouterr().out
    rows = {row.system: row for row in Results.read(second).rows}
    assert len(rows) == 7
    assert rows["masked"].rounds == 4  # input and output are two of them
    down, up = rows["masked"].bytes_sent
    # What an opening drops follows calibration; the client sends 32 and 48 bits.
    assert up == 300 * (4 + 6) and 300 * 4 < down <= 300 * (4 + 8)
    assert rows["masked"].max_abs_error < 0.01
    assert rows["espn (direct)"].rounds == 1
    assert rows["espn (direct)"].bytes_sent == (300 * 3 * 8, 300 * 3 * 8)
    assert rows["opened_mask-exact (gloo)"].rounds == 2
    assert rows["crypten-relu (gloo)"].max_abs_error < 1e-3
    for name in ("espn", "opened_mask-exact", "crypten-relu"):
        over = [rows[f"{name} ({channel})"] for channel in ("direct", "gloo")]
        assert over[0].rounds == over[1].rounds
        assert over[0].bytes_sent == over[1].bytes_sent
