"""A path of namespaces delays and paces real TCP, and leaves nothing behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path as File

import pytest

from benchmarks import link
from benchmarks.link.system import call, worker

ROOT = File(__file__).resolve().parents[2]
CAP_NET_ADMIN, CAP_SYS_ADMIN, PR_CAPBSET_DROP = 12, 21, 24


@functools.cache
def _missing_capability() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    try:
        with link.Path("1ms"):
            return ""
    except link.PathError as error:
        return str(error)


@pytest.fixture
def namespaces() -> None:
    if _missing_capability():
        pytest.skip(_missing_capability())


def _drop_capabilities() -> None:
    for capability in (CAP_NET_ADMIN, CAP_SYS_ADMIN):
        call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)


def _without_privileges(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.wan", *arguments],
        preexec_fn=_drop_capabilities if os.geteuid() == 0 else None,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("text", "rtt_ms", "mbit"),
    [
        ("loopback", 0.0, None),
        ("lan", 0.25, 1000.0),
        ("metro", 20.0, 1000.0),
        ("wan", 100.0, 100.0),
        ("cheetah", 40.0, 400.0),
        ("50ms,20mbit", 50.0, 20.0),
        ("1.5s", 1500.0, None),
        ("2.5Gbit, 300us", 0.3, 2500.0),
    ],
)
def test_profile_by_name_and_by_numbers(
    text: str, rtt_ms: float, mbit: float | None
) -> None:
    profile = link.Profile.parse(text)
    assert (profile.rtt_ms, profile.mbit) == (pytest.approx(rtt_ms), mbit)


@pytest.mark.parametrize(
    "text", ["moon", "", "50", "5ms,6ms", "0mbit", "-1ms", "10mbit,20mbit", "5ms,"]
)
def test_unknown_profile_names_the_known_ones(text: str) -> None:
    with pytest.raises(link.PathError, match=r"loopback, lan, metro, wan.*50ms,20mbit"):
        link.Profile.parse(text)


def test_number_of_parties_is_checked() -> None:
    with pytest.raises(link.PathError, match="2 to 8 parties, not 1"):
        link.Path("wan", parties=1)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.timeout(60)
def test_path_keeps_its_round_trip_and_rate() -> None:
    with link.Path("8ms,200mbit") as path:
        result = link.self_test(path, seconds=1.0, trips=60)
        counts = path.counts()
    assert result.rtt_ms == pytest.approx(8.0, rel=0.1)
    assert result.mbit == pytest.approx(200.0, rel=0.05)
    assert counts["1>0"][1] > 20e6 and counts["1>0"][2] == 0


@pytest.mark.usefixtures("namespaces")
@pytest.mark.timeout(60)
def test_three_parties_reach_each_other() -> None:
    with link.Path("6ms,100mbit", parties=3) as path:
        for server, client in ((0, 2), (2, 1)):
            commands = [["true"]] * 3
            where = [path.addresses[server], "20000"]
            commands[server] = worker("probe", "echo-server", *where, 1)
            commands[client] = worker("probe", "echo", *where, 20)
            result = path.run(commands, timeout=30)[client]
            assert '"median_s": 0.00' in result.stdout


@pytest.mark.usefixtures("namespaces")
@pytest.mark.timeout(60)
def test_dead_party_is_named_and_earlier_lines_are_kept() -> None:
    seen: list[tuple[int, str]] = []
    failing = "echo row; echo 'no such model' >&2; sleep 0.3; exit 3"
    with (
        link.Path("1ms") as path,
        pytest.raises(link.PartyError, match=r"party 1 ended with status 3:\nno such"),
    ):
        path.run(
            [["sleep", "60"], ["sh", "-c", failing]],
            on_line=lambda rank, line: seen.append((rank, line)),
        )
    assert seen == [(1, "row\n")]


@pytest.mark.timeout(60)
def test_party_out_of_time_and_command_not_found() -> None:
    with link.Path("loopback") as path:
        with pytest.raises(link.PartyError, match=r"party 0 did not end within 0\.3 s"):
            path.run([["sleep", "60"], ["true"]], timeout=0.3)
        with pytest.raises(link.PartyError, match=r"cannot run no-such-program"):
            path.run([["true"], ["no-such-program"]], timeout=30)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    command = ["sh", "-c", "sleep 300 & echo $$ $!; wait"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.wan", "--profile", "2ms", "--", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a shell lets its background jobs, and so this child, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as handle:
        pids = {int(word) for word in handle.read().split()}
    assert len(pids) == 3  # the forwarder and the two parties
    pids |= {int(word) for line in lines for word in line.split()[1:]}
    assert len(pids) == 5  # and what the parties started
    process.send_signal(number)
    process.wait(timeout=20)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if _alive(pid)] == []


def test_without_privileges_the_message_says_what_to_do() -> None:
    result = _without_privileges("--selftest", "--profile", "5ms")
    if result.returncode == 0:
        pytest.skip("this kernel lets users who are not root make namespaces")
    assert result.returncode == 2
    assert "run as root" in result.stderr and "loopback alone" in result.stderr
    assert "Traceback" not in result.stderr
