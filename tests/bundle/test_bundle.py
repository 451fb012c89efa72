"""Bundles as files: what is saved is loaded, and nothing else is."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load as unpack
from safetensors.numpy import save as pack

import crypten_espn as espn
from crypten_espn.bundle import Bundle, Description, Preprocessing, load
from crypten_espn.bundle.sealed import is_bundle, read, write
from crypten_espn.errors import CheckpointError, DataError, PlanError, ShapeError
from crypten_espn.graph import export
from crypten_espn.masked.checks import PLAN_BYTES
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.link import Limits

from ..masked.cases import QUARTIC, Pair, residual


@pytest.fixture
def path(bundle: Bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "net.espn")
    return tmp_path / "net.espn"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def resealed(
    path: Path,
    *,
    arrays: dict[str, np.ndarray] | None = None,
    texts: dict[str, str] | None = None,
) -> None:
    """The bundle with other contents under a seal that holds."""
    told, held = read(path)
    write(path, {**told, **(texts or {})}, held if arrays is None else arrays)


def test_what_is_saved_is_loaded(bundle: Bundle, path: Path) -> None:
    loaded, model = load(path), bundle.model
    assert loaded.description == bundle.description
    assert loaded.model.plan == model.plan and loaded.model.report == model.report
    assert loaded.model.weights.digest == model.weights.digest


def test_a_loaded_network_answers_what_the_saved_one_does(
    bundle: Bundle, path: Path
) -> None:
    _, inputs = residual()
    results = []
    for model in (bundle.model, load(path).model):
        output, plan = model.plan.output, model.plan
        quiet = type(plan)(
            plan.version,
            plan.input,
            plan.steps,
            type(output)(output.root, output.ring, output.frac_bits, 0),
        )
        results.append(
            Pair(MaskedModel(quiet, model.weights, model.report)).infer(inputs[:2])[0]
        )
    assert np.array_equal(*results)


def test_a_plan_that_no_client_takes_is_refused_before_it_is_saved_or_served(
    model: MaskedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(model.plan.to_json())
    monkeypatch.setattr("crypten_espn.bundle.PLAN_BYTES", size)
    Bundle(model)
    monkeypatch.setattr("crypten_espn.bundle.PLAN_BYTES", size - 1)
    for use in (Bundle, lambda model: espn.serve(model, "127.0.0.1:0")):
        with pytest.raises(PlanError, match=f"takes {size:,} bytes; clients and dea"):
            use(model)
    assert Limits().plan_bytes == PLAN_BYTES


def test_only_its_owner_can_read_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "net.espn"
    path.write_bytes(b"")
    path.chmod(0o644)
    bundle.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["net.espn"]


def test_weights_and_calibration_are_not_shown(bundle: Bundle) -> None:
    assert repr(bundle) == f"Bundle(description={bundle.description!r})"


def test_no_byte_can_change_alone(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    draws = random.Random(0)
    places = {*range(8), *range(8, head, 97), *range(head, len(data), 397)}
    places |= {head - 1, len(data) - 1, data.index(b'"seal"') + 12}
    changed = tmp_path / "changed.espn"
    for place in sorted(places):
        other = data[place] ^ (1 << draws.randrange(8))
        changed.write_bytes(data[:place] + bytes([other]) + data[place + 1 :])
        refused(changed)
    for text in (data[:-1], data + b"\0", data[:head], data[:4], b""):
        changed.write_bytes(text)
        refused(changed)


def test_blanks_that_mean_nothing_are_a_change_too(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length] + b" " * 8
    path.write_bytes((length + 8).to_bytes(8, "little") + head + data[8 + length :])
    assert len(unpack(path.read_bytes())) == len(unpack(data))
    assert "was changed or is damaged" in refused(path)


def test_a_later_version_is_refused_with_what_to_do(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"crypten-espn bundle 1", b"crypten-espn bundle 2"))
    said = refused(path)
    assert "version 2" in said and "install a later crypten-espn" in said
    assert is_bundle(path)


def test_a_version_that_is_none_is_refused(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"crypten-espn bundle 1", b"crypten-espn bundle x"))
    assert "version 'x'" in refused(path)


def test_other_files_are_no_bundles(tmp_path: Path) -> None:
    path = tmp_path / "net.espn"
    assert not is_bundle(path) and "No such file" in refused(path)
    for data in (
        b"",
        b"\x80\x04K\x01.",
        b"\xff" * 40,
        pack({"x": np.zeros(3)}),
        pack({"x": np.zeros(3)}, metadata={"format": "pt"}),
        (2**40).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(data)
        assert not is_bundle(path) and "is no bundle" in refused(path)
    assert not is_bundle(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ({"plan": "{}"}, "not a plan of this version"),
        ({"description": '{"classes": 3}'}, "no description of this version"),
        ({"description": '{"classes": ["a", "b"]}'}, "2 class names were given"),
        ({"description": '{"classes": ["a\\u001b[2J"]}'}, "control characters"),
        ({"report": "[]"}, "report is damaged"),
        ({"model": "0" * 64}, "another model's"),
        ({"more": ""}, "it holds description, model, more, plan, report"),
    ],
)
def test_texts_under_a_new_seal_are_checked_all_the_same(
    path: Path, texts: dict[str, str], named: str
) -> None:
    resealed(path, texts=texts)
    assert named in refused(path)


def test_a_report_of_another_plan_is_refused(path: Path) -> None:
    report = json.loads(read(path)[0]["report"])
    report["parts"].pop()
    resealed(path, texts={"report": json.dumps(report)})
    assert "its report tells of" in refused(path)


@pytest.mark.parametrize("fault", ["missing", "type", "shape", "more", "bias"])
def test_arrays_under_a_new_seal_are_checked_all_the_same(
    path: Path, fault: str
) -> None:
    arrays = read(path)[1]
    first = arrays["weight.0"]
    if fault == "missing":
        del arrays["weight.0"]
    elif fault == "type":
        arrays["weight.0"] = first.astype(np.int64)
    elif fault == "shape":
        arrays["weight.0"] = first.reshape(-1)
    elif fault == "bias":
        arrays["bias.0"] = arrays["bias.0"][:-1]
    else:
        arrays["weight.99"] = first
    resealed(path, arrays=arrays)
    said = refused(path)
    assert {"more": "weight.99", "bias": "bias.0"}.get(fault, "weight.0") in said


def test_a_folder_that_cannot_be_written_is_named(
    bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "net.espn", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written"):
            bundle.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_any_network_that_converts_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(6, 5), espn.PolynomialActivation(QUARTIC), torch.nn.Linear(5, 2)
    ).eval()
    inputs = torch.rand(16, 6)
    (tmp_path / "network.onnx").write_bytes(export(network, inputs[:1]))
    sources: list[torch.nn.Module | Path] = [network, tmp_path / "network.onnx"]
    for number, source in enumerate(sources):
        private = espn.convert(source, inputs)
        path = tmp_path / f"{number}.espn"
        private.save(path, classes=["cat", "dog"])
        loaded = espn.load(path)
        assert loaded.description == Description(classes=("cat", "dog"))
        logits, _ = espn.simulate(loaded.model, inputs)
        assert float((logits - network(inputs)).detach().abs().max()) < 0.02


def test_a_network_without_a_plan_is_not_saved(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU()).eval()
    private = espn.convert(network, torch.rand(4, 6))
    with pytest.raises(PlanError):
        private.save(tmp_path / "net.espn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"classes": ["a", "b"]}, ShapeError),
        ({"classes": "abc"}, DataError),
        ({"images": Preprocessing((0.5,), (0.5,))}, ShapeError),
        ({"images": Preprocessing((0,) * 3, (1,) * 3, resize=1)}, ShapeError),
    ],
    ids=["names", "text", "channels", "resize"],
)
def test_what_does_not_belong_to_a_network_is_not_saved_with_it(
    tmp_path: Path, said: dict[str, object], error: type[Exception]
) -> None:
    network, inputs = residual()
    with pytest.raises(error):
        espn.convert(network, inputs).save(tmp_path / "net.espn", **said)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_file_is_plain_safetensors(path: Path) -> None:
    arrays = unpack(path.read_bytes())
    assert {"weight.0", "bias.0"} <= set(arrays)
    assert all(array.dtype in (np.int32, np.int64) for array in arrays.values())
    assert os.path.getsize(path) > sum(array.nbytes for array in arrays.values())
