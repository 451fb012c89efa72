"""A party that is killed in the middle of an inference goes on without using any twice.

The killed one is a process that ends itself at a named point: a record is marked as
used, and nothing was sent for it yet.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from crypten_espn.errors import PeerError
from crypten_espn.masked.model import MaskedModel
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Link

from .conftest import Run, Served, serving

TOTAL, KILLED_AT = 6, 2
DYING = """
    import os, pickle, signal, sys
    from pathlib import Path
    import torch
    from crypten_espn.serving.client import connect
    from crypten_espn.serving.link import Link
    from crypten_espn.serving.server import ModelServer
    from crypten_espn.serving.stock import Stock

    def dying(take):
        def taken(*args, **options):
            material = take(*args, **options)
            if material.pairing.index == {killed_at}:
                os.kill(os.getpid(), signal.SIGKILL)
            return material
        return taken

    folder = Path(sys.argv[1])
"""
CLIENT = """
    Stock.take_next = dying(Stock.take_next)
    link = Link(sys.argv[3], folder / "client", timeout=60)
    data = torch.load(folder / "x.pt")
    with connect(sys.argv[2], link=link) as client:
        client.prepare({total})
        for i in range({total}):
            print(*client.predict(data[i : i + 1])[0].tolist(), flush=True)
"""
SERVER = """
    Stock.take = dying(Stock.take)
    model = pickle.loads((folder / "model").read_bytes())
    link = Link(sys.argv[2], folder / "server", timeout=60)
    server = ModelServer(model, "127.0.0.1:0", link=link)
    print(server.address, flush=True)
    server.run()
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    text = textwrap.dedent(DYING) + textwrap.dedent(script)
    text = text.format(killed_at=KILLED_AT, total=TOTAL)
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )


def use_the_rest(served: Served, address: str, kept: Link) -> None:
    """The records after the one that was lost, each once."""
    with connect(address, link=kept) as client:
        assert client.remaining == TOTAL - KILLED_AT - 1
        for i in range(client.remaining):
            x = served.inputs[i : i + 1]
            assert served.is_right(x, client.predict(x))
        assert client.remaining == 0


@pytest.mark.slow
def test_a_killed_client_loses_one_inference(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    served = serving(model, run, directory=tmp_path / "server")
    torch.save(served.inputs.repeat(2, 1, 1, 1), tmp_path / "x.pt")
    dying = start(CLIENT, tmp_path, served.server.address, served.dealer.address)
    assert dying.stdout is not None
    with dying.stdout:
        lines = dying.stdout.read().splitlines()
    assert dying.wait() == -9 and len(lines) == KILLED_AT
    for i, line in enumerate(lines):
        logits = torch.tensor([[float(value) for value in line.split()]])
        assert served.is_right(served.inputs[i : i + 1], logits)
    kept = Link(served.dealer.address, tmp_path / "client", timeout=20)
    use_the_rest(served, served.server.address, kept)


@pytest.mark.slow
def test_a_killed_server_loses_one_inference(
    model: MaskedModel, run: Run, tmp_path: Path
) -> None:
    dealer = run(DealerServer("127.0.0.1:0", timeout=60))
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    dying = start(SERVER, tmp_path, dealer.address)
    assert dying.stdout is not None
    with dying.stdout:
        address = dying.stdout.readline().strip()
    kept = Link(dealer.address, tmp_path / "client", timeout=60)
    again = serving(model, run, directory=tmp_path / "server")
    with connect(address, link=kept) as client:
        client.prepare(TOTAL)
        for i in range(KILLED_AT):
            x = again.inputs[i : i + 1]
            assert again.is_right(x, client.predict(x))
        with pytest.raises(PeerError):
            client.predict(again.inputs[:1])
    assert dying.wait() == -9
    use_the_rest(again, again.server.address, kept)
