"""The doctor: finds what is there, names what is missing, cures everything it names."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from crypten_espn import doctor, patches
from crypten_espn.errors import DataError, PeerError

ROOT = Path(doctor.__file__).parent.parent


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks()}


def test_tested_versions_are_the_pinned_ones() -> None:
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if match := re.match(r"([\w-]+)==([\w.]+)", line):
            pins.setdefault(match[1], set()).add(match[2])
    for name, versions in doctor.TESTED.items():
        assert pins[name] == set(versions)


def test_everything_needed_is_here() -> None:
    found = by_name()
    assert not [check for check in found.values() if check.needed]
    assert found["torch"].found == metadata.version("torch")
    assert "= 6.00" in found["two parties"].found
    assert "256" in found["bundled images"].found


def test_report_names_versions_and_every_patch_with_its_reason() -> None:
    text = doctor.report()
    flat = " ".join(text.split())
    for name in doctor.TESTED:
        assert metadata.version(name) in text
    for patch in patches.applied():
        assert patch.name in text and " ".join(patch.broke.split()) in flat
    assert f"{len(patches.applied())} of {len(patches.PATCHES)} patches" in text
    assert "Everything that is needed is here." in text
    assert "CUDA" in text


def test_an_unneeded_patch_is_listed_as_such() -> None:
    patch = patches.get("average_pool")
    patch.revert()
    try:
        assert re.search("not needed here:.*average_pool", doctor.report())
    finally:
        patch.apply()


def test_a_missing_package_has_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = metadata.version

    def version(name: str) -> str:
        if name == "numba":
            raise metadata.PackageNotFoundError(name)
        return "9.9" if name == "onnx" else stock(name)

    monkeypatch.setattr(metadata, "version", version)
    found = by_name()
    assert found["numba"].needed and "make install" in str(found["numba"].cure)
    assert not found["onnx"].needed and "1.23.2" in str(found["onnx"].cure)
    text = doctor.report()
    assert "MISSING numba" in text and "to be cured:\n  numba: make install" in text
    assert "Everything that is needed" not in text


def test_a_package_that_does_not_import_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "import_module", fail)
    check = by_name()["torchvision"]
    assert check.needed and "nms does not exist" in check.found


def test_missing_data_and_parties_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_data(*args: object) -> Any:
        raise DataError("fetch it:\n    fetch --now")

    def no_party(*args: object, **options: object) -> Any:
        raise PeerError("rank 0 failed")

    monkeypatch.setattr(doctor, "fashion_sample", no_data)
    monkeypatch.setattr(doctor, "load_dataset", no_data)
    monkeypatch.setattr(doctor, "run_parties", no_party)
    monkeypatch.setattr(doctor, "TESTED", {})  # whatever else is missing here
    found = by_name()
    assert found["bundled images"].needed and found["two parties"].needed
    assert not found["Fashion-MNIST"].needed
    text = doctor.report()
    assert "optional:\n  Fashion-MNIST: fetch it:\n    fetch --now" in text
    assert "rank 0 failed" in text


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_parties", lambda *a, **k: [5.0, 5.0])
    assert by_name()["two parties"].needed


def test_gpu_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    found = by_name()
    assert found["CUDA"].found == "some GPU"
    assert "one core" in str(found["processor"].cure)
