"""Index maps: exact in both engines, joined, and one box where one is enough."""

from __future__ import annotations

from collections.abc import Callable

import crypten
import numpy as np
import pytest
import torch
from crypten.encoder import FixedPointEncoder
from torch import Tensor, nn
from torch.nn import functional

import crypten_espn as espn
from crypten_espn.errors import PlanError
from crypten_espn.graph.index_map import counted
from crypten_espn.launch import run_parties
from crypten_espn.masked.linear import Move
from crypten_espn.masked.moving import boxes
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.planning.network import parameters_of
from crypten_espn.masked.reference import evaluate

from ..conversion_cases import assert_right, refusal
from ..masked import oracle
from ..masked.cases import Pair, without_noise
from ..masked.networks import Written, act, conv, ready


def shuffled(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


# Of an image of 4 channels, 6 rows and 4 columns.
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, 1:3, 1:, ::2],
    "reversed": lambda x: x.flip(1, 3),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split of rows": lambda x: x.split([2, 1, 3], 2)[2],
    "unbound": lambda x: x.unbind(1)[2],
    "picked": lambda x: x[:, [3, 0, 0, 2]],
    "concatenated rows": lambda x: torch.cat([x, x[:, :, :1], x], 2),
    "concatenated columns": lambda x: torch.cat([x[..., 1:], x], -1),
    "stacked": lambda x: torch.stack([x, x.flip(2)], 2),
    "transposed": lambda x: x.transpose(2, 3),
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "sequence": lambda x: x.flatten(2).transpose(1, 2),
    "reshaped": lambda x: x.reshape(len(x), 3, 8, 4),
    "channel shuffle": shuffled,
    "shuffled channels": nn.ChannelShuffle(2),
    "pixel shuffle": nn.PixelShuffle(2),
    "pixel unshuffle": nn.PixelUnshuffle(2),
    "windows": lambda x: x.view(len(x), 4, 3, 2, 2, 2).permute(0, 2, 4, 1, 3, 5),
    "batch in between": lambda x: x.permute(1, 0, 2, 3)[2:].transpose(0, 1),
    "rolled": lambda x: x.roll((1, -1), (2, 3)),
    "repeated": lambda x: x.repeat(1, 2, 1, 3),
    "enlarged": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "reflected": nn.ReflectionPad2d((1, 0, 2, 1)),
    "replicated": nn.ReplicationPad2d(1),
    "around": nn.CircularPad2d((1, 2, 0, 1)),
    "pads of every axis": lambda x: functional.pad(x, (1, 0, 2, 1, 0, 1)),
    "pads that crop": lambda x: functional.pad(x, (-1, 1, 0, -2, 1, -1)),
    "nearest": lambda x: functional.interpolate(x, scale_factor=2),
    "nearest of a size": lambda x: functional.interpolate(x, size=(4, 7)),
}


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MOVES)
def test_a_move_of_the_input_is_one_layer_that_copies_integers(name: str) -> None:
    move, x = MOVES[name], image()
    model = ready(Written(move))
    graph = assert_right(model, x)
    assert [node.op for node in graph.nodes] in (["Move"], ["Pad"])
    masked = masked_model(espn.convert(model, x))
    whole = masked.plan.encode(x)
    got = Pair(without_noise(masked)).infer(x)[0]
    expected = move(torch.from_numpy(np.moveaxis(whole, -1, 1)).double()).long()
    scale = masked.plan.output.frac_bits - masked.plan.input.frac_bits
    assert np.array_equal(np.moveaxis(got, -1, 1) >> scale, expected.numpy())


def several() -> tuple[nn.Module, Tensor]:
    """Moves of sources, of weighted values and of several, and their constants."""
    torch.manual_seed(0)

    def forward(x, a, b, c, p, q, head):
        y = p(a(x))
        one, two = shuffled(y).chunk(2, 1)
        y = torch.cat([b(two), one], 1)
        y = torch.cat([y[:, :, 1:], y[:, :, :1] + 1], 2)
        y = q(nn.functional.pixel_shuffle(c(y), 2) + x.mean(1, keepdim=True))
        return head(y.flatten(2).transpose(1, 2)).flatten(1)

    x = torch.randn(3, 4, 4, 4)
    parts = conv(4, 4), conv(2, 2, 3, padding=1), conv(4, 8, 3), act(), act()
    return ready(Written(forward, *parts, nn.Linear(2, 3))), x


def test_moves_among_layers_are_what_python_integers_give() -> None:
    network, x = several()
    report = espn.check(network, x)
    assert report.ok and report.masked is None, report
    private = espn.convert(network, x)
    model = masked_model(private)
    assert any(isinstance(node, Move) for node in model.plan.parts[1].root.walk())
    _, trace = evaluate(model.plan, model.weights, x[:1])
    image = model.plan.encode(x[:1]).transpose(0, 3, 1, 2)[0]
    expected = oracle.logits(model, parameters_of(private), image.tolist())
    assert {at: int(trace[-1][0][at]) for at in expected} == expected
    pair = Pair(without_noise(model))
    got, _ = pair.infer(x)
    coins = pair.roundings(0, len(x))
    _, trace = evaluate(pair.plan, model.weights, x, roundings=coins)
    assert np.array_equal(got, trace[-1])


def between_parties(x: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in ("pixel shuffle", "concatenated rows", "pads of every axis"):
        private = espn.convert(ready(Written(MOVES[name])), x).encrypt(src=0)
        found[name] = private(crypten.cryptensor(x, src=1)).get_plain_text()
    return found


def test_two_crypten_parties_move_without_rounding() -> None:
    x, encoder = image(2), FixedPointEncoder()
    whole = encoder.decode(encoder.encode(x))
    for found in run_parties(between_parties, world_size=2, args=(x,)):
        for name, got in found.items():
            assert torch.equal(got, MOVES[name](whole)), name


def test_chains_of_moves_are_one_and_their_pieces_are_few() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.cat(shuffled(x).chunk(2, 1)[::-1], 1).transpose(2, 3)
        return x

    network = ready(Written(lambda x, a: a(chain(x)), act()))
    private = espn.convert(network, image())
    assert [type(kind).__name__ for kind in private.layers.values()][:1] == ["Move"]
    plan = masked_model(private).plan
    (move,) = (node for node in plan.steps[0].root.walk() if isinstance(node, Move))
    assert len(move.boxes) <= 4 and len(plan.to_json()) < 1500
    whole = counted((64, 56, 56))
    assert len(boxes(whole.transpose(1, 2, 0), [whole.size], most=1)) == 1
    assert len(boxes(whole.reshape(-1), [whole.size], most=1)) == 1


def test_a_map_without_order_is_refused_by_name() -> None:
    order = np.random.default_rng(0).permutation(20_000)
    with pytest.raises(PlanError, match="more than 4,096 pieces"):
        boxes(order, [order.size], most=4096)


def test_what_mixes_the_inputs_of_a_batch_is_refused() -> None:
    x = image()
    for mixing in (
        lambda x: x.flip(0),
        lambda x: x.transpose(0, 1),
        lambda x: x.reshape(6, -1),
        lambda x: x[:2],
        lambda x: torch.cat([x, x], 0),
    ):
        assert "batch" in refusal(Written(mixing), x)
