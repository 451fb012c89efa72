"""Both parties and the dealer of the masked engine in one process; small networks."""

from __future__ import annotations

import threading

import numpy as np
import torch

import crypten_espn as espn
from crypten_espn.masked import kernels, offline, online, plan
from crypten_espn.masked.planning import builder as planner
from crypten_espn.wire.channel import socket_pair

QUARTIC = espn.Polynomial((322, 512, 160, 0, -3), 10, (-5.0, 5.0))


def together(*functions, timeout=60):
    """Run functions in threads; return their values or raise the first failure."""
    values: list = [None] * len(functions)
    errors: list[BaseException] = []

    def run(index):
        try:
            values[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(i,), daemon=True)
        for i in range(len(functions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive() or errors
    if errors:
        raise errors[0]
    return values


class Pair:
    """Two parties joined by a socket pair; `run` prepares and does one inference."""

    def __init__(self, chosen, weights, *, batch=1, seed=bytes(16)):
        self.plan, self.batch = chosen, batch
        self.dealer = offline.Dealer(chosen, batch=batch, seed=seed)
        self.channels = socket_pair(timeout=20)
        self.dealing = socket_pair(timeout=20)
        seeds = self.dealer.seeds
        self.model_weights = weights
        self.model: torch.nn.Module | None = None
        self.weights = [weights, None]
        if chosen.mode == "shared":
            self.weights = list(
                offline.share_weights(chosen, weights, bytes(range(16)))
            )
        shared = chosen.mode == "shared"
        self.opened = together(
            lambda: offline.opened_weights(
                chosen, self.channels[0], seed=seeds[0], weights=self.weights[0]
            ),
            lambda: offline.opened_weights(
                chosen,
                self.channels[1],
                seed=seeds[1] if shared else None,
                weights=self.weights[1],
            ),
        )
        self.sides = [
            offline.Preparation(
                chosen,
                rank=rank,
                seed=seeds[rank],
                weights=self.weights[rank],
                batch=batch,
                opened=self.opened[rank],
            )
            for rank in (0, 1)
        ]

    def prepare(self, index):
        """The material of both parties, made over the channels."""
        down, up = self.channels

        def halves(number):
            segment = self.plan.segments[number]
            count = self.batch * segment.elements
            flat = down.receive(count, bits=segment.ring, tag=index)
            return flat.reshape(self.batch, *segment.root.shape)

        def server():
            deal = offline.receive_deal(
                self.plan, self.dealing[1], index, batch=self.batch
            )
            return self.sides[0].server(deal, halves, index)

        def client():
            return self.sides[1].client(
                index, lambda half, bits: up.send(half, bits=bits, tag=index)
            )

        made = together(
            server, client, lambda: self.dealer.send(self.dealing[0], index)
        )
        return made[:2]

    def online(self, materials, x):
        """The output's integers as rank 1 gets them; counters hold the online part."""
        for channel in self.channels:
            channel.reset_counters()
        encoded = self.plan.encode(x)
        down, up = self.channels
        if self.plan.mode == "owner":
            return together(
                lambda: online.serve_one(
                    self.plan, self.weights[0], down, materials[0], batch=self.batch
                ),
                lambda: online.query_one(
                    self.plan, up, materials[1], encoded, batch=self.batch
                ),
            )[1]
        return together(
            lambda: online.run_shared(
                self.plan,
                self.weights[0],
                down,
                materials[0],
                None,
                rank=0,
                batch=self.batch,
            ),
            lambda: online.run_shared(
                self.plan,
                self.weights[1],
                up,
                materials[1],
                encoded,
                rank=1,
                batch=self.batch,
            ),
        )[1]

    def masks(self, index):
        """What `plan.simulate` needs to be bit-exact with this inference."""
        return [
            (None if r is None else r.astype(np.int64), second)
            for r, second in zip(
                self.dealer.first_masks(index),
                self.dealer.second_masks(index),
                strict=True,
            )
        ]

    def close(self):
        for channel in (*self.channels, *self.dealing):
            channel.close()


def planned(model, example, **options):
    """Plan and integer weights of a torch model."""
    graph = espn.convert(model, example[:1])
    chosen = planner.make_plan(graph, example, **options)
    return chosen, plan.quantise(chosen, planner.parameters_of(graph))


def centred(z, chosen):
    return kernels.centred(z, chosen.segments[-1].ring)


class Residual(torch.nn.Module):
    """Stem, a strided block with a projection, average pool and a linear head."""

    def __init__(self, polynomial=QUARTIC):
        super().__init__()

        def act():
            return espn.PolynomialActivation(polynomial)

        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.act0, self.act1, self.act2 = act(), act(), act()
        self.conv1 = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.conv2 = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.project = torch.nn.Conv2d(8, 16, 1, stride=2)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        x = self.act0(self.stem(x))
        x = self.act2(self.conv2(self.act1(self.conv1(x))) + self.project(x))
        return self.head(x.mean((2, 3)))


def residual():
    torch.manual_seed(1)
    return Residual().eval().requires_grad_(False), torch.randn(4, 3, 8, 8)
