"""Parties as processes; tests/test_launch.py has the rest."""

from __future__ import annotations

import crypten
import crypten.communicator as comm
import torch

from .cases import python


def test_launcher() -> None:
    assert crypten.mpc.run_multiprocess is crypten.mpc.context.run_multiprocess

    @crypten.mpc.run_multiprocess(world_size=2)
    def party() -> torch.Tensor:
        return torch.ones(100_000) * comm.get().get_rank()

    zero, one = party()
    assert zero.sum() == 0 and one.sum() == 100_000


def test_launcher_without() -> None:
    result = python(
        "import crypten_espn, crypten, torch\n"
        "crypten_espn.patches.get('launcher').revert()\n"
        "def party():\n"
        "    raise ValueError('boom')\n"
        "print(crypten.mpc.run_multiprocess(world_size=2)(party)())"
    )
    assert result.stdout.strip() == "None"
