"""CrypTen's offline phase: tuples traced, made and used once."""

from __future__ import annotations

import os
from pathlib import Path

import crypten
import pytest
import torch
from torch import nn

from crypten_espn import patches
from crypten_espn.launch import run_parties

from .cases import convert


@pytest.mark.parametrize("provider", ["TFP", "TTP"])
def test_tuple_cache(provider: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=(1, 0)), nn.ReLU()).eval()
    x = torch.randn(1, 2, 4, 4)
    graph = convert(model, x)
    folder = str(tmp_path)

    def run() -> tuple[int, int, int, torch.Tensor]:
        graph.encrypt(src=0)
        dealer = crypten.mpc.get_default_provider()
        made = 0
        names = dealer.TRACEABLE_FUNCTIONS

        def count(name: str) -> None:
            stock = getattr(type(dealer), name)

            def counted(self: object, *args: object, **kwargs: object) -> object:
                nonlocal made
                made += 1
                return stock(self, *args, **kwargs)

            setattr(type(dealer), name, counted)

        for name in names:
            count(name)
        crypten.trace()
        graph(crypten.cryptensor(x, src=1))
        crypten.trace(False)
        traced = made
        crypten.fill_cache()
        filled = made - traced
        dealer.save_cache(folder)
        assert not dealer.tuple_cache
        dealer.load_cache(folder)
        assert not os.path.exists(dealer._get_tuple_path(folder))
        made = 0
        output = graph(crypten.cryptensor(x, src=1)).get_plain_text()
        online = made
        # The cache is used up: every tuple served once, the next is made on demand.
        again = graph(crypten.cryptensor(x, src=1)).get_plain_text()
        assert (again - output).abs().max() < 2e-3 and made == traced
        return traced, filled, online, output

    with crypten.cfg.temp_override({"mpc.provider": provider}), torch.no_grad():
        for traced, filled, online, output in run_parties(run, world_size=2):
            assert traced == filled > 0 == online
            assert (output - model(x)).abs().max() < 2e-3


def test_tuple_cache_without() -> None:
    model, x = nn.Conv2d(1, 1, 3).eval(), torch.randn(1, 1, 4, 4)
    graph = convert(model, x)

    def run() -> str:
        patches.get("tuple_cache").revert()
        graph.encrypt(src=0)
        crypten.trace()
        graph(crypten.cryptensor(x, src=1))
        crypten.trace(False)
        try:
            crypten.fill_cache()
        except TypeError as error:
            return str(error)
        return "filled"

    assert "unhashable type: 'list'" in run_parties(run, world_size=2)[0]


def test_trace_once() -> None:
    provider = crypten.mpc.provider.TrustedFirstParty()
    provider.trace_once()
    assert provider.tracing
    provider.request_cache.append(("square", (), {}))
    provider.trace_once()
    assert not provider.tracing
