"""The engine asked many times, with all that the client sees and must not see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import crypten_espn as espn
from crypten_espn.masked import kernels
from crypten_espn.masked.dealing import Dealing, coins
from crypten_espn.masked.drivers import together
from crypten_espn.masked.evaluation import Evaluation, OfProduct, chunks
from crypten_espn.masked.inference import client, server
from crypten_espn.masked.material import (
    ClientMaterial,
    Pairing,
    inference_seeds,
)
from crypten_espn.masked.messages import CLIENT, DEALER, SERVER, Party, Send
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.planning import masked_model
from crypten_espn.masked.preparing import ClientPreparation, ServerPreparation
from crypten_espn.masked.steps import Product
from crypten_espn.randomness import Keystream

QUARTIC = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


class Gate(torch.nn.Module):
    """A product of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = torch.nn.Linear(16, width), torch.nn.Linear(16, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, (batch, width)."""
        product: torch.Tensor = self.value(x) * self.gate(x)
        return product


def small_model(
    seed: int, *, width: int = 16, logits: int = 3, gate: bool = False
) -> MaskedModel:
    """A network of 16 inputs, one hidden layer and a few logits, weights at random.

    Args:
        gate: the hidden layer is a product of two, not a polynomial of one.
    """
    torch.manual_seed(seed)
    hidden = [torch.nn.Linear(16, width), espn.PolynomialActivation(QUARTIC)]
    network = torch.nn.Sequential(
        torch.nn.Flatten(),
        *([Gate(width)] if gate else hidden),
        torch.nn.Linear(width, logits),
    ).eval()
    images = torch.randn(64, 1, 4, 4) * 2
    return masked_model(espn.convert(network.requires_grad_(False), images))


@dataclass
class Answer:
    """One batch of queries of one input.

    Args:
        logits: (batch, n) integers as the client learns them.
        words: by name, (batch, elements) of what the client drew, holds or received.
        coins: likewise, what only the dealer or the server knows.
    """

    logits: np.ndarray
    words: dict[str, np.ndarray]
    coins: dict[str, np.ndarray]


def ask(
    model: MaskedModel,
    x: torch.Tensor,
    *,
    batches: int,
    corrections: Party = SERVER,
) -> Iterator[Answer]:
    """Query the engine `batches` times with the same batch; note all the client sees.

    Args:
        x: (batch, *input shape); rows are usually equal.
        corrections: who receives the dealer's.
    """
    plan, batch, seed = model.plan, len(x), bytes(range(16))
    dealing = Dealing(plan, seed=seed, corrections=corrections)
    ours = ServerPreparation(plan, model.weights, dealing.seeds[0])
    theirs = ClientPreparation(plan, dealing.seeds[1])
    together({SERVER: ours.open_weights(), CLIENT: theirs.open_weights()})
    # The dealer's secrets once more, for the control.
    root = Keystream(seed)
    ratchets = [
        inference_seeds(own)
        for own in (root.fork(b"dealer").bytes(16), dealing.seeds[0])
    ]
    encoded = plan.encode(x, force=True)
    for index in range(batches):
        pairing = Pairing(bytes(16), index, batch, corrections)
        ready, offline = together(
            {
                DEALER: dealing.deal(index, batch),
                SERVER: ours.prepare(pairing),
                CLIENT: theirs.prepare(pairing),
            },
            keep=True,
        )
        held = _held(plan, ready[CLIENT], batch)
        if corrections == CLIENT:
            held |= _corrected(plan, offline.sends, batch)
        values, online = together(
            {
                SERVER: server(plan, model.weights, ready[SERVER]),
                CLIENT: client(plan, ready[CLIENT], encoded),
            },
            keep=True,
        )
        for event in offline.sends:
            if event[0] == CLIENT:
                held |= _joined(f"half {len(held)}", [event[1]], batch)
        held |= _online(plan, online.sends, batch)
        own, at_server = (ratchet.take(index) for ratchet in ratchets)
        z = kernels.centred(values[CLIENT], plan.output.ring).reshape(batch, -1)
        yield Answer(z, held, _coins(plan, own, at_server, ready[SERVER], batch))


def _held(plan: Plan, material: ClientMaterial, batch: int) -> dict[str, np.ndarray]:
    """Everything the client's seed gives, what it made of it, its halves of words."""
    draws = material.draws(plan)
    held = {
        "input mask": draws.input_mask.reshape(batch, -1),
        "output": material.output.reshape(batch, -1).copy(),
    }
    if material.pairing.corrections == SERVER:
        for number in range(len(plan.parts)):
            held[f"linear {number}"] = draws.linear(number).reshape(batch, -1)
    for number, between in enumerate(plan.evaluations):
        held[f"hidden {number}"] = draws.hidden(number)
        words = [
            _lines(
                between,
                material.chunk(draws, number, chunk),
                chunk.stop - chunk.start,
            )
            for chunk in chunks(batch)
        ]
        for place, lines in enumerate(zip(*words, strict=True)):
            held[f"word {number} {place}"] = np.concatenate(lines)
    return held


def _corrected(
    plan: Plan, sends: list[tuple[str, Send]], batch: int
) -> dict[str, np.ndarray]:
    """What the dealer sends the client for each linear part; the words it keeps."""
    events = [event for sender, event in sends if sender == DEALER]
    found: dict[str, np.ndarray] = {}
    for number in range(len(plan.parts)):
        assert events[0].to == CLIENT
        found |= _joined(f"linear {number}", [events[0]], batch)
        events = events[1 + len(chunks(batch)) :]
    return found


def _lines(between: Evaluation, words: np.ndarray, rows: int) -> list[np.ndarray]:
    """Shares of the dealer's words, (rows, elements) of each kind of word."""
    if isinstance(between, OfProduct):
        size, short = between.sizes
        ends = np.cumsum([size] * 6 + [short])
        return np.split(words, ends, axis=1)
    return [line.reshape(rows, -1) for line in between.lines(words, rows)]


def _online(
    plan: Plan, sends: list[tuple[str, Send]], batch: int
) -> dict[str, np.ndarray]:
    """Every online message, with the chunks of a large batch joined."""
    parts = len(chunks(batch))
    found: dict[str, np.ndarray] = {}
    for party in (SERVER, CLIENT):
        events = [event for sender, event in sends if sender == party]
        if party == CLIENT:
            found |= _joined("input", [events.pop(0)], batch)
        for number in range(len(plan.steps)):
            mine, events = events[:parts], events[parts:]
            found |= _joined(f"{party} message {number}", mine, batch)
        for event in events:
            found |= _joined("logits' share", [event], batch)
    return found


def _joined(name: str, events: list[Send], batch: int) -> dict[str, np.ndarray]:
    columns = zip(*[event.parts for event in events], strict=True)
    return {
        f"{name} part {place}": np.concatenate(
            [array.reshape(-1) for array, _ in column]
        ).reshape(batch, -1)
        for place, column in enumerate(columns)
    }


def _coins(plan, own, at_server, material, batch) -> dict[str, np.ndarray]:
    """What the client must not know: the dealer's coins, the low bits of c."""
    found = {}
    for number, coin in enumerate(coins(plan, own, at_server, batch)):
        if coin is None:
            continue
        step = plan.steps[number]
        scale = 2.0**-step.activation.drop
        found[f"second coins {number}"] = coin.rounding.reshape(batch, -1) * scale
        c = material.linear[number].reshape(batch, -1).astype(np.int64)
        deltas = material.draws(plan).deltas(number)
        act = step.activation
        if isinstance(act, Product):
            sizes = plan.evaluations[number].sizes
            for k, part in enumerate(np.split(c, [sizes[0]], axis=1)):
                low = part & ((1 << act.dropped[k]) - 1)
                found[f"first coins {number} {k}"] = low * 2.0 ** -act.dropped[k]
        for k, group in enumerate(act.groups):
            own_c = c if k == 0 else c + deltas[k - 1].reshape(batch, -1)
            low = own_c & ((1 << group.shift) - 1)
            found[f"first coins {number} {k}"] = low * 2.0**-group.shift
    return found
