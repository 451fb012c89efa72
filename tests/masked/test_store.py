"""Material on disk: used once whatever dies, erased when used, refused when odd."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import threading
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crypten_espn.errors import MaterialError
from crypten_espn.masked import journal
from crypten_espn.masked.header import PAGE, Header, Layout
from crypten_espn.masked.store import DATA, material_info

from .stored import (
    LAYOUT,
    PLAN,
    SESSION,
    arrays,
    equal,
    refused,
    run_and_wait,
    store,
    write,
)


def header_of(path: Path) -> Header:
    return Header.from_page(path.read_bytes()[:PAGE], path)


# What is written comes back, once.


def test_records_come_back_in_order_and_once(tmp_path: Path) -> None:
    write(tmp_path / "m", first=5)
    opened = store(tmp_path / "m")
    assert (opened.next_index, opened.remaining) == (5, 3)
    for index in (5, 6, 7):
        record = opened.take()
        assert record.index == index and equal(index, record.arrays)
        assert all(array.flags.writeable for array in record.arrays)
    for attempt in (opened, store(tmp_path / "m")):
        with pytest.raises(MaterialError, match=r"holds 5 to 7.* before 8 were"):
            attempt.take()
    assert opened.remaining == 0


def test_skipping_ahead_loses_records_and_never_repeats_one(tmp_path: Path) -> None:
    write(tmp_path / "m", 4)
    opened = store(tmp_path / "m")
    assert [opened.take(at_least=n).index for n in (0, 2, 1)] == [0, 2, 3]
    assert opened.remaining == 0


def test_an_index_beyond_the_last_burns_nothing(tmp_path: Path) -> None:
    write(tmp_path / "m")
    opened = store(tmp_path / "m")
    for far in (3, 2**32 - 1, 10**30):
        with pytest.raises(MaterialError, match="no material for inference"):
            opened.take(at_least=far)
    assert opened.remaining == 3 and opened.take().index == 0


def test_reading_ahead_marks_nothing(tmp_path: Path) -> None:
    """Of 8 records all 8 outlive 8 connections that end without a request."""
    write(tmp_path / "m", 8)
    opened = store(tmp_path / "m")
    for _ in range(8):
        opened.read_ahead()
    assert store(tmp_path / "m").remaining == 8
    for index in range(8):
        opened.read_ahead()
        record = opened.take()
        assert record.index == index and equal(index, record.arrays)
    opened.read_ahead()
    assert opened.remaining == 0


def test_a_record_read_ahead_is_dropped_if_another_reader_takes_it(
    tmp_path: Path,
) -> None:
    write(tmp_path / "m")
    one, two = store(tmp_path / "m"), store(tmp_path / "m")
    one.read_ahead()
    assert two.take().index == 0
    record = one.take()
    assert record.index == 1 and equal(1, record.arrays)


def test_info_says_what_is_left(tmp_path: Path) -> None:
    write(tmp_path / "m", model=b"w" * 32)
    store(tmp_path / "m").take()
    info = material_info(tmp_path / "m")
    assert (info.rank, info.batch, info.count, info.remaining) == (0, 2, 3, 2)
    assert (info.plan, info.session) == (PLAN.hex(), SESSION.hex())
    assert info.model == (b"w" * 32).hex()
    assert "2 of 3 inferences left, batch 2" in str(info)


# Processes that die, and many at once.


def _take_two_and_die(folder: Path, answers: Connection) -> None:
    opened = store(folder)
    for _ in range(2):
        answers.send(opened.take().index)
    os.kill(os.getpid(), signal.SIGKILL)


def _die_before_reading(folder: Path) -> None:
    opened = store(folder)
    os.preadv = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    opened.take()


def test_a_killed_process_never_leaves_a_used_record_unused(tmp_path: Path) -> None:
    write(tmp_path / "m", 5)
    near, far = multiprocessing.Pipe(duplex=False)
    with near, far:
        for _ in range(2):
            assert run_and_wait(_take_two_and_die, tmp_path / "m", far) == -9
        assert [near.recv() for _ in range(4)] == [0, 1, 2, 3]
    assert store(tmp_path / "m").take().index == 4


def test_a_process_killed_between_mark_and_read_loses_the_record(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "m")
    header = header_of(path)
    assert run_and_wait(_die_before_reading, tmp_path / "m") == -9
    opened = store(tmp_path / "m")
    # Opening erased what the dead process could not.
    data = path.read_bytes()
    assert not any(data[header.offset(0) : header.offset(1)])
    assert any(data[header.offset(1) : header.offset(2)])
    record = opened.take()
    assert record.index == 1 and equal(1, record.arrays)


def _take_all(folder: Path, answers: Connection) -> None:
    taken: list[int] = []

    def work() -> None:
        mine = store(folder)
        while True:
            try:
                record = mine.take()
            except MaterialError:
                return
            assert equal(record.index, record.arrays)
            taken.append(record.index)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.send(taken)


def test_processes_and_threads_share_a_folder_without_repeating(
    tmp_path: Path,
) -> None:
    write(tmp_path / "m", 40)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crypten_espn"])
    near, far = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_take_all, args=(tmp_path / "m", far)) for _ in range(3)
    ]
    with near, far:
        for process in processes:
            process.start()
        taken = [index for _ in processes for index in near.recv()]
    for process in processes:
        process.join()
    assert sorted(taken) == list(range(40))


# Nothing used stays on the disk.


def test_a_used_record_is_erased_and_the_others_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "m", 4)
    header = header_of(path)
    assert header.record == 3 * PAGE

    def record(index: int) -> bytes:
        return path.read_bytes()[header.offset(index) : header.offset(index + 1)]

    kept = [record(index) for index in range(4)]
    opened = store(tmp_path / "m")
    opened.read_ahead()
    opened.take()
    opened.take(at_least=2)
    assert [any(record(index)) for index in range(4)] == [False] * 3 + [True]
    assert record(3) == kept[3]
    assert path.stat().st_size == header.size


def test_a_file_system_without_holes_gets_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(*_: object, **__: object) -> object:
        return object()

    path = write(tmp_path / "m")
    header = header_of(path)
    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert equal(0, store(tmp_path / "m").take().arrays)
    data = path.read_bytes()
    assert not any(data[header.offset(0) : header.offset(1)])
    assert equal(1, store(tmp_path / "m").take().arrays)


def test_a_folder_copied_after_use_holds_no_used_mask(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    used = store(tmp_path / "m").take().arrays
    assert used[2].tobytes() not in path.read_bytes()
    assert arrays(1)[2].tobytes() in path.read_bytes()


def test_no_secret_is_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    record = store(tmp_path / "m").take()
    assert repr(record) == "Record(index=0, arrays=<hidden>)"
    header = header_of(path)
    texts = f"{header!r} {header.journal(0, path)!r}"
    assert repr(header.key)[2:-1] not in texts and header.key.hex() not in texts


# Restored copies.


@pytest.mark.parametrize("rank", [0, 1])
def test_a_client_behind_its_server_was_restored_from_a_copy(
    rank: int, tmp_path: Path
) -> None:
    write(tmp_path / "m", rank=rank)
    opened = store(tmp_path / "m", rank=rank)
    opened.compare(0)
    opened.take()
    opened.compare(1)
    behind, ahead = (0, 2) if rank == 0 else (2, 0)
    opened.compare(ahead)
    with pytest.raises(MaterialError, match="restored from a copy: its next inference"):
        opened.compare(behind)


def test_a_copy_put_back_while_the_folder_is_in_use_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    copy = path.read_bytes()
    opened = store(tmp_path / "m")
    opened.take()
    path.write_bytes(copy)
    for use in (opened.take, opened.read_ahead, lambda: opened.next_index):
        with pytest.raises(MaterialError, match="restored from a copy while it was"):
            use()


# What does not belong together is refused.


def swapped_within(folder: Path) -> None:
    path = write(folder)
    data, header = bytearray(path.read_bytes()), header_of(path)
    first, second = (
        slice(header.offset(index), header.offset(index + 1)) for index in (0, 1)
    )
    data[first], data[second] = data[second], data[first]
    path.write_bytes(data)


def from_another_file(folder: Path, **changes: Any) -> None:
    path, other = write(folder), write(folder.with_name("other"), **changes)
    data, foreign, header = path.read_bytes(), other.read_bytes(), header_of(path)
    start = header.offset(0)
    path.write_bytes(data[:start] + foreign[start:])


def with_another_header(folder: Path, **changes: object) -> None:
    """The records and their key, under a header that is right in itself."""
    path = write(folder)
    header = header_of(path)
    made_for = msgspec.structs.replace(header.identity, **changes)
    changed = msgspec.structs.replace(header, identity=made_for)
    entry = changed.journal(0, path).entry(0).ljust(PAGE, b"\0")
    path.write_bytes(changed.page() + entry + path.read_bytes()[2 * PAGE :])


@pytest.mark.parametrize(
    "mix_up",
    [
        swapped_within,
        from_another_file,
        lambda folder: from_another_file(folder, session=b"t" * 16),
        lambda folder: from_another_file(folder, rank=1),
        lambda folder: with_another_header(folder, session=b"t" * 16),
        lambda folder: with_another_header(folder, batch=3),
        lambda folder: with_another_header(folder, model=b"m" * 32),
    ],
)
def test_records_in_the_wrong_place_are_refused_by_name(
    mix_up: Callable[[Path], None], tmp_path: Path
) -> None:
    mix_up(tmp_path / "m")
    opened = store(tmp_path / "m")
    with pytest.raises(MaterialError, match="record of inference 0 is damaged or belo"):
        opened.read_ahead()
    with pytest.raises(MaterialError, match="record of inference 0 is damaged or belo"):
        opened.take()
    assert opened.next_index == 1  # a damaged record is used, too


def test_a_header_of_other_indices_does_not_fit_its_journal(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    header = header_of(path)
    made_for = msgspec.structs.replace(header.identity, first=1)
    changed = msgspec.structs.replace(header, identity=made_for)
    path.write_bytes(changed.page() + path.read_bytes()[PAGE:])
    with pytest.raises(MaterialError, match="where it says what was used"):
        store(tmp_path / "m")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 1}, "made for rank 0, this is rank 1"),
        ({"plan": bytes(32)}, "made for plan 0001.*this is plan 0000"),
        ({"model": b"n" * 32}, "made for model 7777.*this is model 6e6e"),
        ({"corrections": "client"}, "corrections to the server; corrections to the cl"),
        ({"layout": lambda batch: LAYOUT[:1]}, "records of 12,288 bytes; this plan's"),
    ],
)
def test_another_party_plan_model_or_layout_is_named(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "m", model=b"w" * 32)
    with pytest.raises(MaterialError, match=message):
        store(tmp_path / "m", **changes)
    store(tmp_path / "m", model=b"w" * 32)


def test_the_layout_is_asked_for_the_headers_batch(tmp_path: Path) -> None:
    asked: list[int] = []

    def noted(batch: int) -> Layout:
        asked.append(batch)
        return LAYOUT

    write(tmp_path / "m", batch=7)
    store(tmp_path / "m", layout=noted)
    assert asked == [7]


def test_material_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir(mode=0o700)
    path = folder / DATA
    path.touch(mode=0o600)
    path.write_bytes(b"ESPNMAT1" + struct.pack("<I", 2) + b"{}" + bytes(PAGE))
    for use in (material_info, store, write):
        with pytest.raises(MaterialError, match="written by another version"):
            use(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", 0), ("count", 2**20 + 1), ("count", 10**9), ("count", -1),
        ("batch", 0), ("batch", 10**30), ("batch", True), ("first", -1),
        ("rank", 2), ("session", b"short"), ("plan", b""), ("model", b"x" * 33),
    ],
)  # fmt: skip
def test_numbers_out_of_bounds_are_never_written(
    field: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(MaterialError, match="no material can be kept"):
        write(tmp_path / "m", **{field: value})  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


# Nothing read is believed.


@pytest.mark.slow
def test_mutated_files_raise_nothing_else_and_take_no_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        found = refused(tmp_path / "m", count=600, seed=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found > 400
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", 2**20), ("count", 2**63), ("record", 2**40), ("record", 4097),
        ("record", 0), ("record", -4096), ("batch", 10**15), ("first", 2**63),
        ("count", "3"), ("count", 3.0), ("count", None), ("rank", [0] * 100),
        ("key", b""), ("plan", "x" * 32), ("more", 1), ("corrections", "dealer"),
    ],
)  # fmt: skip
def test_a_header_that_promises_too_much_is_refused_before_anything_is_allocated(
    field: str, value: object, tmp_path: Path
) -> None:
    path = write(tmp_path / "m")
    header = header_of(path)
    fields = msgspec.msgpack.decode(header.text)
    (fields if field in fields else fields["identity"])[field] = value
    text = msgspec.msgpack.encode(fields)
    mac = journal.tag(header.key, journal.HEADER, 0, (text,))
    page = path.read_bytes()[:8] + struct.pack("<I", len(text)) + text + mac
    path.write_bytes(page.ljust(PAGE, b"\0") + path.read_bytes()[PAGE:])
    tracemalloc.start()
    try:
        for use in (material_info, store):
            with pytest.raises(MaterialError, match=r"damaged|promises"):
                use(tmp_path / "m")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
