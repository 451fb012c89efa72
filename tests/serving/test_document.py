"""docs/serving.md, followed: its commands, real processes, sockets and certificates.

Only the network is a stand-in, and the hosts' names and ports are this machine's.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crypten_espn as espn
from crypten_espn import cli
from crypten_espn.graph import export

from ..masked.cases import QUARTIC
from .commands import running

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
NETWORK = "torchvision.models.resnet18(num_classes=3).eval()"
NAMES = ["cat", "dog", "horse"]


def commands(text: str) -> list[list[str]]:
    """The words of every command with a host before it, in the document's order."""
    found = re.findall(r"^    \w+\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " ")) for line in found]


def small(*, polynomial: bool) -> torch.nn.Module:
    """What a user has trained, but small: an image of 64x64 to three logits."""
    torch.manual_seed(1)
    activation = espn.PolynomialActivation(QUARTIC) if polynomial else torch.nn.ReLU()
    pool = torch.nn.AvgPool2d(8) if polynomial else torch.nn.MaxPool2d(8)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 8, stride=8),
        activation,
        pool,
        torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    ).eval()


def photograph(path: Path, seed: int) -> None:
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    coarse.resize((120, 90)).save(path, quality=95)


class Hosts:
    """The document's hosts on this machine: its names and ports are replaced."""

    def __init__(self) -> None:
        self.names = {"model.example": "localhost", "dealer.example": "127.0.0.1"}
        self.ports: dict[str, str] = {}

    def here(self, words: list[str]) -> list[str]:
        """A command's words, for this machine; a port that is not known is 0."""
        assert words[0] == "crypten-espn"
        found = []
        for word in words[1:]:
            for name, known in self.names.items():
                word = word.replace(name, known)
            address = re.fullmatch(r"([\w.]+):(\d+)", word)
            if address:
                word = f"{address[1]}:{self.ports.get(address[2], '0')}"
            found.append(word)
        return found

    @contextlib.contextmanager
    def running(self, words: list[str]) -> Iterator[None]:
        """A host's process, from the line that names its address until it is ended."""
        with running(self.here(words)) as listening:
            # Of a sidecar's addresses the first is its server's.
            after = words.index("--listen") if "--listen" in words else 0
            address = next(w for w in words[after:] if re.fullmatch(r"[\w.]+:\d+", w))
            before = dict(self.ports)
            self.ports[address.rpartition(":")[2]] = listening.rpartition(":")[2]
            yield
            self.ports = before


def answered(line: str) -> list[str]:
    """The classes that a line of `predict --top 3` names, the likeliest first."""
    assert line.startswith("cat.jpg: ")
    ranked = [part.rsplit(" ", 1) for part in line[9:].split("; ")]
    scores = [float(score) for _, score in ranked]
    assert scores == sorted(scores, reverse=True) and abs(sum(scores) - 1) < 1e-3
    return [name for name, _ in ranked]


def from_page(port: str) -> str:
    """The class that the sidecar's page shows for the photograph."""
    image = Path("cat.jpg").read_bytes()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/image", image) as answer:
        return str(json.load(answer)["classes"][0]["name"])


def from_python(text: str) -> torch.nn.Module:
    """Run the document's block of Python with the small network in the place of its."""
    (block,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    assert block.count(NETWORK) == 1
    network = small(polynomial=False)
    held: dict[str, object] = {"network_of_yours": network}
    exec(block.replace(NETWORK, "network_of_yours"), held)
    changed = held["network"]
    assert isinstance(changed, torch.nn.Module)
    return changed


def from_onnx(words: list[str]) -> torch.nn.Module:
    """Run the document's command for an ONNX file."""
    network = small(polynomial=True)
    Path("model.onnx").write_bytes(export(network, torch.zeros(1, 3, 64, 64)))
    Path("labels.txt").write_text("\n".join(NAMES) + "\n")
    Path("photos").mkdir()
    for seed in range(6):
        photograph(Path("photos") / f"{seed}.jpg", seed)
    assert cli.main(words[1:]) == 0
    return network


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_who_follows_the_document_learns_the_class_of_a_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DOCUMENT.read_text()
    bundle, keys, deal, serve, predict, prepare, again, beside = commands(text)
    monkeypatch.chdir(tmp_path)
    hosts = Hosts()
    assert cli.main(hosts.here(keys)) == 0
    assert not any(file.stat().st_mode & 0o077 for file in Path("keys").iterdir())
    photograph(Path("cat.jpg"), 7)
    with hosts.running(deal):
        for way in (lambda: from_python(text), lambda: from_onnx(bundle)):
            network = way()
            x = espn.load("net.espn").read_images("cat.jpg")
            with torch.no_grad():
                wanted = NAMES[int(network(x).argmax())]
            with hosts.running(serve):
                capsys.readouterr()
                assert cli.main(hosts.here(predict)) == 0
                found = answered(capsys.readouterr().out.strip())
                assert found[0] == wanted and set(found) == set(NAMES)
                assert cli.main(hosts.here(prepare)) == 0
                capsys.readouterr()
                assert cli.main(hosts.here([*again, "--format", "jsonl"])) == 0
                (second,) = capsys.readouterr().out.splitlines()
                assert json.loads(second)["classes"][0]["class"] == wanted
                with hosts.running(beside):
                    assert from_page(hosts.ports["8000"]) == wanted
            for folder in ("kept", "prepared"):
                shutil.rmtree(folder)  # of the other network's bundle


def test_every_command_of_the_document_is_followed() -> None:
    names = [words[1] for words in commands(DOCUMENT.read_text())]
    offline = ["bundle", "keys", "deal", "serve", "predict", "prepare"]
    assert names == [*offline, "predict", "sidecar"]
