"""A served bundle: what its clients are told, and `predict` by what they were told."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crypten_espn as espn
from crypten_espn import cli
from crypten_espn.bundle import Bundle, Description, Preprocessing
from crypten_espn.errors import DataError, PeerError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Link
from crypten_espn.serving.messages import receive_description, send_description
from crypten_espn.serving.server import ModelServer
from crypten_espn.wire.channel import socket_pair

from ..masked.cases import residual
from .conftest import Run, Served

IMAGES = Preprocessing((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))


@pytest.fixture(scope="session")
def bundle(model: MaskedModel) -> Bundle:
    (count,) = model.plan.output_shape
    return Bundle(model, Description(IMAGES, tuple(f"class {i}" for i in range(count))))


@pytest.fixture
def described(bundle: Bundle, run: Run, tmp_path: Path) -> Served:
    """The bundle, served with a folder for material."""
    dealer = run(DealerServer("127.0.0.1:0", timeout=20))
    link = Link(dealer.address, tmp_path / "server", timeout=20)
    server = run(ModelServer(bundle, "127.0.0.1:0", link=link))
    network, inputs = residual()
    return Served(server, dealer, network, inputs)


@pytest.fixture
def photos(bundle: Bundle, tmp_path: Path) -> Path:
    _, height, width = bundle.model.plan.input.shape
    folder = tmp_path / "photos"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(5):
        pixels = draws.integers(80, 176, (height + 4, width + 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def predict(
    capsys: pytest.CaptureFixture[str], served: Served, *arguments: object
) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(
        [
            *("predict", served.server.address),
            *("--dealer", served.dealer.address),
            *map(str, arguments),
        ]
    )
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def wanted(bundle: Bundle, served: Served, *paths: Path) -> list[str]:
    """The likeliest class of each image, by the network itself."""
    with torch.no_grad():
        logits = served.network(bundle.read_images(*paths))
    return [f"class {i}" for i in logits.argmax(1).tolist()]


def test_a_client_is_told_what_the_bundle_says(
    bundle: Bundle, described: Served, photos: Path
) -> None:
    image = photos / "0.png"
    with connect(described.server.address, link=described.link) as client:
        assert client.description == bundle.description
        x = client.read_images(image)
        assert torch.equal(x, bundle.read_images(image))
        assert described.is_right(x, client.predict(x))


def test_a_bare_model_says_nothing_of_images(served: Served) -> None:
    with connect(served.server.address, link=served.link) as client:
        assert client.description == Description()
        with pytest.raises(DataError, match="does not say how images become inputs"):
            client.read_images("photo.png")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"class 0", b"class X"),
        lambda text: text[:-1],
        lambda text: text + b" ",
        lambda text: b"",
    ],
    ids=["name", "cut", "blank", "nothing"],
)
def test_a_description_that_was_changed_is_refused(bundle: Bundle, change) -> None:
    described, plan = bundle.description, bundle.model.plan
    ours, theirs = socket_pair()
    with ours, theirs:
        theirs.send_bytes(change(described.text))
        with pytest.raises(PeerError, match="was changed on the way"):
            receive_description(ours, digest=described.digest.hex(), plan=plan)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (Description(classes=("a", "b")), "2 class names"),
        (Description(Preprocessing((0.5,), (0.5,))), "images of 1 channels"),
    ],
)
def test_a_description_of_another_network_is_refused(
    bundle: Bundle, wrong: Description, named: str
) -> None:
    ours, theirs = socket_pair()
    with ours, theirs:
        send_description(theirs, wrong)
        with pytest.raises(PeerError, match=named):
            receive_description(ours, digest=wrong.digest.hex(), plan=bundle.model.plan)


def test_a_server_is_started_from_a_file(
    bundle: Bundle, run: Run, tmp_path: Path
) -> None:
    bundle.save(tmp_path / "net.espn")
    server = run(ModelServer(espn.load(tmp_path / "net.espn"), "127.0.0.1:0"))
    with connect(server.address, timeout=20) as client:
        assert client.description.digest == bundle.description.digest


def test_images_are_answered_by_their_classes(
    bundle: Bundle,
    described: Served,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = sorted(photos.iterdir())
    status, out, err = predict(capsys, described, photos, "--batch", 2)
    assert (status, err) == (0, "")
    lines = [line.rsplit(" ", 1)[0] for line in out.splitlines()]
    classes = wanted(bundle, described, *files)
    assert lines == [f"{f}: {name}" for f, name in zip(files, classes, strict=True)]


def test_answers_are_written_for_programs(
    bundle: Bundle,
    described: Served,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = photos / "0.png"
    (likeliest,) = wanted(bundle, described, image)
    np.save(photos / "x.npy", described.inputs[:2].numpy())
    given = image, photos / "x.npy", "--top", 3, "--format"
    status, out, _ = predict(capsys, described, *given, "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and [row["rank"] for row in rows] == list("123") * 3
    assert rows[0]["class"] == likeliest and rows[3]["input"].endswith("x.npy[0]")
    status, out, _ = predict(capsys, described, *given, "jsonl")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(found) == 3
    assert found[0]["classes"][0]["class"] == likeliest
    for row, one in zip(rows, found[0]["classes"], strict=False):
        assert abs(float(row["score"]) - one["score"]) < 0.01


def test_prepared_material_is_used_whatever_batch_it_is_for(
    bundle: Bundle,
    described: Served,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "client"
    addresses = described.server.address, "--dealer", described.dealer.address
    more = "--material", str(folder), "--count", "2", "--batch", "4"
    assert cli.main(["prepare", *addresses, *more]) == 0
    assert "prepared 2 inferences of 4 inputs" in capsys.readouterr().out
    files = sorted(photos.iterdir())
    status, out, _ = predict(capsys, described, photos, "--material", folder)
    assert status == 0
    lines = [line.rsplit(" ", 1)[0] for line in out.splitlines()]
    classes = wanted(bundle, described, *files)
    assert lines == [f"{f}: {name}" for f, name in zip(files, classes, strict=True)]
    with connect(
        described.server.address, link=Link(directory=folder, timeout=20)
    ) as client:
        assert client.remaining == 0 and client.next_batch is None


@pytest.mark.parametrize("fault", ["damaged", "size", "range", "text"])
def test_what_is_no_input_is_named_before_anything_is_sent(
    described: Served,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    def sent(*_: object, **__: object) -> None:
        raise AssertionError("something was prepared or sent")

    monkeypatch.setattr("crypten_espn.serving.client.Client.prepare", sent)
    wrong = photos / ("9.png" if fault in ("damaged", "text") else "9.npy")
    if fault == "damaged":
        wrong.write_bytes((photos / "0.png").read_bytes()[:200])
    elif fault == "text":
        wrong.write_bytes(b"no image")
    elif fault == "size":
        np.save(wrong, described.inputs[:2, :, 1:].numpy())
    else:
        np.save(wrong, 1e6 * described.inputs[:2].numpy())
    status, out, err = predict(capsys, described, photos / "0.png", wrong)
    assert status == 2 and out == "" and wrong.name in err
    assert err.count("\n") == 1


def test_a_network_without_names_answers_logits(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", served.inputs[:3].numpy())
    with torch.no_grad():
        right = served.network(served.inputs[:3]).numpy()
    status, out, _ = predict(capsys, served, "--input", tmp_path / "x.npy")
    assert status == 0
    assert np.abs(np.loadtxt(io.StringIO(out)) - right).max() < 0.02
    status, out, _ = predict(
        capsys, served, tmp_path / "x.npy", "--format", "csv", "--batch", 2
    )
    rows = list(csv.reader(io.StringIO(out)))
    assert status == 0 and rows[0][:2] == ["input", "logit 0"] and len(rows) == 4
    out_file = tmp_path / "logits.npy"
    given = "--input", tmp_path / "x.npy", "--out", out_file
    assert predict(capsys, served, *given)[:2] == (0, f"wrote {out_file}\n")
    assert np.abs(np.load(out_file) - right).max() < 0.02
    status, _, err = predict(capsys, served, tmp_path / "x.npy", "--top", 2)
    assert status == 2 and "does not name its classes" in err
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    status, _, err = predict(capsys, served, tmp_path / "photo.png")
    assert status == 2 and "does not say how images become inputs" in err


@pytest.mark.parametrize("arguments", [(), ("a.png", "--input", "x.npy")])
def test_inputs_are_named_once(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    address = "predict", "127.0.0.1:1", "--dealer", "127.0.0.1:1"
    with pytest.raises(SystemExit) as ended:
        cli.main([*address, *arguments])
    assert ended.value.code == 2
    assert "one of both" in capsys.readouterr().err
