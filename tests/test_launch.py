"""The launcher: results of any size, named failures, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import crypten
import crypten.communicator as comm
import pytest
import torch

from crypten_espn import launch
from crypten_espn.errors import EspnError, PeerError, ShapeError
from crypten_espn.launch import run_multiprocess, run_parties


@pytest.fixture(autouse=True)
def nothing_left_behind() -> object:
    yield
    assert not multiprocessing.active_children()


def module_level(a: int, *, b: int) -> tuple[int, int]:
    return comm.get().get_rank(), a * b


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_come_in_the_order_of_ranks(world_size: int) -> None:
    values = run_parties(
        module_level, world_size=world_size, args=(3,), kwargs={"b": 5}
    )
    assert values == [(rank, 15) for rank in range(world_size)]


def test_large_results_arrive() -> None:
    def party() -> tuple[torch.Tensor, str]:
        rank = comm.get().get_rank()
        return torch.full((3_000_000,), rank), "x" * 200_000

    for rank, (tensor, text) in enumerate(run_parties(party, world_size=2)):
        assert tensor.numel() == 3_000_000 and (tensor == rank).all()
        assert len(text) == 200_000


def test_closures_and_lambdas_work() -> None:
    offset = torch.tensor([1.0, 2.0])
    doubled = run_parties(lambda x: (x + offset) * 2, world_size=2, args=(offset,))
    assert [value.tolist() for value in doubled] == [[4, 8], [4, 8]]


def test_decorator_keeps_name_and_signature() -> None:
    @run_multiprocess(world_size=2, maxsize=10)
    def party(a: int, b: int = 2) -> int:
        """Adds."""
        return a + b

    assert party.__name__ == "party" and party.__doc__ == "Adds."
    assert party(1) == [3, 3] and party(a=1, b=1) == [2, 2]


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_two_parties_multiply_under_either_provider(provider: str) -> None:
    def party() -> torch.Tensor:
        assert crypten.cfg.mpc.provider == provider
        x = crypten.cryptensor(torch.tensor([1.5, -2.0]), src=0)
        y = crypten.cryptensor(torch.tensor([4.0, 0.5]), src=1)
        return (x * y).get_plain_text()

    with crypten.cfg.temp_override({"mpc.provider": provider}):
        for product in run_parties(party, world_size=2):
            assert (product - torch.tensor([6.0, -1.0])).abs().max() < 1e-3


def test_surroundings_reach_the_parties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def party() -> tuple[object, ...]:
        return (
            os.environ.get("COLOUR"),
            "SHAPE" in os.environ,
            os.getcwd(),
            crypten.cfg.encoder.precision_bits,
            torch.rand(1).item(),
            torch.get_num_threads(),
        )

    run_parties(party, world_size=1)  # the fork server runs in the old surroundings
    monkeypatch.setenv("COLOUR", "green")
    monkeypatch.delenv("SHAPE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "threads", 2)
    torch.manual_seed(11)
    with crypten.cfg.temp_override({"encoder.precision_bits": 12}):
        values = run_parties(party, world_size=2)
    drawn = torch.rand(1).item()
    assert values == 2 * [("green", False, str(tmp_path), 12, drawn, 2)]


def test_a_failure_names_the_rank_and_carries_the_traceback() -> None:
    def party() -> None:
        if comm.get().get_rank() == 1:
            raise ShapeError("the very reason")
        comm.get().barrier()

    with pytest.raises(PeerError, match="rank 1 failed") as caught:
        run_parties(party, world_size=2)
    assert "the very reason" in str(caught.value)
    assert "in party" in str(caught.value)
    assert isinstance(caught.value.__cause__, ShapeError)


def test_an_exception_that_does_not_pickle_is_reported_too() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd one")

    def party() -> None:
        raise Odd(1, 2)

    with pytest.raises(PeerError, match="odd one") as caught:
        run_parties(party, world_size=1)
    assert caught.value.__cause__ is None


def test_a_value_that_does_not_pickle_is_a_failure() -> None:
    with pytest.raises(PeerError, match="cannot pickle"):
        run_parties(lambda: (n for n in range(3)), world_size=1)


def raise_at_load() -> None:
    raise ValueError("never to be loaded")


class Unloadable:
    """A value that leaves its party and cannot be read by anybody."""

    def __reduce__(self) -> tuple[Any, ...]:
        return raise_at_load, ()


class UnloadableError(Unloadable, Exception):
    pass


def test_a_value_that_cannot_be_loaded_back_is_the_packages_error() -> None:
    with pytest.raises(PeerError, match=r"rank 1 .*cannot be loaded.*never to be load"):
        run_parties(lambda: Unloadable() if comm.get().get_rank() else 0, world_size=2)


def test_an_exception_that_cannot_be_loaded_back_is_reported_too() -> None:
    def party() -> None:
        raise UnloadableError("the very reason")

    with pytest.raises(PeerError, match="the very reason") as caught:
        run_parties(party, world_size=1)
    assert caught.value.__cause__ is None


def test_what_cannot_be_sent_to_the_parties_is_the_packages_error() -> None:
    for args, message in (
        ((n for n in range(3)), "cannot pickle"),
        (threading.Lock(), "lock"),
    ):
        with pytest.raises(EspnError, match=f"sent to the parties.*{message}"):
            run_parties(print, world_size=1, args=(args,))


@pytest.mark.parametrize("part", [3, 1000])
def test_a_party_that_dies_in_the_middle_of_its_value_ends_the_run(part: int) -> None:
    def party() -> bytes:
        write = os.write

        def write_some_and_die(end: int, data: bytes) -> int:
            write(end, data[:part])
            os.kill(os.getpid(), signal.SIGKILL)
            return part

        os.write = write_some_and_die  # type: ignore[assignment]
        return bytes(100_000)

    with pytest.raises(PeerError, match=r"rank 0 failed.*exit code -9 and no result"):
        run_parties(party, world_size=1)


def test_the_deadline_holds_in_the_middle_of_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tmp_path / "stopped"

    def party() -> bytes:
        write = os.write

        def write_some_and_wait(end: int, data: bytes) -> int:
            stopped.touch()
            write(end, data[:1000])
            signal.pause()
            return 1000

        os.write = write_some_and_wait  # type: ignore[assignment]
        return bytes(100_000)

    monotonic = time.monotonic
    # The time is over once the party stands still, however long it took to get there.
    monkeypatch.setattr(
        time, "monotonic", lambda: monotonic() + (1e6 if stopped.exists() else 0)
    )
    with pytest.raises(PeerError, match=r"no answer from rank 0 within 10000 s"):
        run_parties(party, world_size=1, timeout=10_000)


def test_a_party_that_dies_ends_the_run() -> None:
    def party() -> None:
        if comm.get().get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.get().barrier()

    with pytest.raises(PeerError, match=r"rank 0 failed.*exit code -9"):
        run_parties(party, world_size=2)


def test_a_party_that_waits_for_ever_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def party() -> None:
        signal.pause()

    with pytest.raises(PeerError, match=r"no answer from rank 0, 1 within 1\.5 s"):
        run_parties(party, world_size=2, timeout=1.5)
    monkeypatch.setattr(launch, "timeout_s", 1.5)
    with pytest.raises(PeerError, match=r"no answer from rank 0, 1 within 1\.5 s"):
        run_multiprocess(world_size=2)(party)()


def test_world_size_must_be_positive() -> None:
    with pytest.raises(EspnError, match="world_size=0"):
        run_parties(module_level, world_size=0)


SCRIPT = """
import os, crypten_espn, crypten, torch

class Pair:
    def __init__(self, value):
        self.value = value

@crypten.mpc.run_multiprocess(world_size=2)
def party():
    return Pair(crypten.cryptensor(torch.ones(2), src=0).get_plain_text())

print([isinstance(pair, Pair) and pair.value.tolist() for pair in party()])
"""


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "[[1.0, 1.0], [1.0, 1.0]]\n"
    assert result.stderr == ""


ORPHANS = """
import os, signal, sys, crypten_espn
def party(fifo):
    os.write(os.open(fifo, os.O_WRONLY), b"x")
    signal.pause()
crypten_espn.run_parties(party, world_size=2, args=(sys.argv[1],))
"""


def test_parties_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "alive")
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, str(fifo)])
    try:
        with open(fifo, "rb", buffering=0) as alive:
            assert alive.read(1) + alive.read(1) == b"xx"
            parent.kill()
            # The end of the stream: no party is left that holds its other end.
            assert alive.read(1) == b""
    finally:
        parent.kill()
        parent.wait()
