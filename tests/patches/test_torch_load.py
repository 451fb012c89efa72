"""Files of shares, read without running what is in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import crypten
import crypten.communicator as comm
import pytest
import torch

from crypten_espn import patches
from crypten_espn.launch import run_parties


def test_torch_load(tmp_path: Path) -> None:
    path = str(tmp_path / "shares")
    data = torch.randn(3)

    def run(patched: bool) -> torch.Tensor | None:
        if not patched:
            patches.get("torch_load").revert()
        mine = f"{path}-{comm.get().get_rank()}"
        x = crypten.cryptensor(data, src=0, requires_grad=True)
        crypten.save({"x": x * 2, "b": (x > 0)._tensor}, mine)
        try:
            return crypten.load(mine)["x"].get_plain_text()
        except pickle.UnpicklingError:
            return None

    assert run_parties(run, world_size=2, args=(False,)) == [None, None]
    for loaded in run_parties(run, world_size=2, args=(True,)):
        assert (loaded - 2 * data).abs().max() < 1e-3


def test_torch_load_runs_no_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("true",)

    torch.save(Payload(), tmp_path / "file")
    with pytest.raises(pickle.UnpicklingError):
        crypten.load(tmp_path / "file")
