"""Material is whole or not there, and its owner's alone."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from crypten_espn.errors import MaterialError
from crypten_espn.masked.header import PAGE
from crypten_espn.masked.store import DATA, material_info
from crypten_espn.masked.store_writer import MaterialWriter, remove_used_up

from .stored import (
    LAYOUT,
    arrays,
    equal,
    identity,
    run_and_wait,
    store,
    write,
)


def test_nothing_is_valid_before_the_end(tmp_path: Path) -> None:
    writer = MaterialWriter(tmp_path / "m", identity=identity(2), layout=LAYOUT)
    writer.add(0, arrays(0))
    with pytest.raises(MaterialError, match="holds no material"):
        material_info(tmp_path / "m")
    with pytest.raises(MaterialError, match="1 of 2 inferences were prepared"):
        writer.close()
    assert list((tmp_path / "m").iterdir()) == []


def test_unused_material_is_not_replaced_and_used_up_material_is(
    tmp_path: Path,
) -> None:
    write(tmp_path / "m", 1)
    with pytest.raises(MaterialError, match="still holds material for 1 inferences"):
        write(tmp_path / "m")
    old = store(tmp_path / "m")
    old.take()
    write(tmp_path / "m", 2, first=1)
    with pytest.raises(MaterialError, match="prepared again since it was opened"):
        old.take()
    assert store(tmp_path / "m").take().index == 1


@pytest.mark.parametrize(
    "index, wrong, message",
    [
        (1, arrays(1), "material 1 came where 0 was expected"),
        (0, arrays(0)[:-1], "has arrays"),
        (0, [array.astype(np.int16) for array in arrays(0)], "int16"),
        (0, [array.T for array in arrays(0)], "has arrays"),
    ],
)
def test_what_the_layout_does_not_say_is_not_written(
    index: int, wrong: list[np.ndarray], message: str, tmp_path: Path
) -> None:
    writer = MaterialWriter(tmp_path / "m", identity=identity(), layout=LAYOUT)
    with pytest.raises(MaterialError, match=message):
        writer.add(index, wrong)
    assert list((tmp_path / "m").iterdir()) == []


def test_a_second_writer_is_refused_by_name_and_the_first_goes_on(
    tmp_path: Path,
) -> None:
    with MaterialWriter(tmp_path / "m", identity=identity(1), layout=LAYOUT) as first:
        with pytest.raises(MaterialError, match=r"prepared into .*m already"):
            write(tmp_path / "m")
        first.add(0, arrays(0))
    assert equal(0, store(tmp_path / "m").take().arrays)


def _write_and_die(folder: Path) -> None:
    writer = MaterialWriter(folder, identity=identity(), layout=LAYOUT)
    writer.add(0, arrays(0))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_dead_writer_left_is_cleaned_up(tmp_path: Path) -> None:
    assert run_and_wait(_write_and_die, tmp_path / "m") == -9
    (left,) = (tmp_path / "m").iterdir()
    assert left.suffix == ".partial"
    write(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == [DATA]


def test_an_exception_in_between_keeps_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        MaterialWriter(tmp_path / "m", identity=identity(), layout=LAYOUT),
    ):
        _ = 1 // 0
    assert list((tmp_path / "m").iterdir()) == []


def test_used_up_folders_are_removed_and_others_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write(folder, 1)
    with pytest.raises(MaterialError, match="still holds material for 1"):
        remove_used_up(folder)
    store(folder).take()
    (folder / "notes").touch()
    with pytest.raises(MaterialError, match=r"cannot remove .*m: Directory not empty"):
        remove_used_up(folder)
    (folder / "notes").unlink()
    remove_used_up(folder)
    assert not folder.exists()


# Disks, modes and links.


def test_a_full_disk_is_named_with_the_space_needed_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    needed = 2 * PAGE + 3 * 3 * PAGE
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (needed - 1, limits[1]))
    try:
        with pytest.raises(MaterialError, match=rf"write .*m: .*{needed:,} byt"):
            write(tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "m").iterdir()) == []
    write(tmp_path / "m")


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MaterialWriter(tmp_path / "m", identity=identity(1), layout=LAYOUT)
    writer.add(0, arrays(0))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MaterialError, match=r"m: No space left on device\. It needs"):
        writer.close()
    assert list((tmp_path / "m").iterdir()) == []


def test_a_mark_that_the_disk_refuses_hands_out_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m")
    opened = store(tmp_path / "m")
    with monkeypatch.context() as patch:

        def broken(handle: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(os, "fsync", broken)
        with pytest.raises(MaterialError, match=r"material\.espn: Input/output error"):
            opened.take()
    assert opened.take().index in (0, 1)


def test_files_and_folders_are_their_owners_only(tmp_path: Path) -> None:
    path = write(tmp_path / "deep" / "m")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_open_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write(folder)
    folder.chmod(mode)
    for use in (material_info, store, write, remove_used_up):
        with pytest.raises(MaterialError, match=f"m has mode {mode:04o}.*chmod 700"):
            use(folder)


@pytest.mark.parametrize("mode", [0o640, 0o602])
def test_a_file_open_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    path.chmod(mode)
    for use in (material_info, store, write, remove_used_up):
        with pytest.raises(MaterialError, match=f"espn has mode {mode:04o}.*chmod 600"):
            use(tmp_path / "m")


def test_links_are_not_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for use in (material_info, store, write, remove_used_up):
        with pytest.raises(MaterialError, match="link is a symbolic link"):
            use(tmp_path / "link")
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    for use in (material_info, store, write, remove_used_up):
        with pytest.raises(MaterialError, match="espn: it is a symbolic link"):
            use(tmp_path / "m")
    assert (tmp_path / "away").stat().st_size == path.stat().st_size


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for use in (material_info, store):
        with pytest.raises(MaterialError, match="nowhere holds no material"):
            use(tmp_path / "nowhere")
        with pytest.raises(MaterialError, match="file holds no material"):
            use(tmp_path / "file")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MaterialError, match=f"{place}"):
            write(place)
    (tmp_path / "m").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "m" / DATA, 0o600)
    with pytest.raises(MaterialError, match="is not a file"):
        store(tmp_path / "m")
