"""The offline phase: exact correlations, sizes, masks that serve once."""

from __future__ import annotations

import gc
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch

from crypten_espn.errors import RandomnessError
from crypten_espn.masked import kernels
from crypten_espn.masked.dealing import Dealing, coins
from crypten_espn.masked.drivers import together
from crypten_espn.masked.evaluation import chunks
from crypten_espn.masked.inference import client, server
from crypten_espn.masked.linear import Operands, accumulate
from crypten_espn.masked.material import (
    ClientMaterial,
    Draws,
    Pairing,
    ServerMaterial,
    client_layout,
    inference_seeds,
    layout_bytes,
    server_layout,
    source_mask,
    weight_masks,
)
from crypten_espn.masked.memory import Space
from crypten_espn.masked.messages import CLIENT, SERVER, Send
from crypten_espn.masked.preparing import ServerPreparation
from crypten_espn.masked.steps import Activation, Step
from crypten_espn.randomness import Keystream
from crypten_espn.wire.packing import packed_bytes

from .cases import (
    SESSION,
    Pair,
    by_channel,
    dealt_words,
    planned,
    residual,
    without_noise,
)


@pytest.fixture(scope="module")
def small():
    return planned(*residual())


def seeds_of(pair, index):
    """Dealer's, server's and client's seed of an inference."""
    own = Keystream(pair.seed).fork(b"dealer").bytes(16)
    return [inference_seeds(s).take(index) for s in (own, *pair.dealing.seeds)]


@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
@pytest.mark.parametrize("made", [residual, by_channel])
def test_dealt_values_are_the_powers_of_the_mask(made, corrections):
    """The linear parts add up to B*t + r, the values to powers of t, by integers."""
    pair, batch = Pair(planned(*made()), corrections=corrections), 2
    plan = pair.plan
    dealt, theirs = [], seeds_of(pair, 0)
    for event in pair.dealing.deal(0, batch):
        assert isinstance(event, Send) and event.to == corrections
        dealt.append([array.copy() for array, _ in event.parts])
    draws = Draws(plan, theirs[2], batch)
    halves = draws if corrections == SERVER else Draws(plan, theirs[1], batch)
    coin = list(coins(plan, theirs[0], theirs[1], batch))
    masks = [kernels.Filters(b) for b in weight_masks(plan, pair.dealing.seeds[0])]
    sources = {0: draws.input_mask}
    checked = 0
    for number, part in enumerate(plan.parts):
        (given,) = dealt.pop(0)
        total = given + halves.linear(number)
        product = np.zeros_like(total)
        operands = Operands(plan.shapes, sources, masks, public=False)
        accumulate(part.root, operands, product)
        if not isinstance(part, Step):
            assert np.array_equal(
                kernels.centred(total, part.ring), kernels.centred(product, part.ring)
            )
            continue
        m, secret = part.ring, coin[number]
        assert secret is not None
        flat = secret.masks[0].reshape(product.shape)
        assert np.array_equal(
            kernels.centred(total, m), kernels.centred(product + flat, m)
        )
        between = plan.evaluations[number]
        drawn = between.lines(halves.words(number, slice(0, batch)), batch)
        words = [a + b for a, b in zip(dealt.pop(0), drawn, strict=True)]
        sources[number + 1] = source_mask(plan, number, draws.hidden(number))
        assert isinstance(part.activation, Activation)
        zeros, act = part.activation.zeros(m), part.activation
        coin_of = secret.rounding.reshape(batch, *act.pooled(flat.shape[1:]))
        constants: dict[tuple[int, ...], int] = {}
        for i in range(flat.size):
            at = np.unravel_index(i, flat.shape)
            own = [int(mask[i]) % 2**m for mask in secret.masks]
            first, *others = dealt_words(part, own, 0, i % flat.shape[-1])
            windows = (1, *(act.pool or ()), *[1] * 4)
            place = tuple(int(a) // w for a, w in zip(at, windows, strict=False))
            constants[place] = constants.get(place, 0) + first[2]
            for j, (_, _, word) in enumerate(others, 1):
                kept = 64 - zeros[j]
                assert (int(words[j][i]) - (word >> zeros[j])) % 2**kept == 0
                checked += 1
        assert len(words[0]) == len(constants) == coin_of.size
        for place, constant in constants.items():
            got = int(words[0].reshape(coin_of.shape)[place])
            expected = (constant + int(coin_of[place])) >> zeros[0]
            assert (got - expected) % 2 ** (64 - zeros[0]) == 0
    assert checked > 100 and not dealt


@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
@pytest.mark.parametrize("batch", [1, 9])
def test_traffic_is_what_the_plan_declares(small, batch, corrections):
    pair = Pair(small, corrections=corrections)
    *_, transcript = pair.prepare(0, batch)
    plan = pair.plan
    assert {(a, b) for a, b, _ in transcript.messages} == {
        ("dealer", corrections),
        ("client", "server"),
    }
    dealt = [size for sender, _, size in transcript.messages if sender == "dealer"]
    assert sum(dealt) == plan.dealer_bytes(batch=batch)
    assert dealt == plan.dealer_messages(batch=batch)
    assert len(dealt) == len(plan.parts) + len(chunks(batch)) * len(plan.steps)
    halves = [size for sender, _, size in transcript.messages if sender == "client"]
    assert halves == [
        packed_bytes(batch * plan.elements(number), step.ring)
        for number, step in enumerate(plan.steps)
    ]


@pytest.mark.parametrize("precision", [20, 26, "fast", "high", 52])
def test_rounding_coins_are_uniform_below_what_they_round(precision):
    model = planned(*residual(), precision=precision)
    plan, count = model.plan, 0
    drawn = list(coins(plan, bytes(16), bytes(range(16)), 64))
    assert drawn.pop() is None
    for step, coin in zip(plan.steps, drawn, strict=True):
        drop = step.activation.drop
        assert coin is not None
        assert coin.rounding.min() >= 0 and coin.rounding.max() < 1 << drop
        scaled = coin.rounding / 2.0**drop
        assert abs(scaled.mean() - 0.5) < 5 * (1 / 12 / scaled.size) ** 0.5
        assert scaled.min() < 0.01 and scaled.max() > 0.99
        for line, other in zip(coin.masks, coin.masks[1:], strict=False):
            assert (line != other).mean() > 0.99
        count += scaled.size
    assert count > 50_000


def test_every_inference_and_every_batch_draws_fresh_masks(small):
    plan = small.plan
    client_seed, server_seed = bytes(range(16)), bytes(range(1, 17))
    seen, arrays = set(), 0
    ratchets = [inference_seeds(client_seed), inference_seeds(server_seed)]
    for _ in range(3):
        index = ratchets[0].next_index
        mine, ours = (ratchet.take(index) for ratchet in ratchets)
        for batch in (1, 2):
            drawn, other = (Draws(plan, seed, batch) for seed in (mine, ours))
            found: list = [drawn.input_mask]
            for draws in (drawn, other):
                found += [draws.linear(n) for n in range(len(plan.parts))]
                for n in range(len(plan.steps)):
                    found.append(draws.words(n, slice(0, batch)))
            for n in range(len(plan.steps)):
                found += [drawn.hidden(n), other.deltas(n)]
            for coin in coins(plan, ours, ours, batch):
                if coin is not None:
                    found += [coin.masks, coin.rounding]
            arrays += len(found)
            seen |= {array.tobytes()[:64] for array in found if array.size > 8}
            arrays -= sum(array.size <= 8 for array in found)
    assert len(seen) == arrays > 60
    pairs = [Dealing(plan).seeds for _ in range(2)]
    assert len({*pairs[0], *pairs[1]}) == 4


def test_words_drawn_into_memory_that_is_used_again_are_the_same(small):
    plan, batch = small.plan, 9
    material = ClientMaterial(Pairing(SESSION, 0, batch), bytes(16), [], np.empty(0))
    draws, space, other = material.draws(plan), Space(), Space()
    for number in range(len(plan.steps)):
        for chunk in chunks(batch):
            fresh = material.chunk(draws, number, chunk)
            found = [
                material.chunk(draws, number, chunk, space=memory)
                for memory in (space, space, other)
            ]
            assert all(np.array_equal(words, fresh) for words in found)
            assert np.shares_memory(found[0], found[1])
            assert not np.shares_memory(found[0], fresh)
            # Another inference, in another thread perhaps, has memory of its own.
            assert not np.shares_memory(found[0], found[2])


def test_an_index_is_dealt_and_prepared_once(small):
    pair = Pair(small)
    pair.prepare(1, 1)
    for index in (1, 0):
        for batch in (1, 3):
            with pytest.raises(RandomnessError, match="cannot be derived again"):
                next(pair.dealing.deal(index, batch))
            pairing = Pairing(SESSION, index, batch)
            for side in (pair.server, pair.client):
                with pytest.raises(RandomnessError, match="cannot be derived again"):
                    next(side.prepare(pairing))
    pair.prepare(2, 1)


def secrets_within(root: object) -> set[bytes]:
    """All byte strings that an object leads to."""
    found: set[bytes] = set()
    seen, waiting = {id(root)}, [root]
    while waiting:
        here = waiting.pop()
        if isinstance(here, (bytes, bytearray)):
            found.add(bytes(here))
        for there in gc.get_referents(here):
            if isinstance(there, (type, ModuleType, FunctionType)):
                continue  # the way to all of Python
            if id(there) not in seen:
                seen.add(id(there))
                waiting.append(there)
    return found


def test_a_used_seed_is_with_nobody_once_its_inference_is_prepared(small):
    """Forward secrecy: dealer and parties keep the seeds to come, and no others."""
    pair = Pair(small)
    seeds = seeds_of(pair, 2)
    ours, theirs, _ = pair.prepare(2, 1)
    for side in (pair.dealing, pair.server, pair.client):
        kept = secrets_within(side)
        assert kept and not kept & set(seeds)
    # The inference's own material does, until it is used.
    assert seeds[1] in secrets_within(ours) and seeds[2] in secrets_within(theirs)
    assert not secrets_within([ours, theirs]) & {seeds[0]}


def test_weights_are_opened_under_a_uniform_mask(small):
    """W - B is uniform: the top and bottom bytes pass a chi-square test."""
    pair = Pair(small, seed=bytes(range(16)))
    masks = list(weight_masks(pair.plan, pair.dealing.seeds[0]))
    server = ServerPreparation(pair.plan, small.weights, pair.dealing.seeds[0])
    sent = [event for event in server.open_weights() if isinstance(event, Send)]
    opened = [event.parts[0][0] for event in sent]
    for theirs, mask, integers in zip(
        opened, masks, small.weights.integers, strict=True
    ):
        assert np.array_equal(theirs + mask, integers)
    data = np.concatenate([a.reshape(-1) for a in opened])
    for byte in (0, 3):
        counts = np.bincount(data.view(np.uint8)[byte::4], minlength=256)
        chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert 150 < chi < 400  # 255 degrees of freedom


@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
@pytest.mark.parametrize("precision, batch", [("fast", 1), ("high", 9)])
def test_material_comes_back_from_its_arrays(precision, batch, corrections):
    """What is stored has the declared layout and gives the same result."""
    network, example = residual()
    model = without_noise(planned(network, example, precision=precision))
    x = np.resize(example.numpy(), (batch, 3, 8, 8))
    x = model.plan.encode(torch.from_numpy(x))
    results = []
    for stored in (False, True):
        pair = Pair(model, corrections=corrections)
        ours, theirs, _ = pair.prepare(3, batch)
        if stored:
            layouts = [
                layout(pair.plan, batch, corrections=corrections)
                for layout in (server_layout, client_layout)
            ]
            # Words lie with whoever received them, and nowhere else.
            words = 8 * batch * sum(one.words for one in pair.plan.evaluations)
            small, large = sorted(map(layout_bytes, layouts))
            assert large > words > 4 * small
            assert layouts[corrections == CLIENT] == max(layouts, key=layout_bytes)
            copies = []
            for material, layout in zip((ours, theirs), layouts, strict=True):
                arrays = material.arrays()
                assert [(a.shape, a.dtype) for a in arrays] == list(layout)
                assert layout_bytes(layout) == sum(a.nbytes for a in arrays)
                copies.append([a.copy() for a in arrays])
            ours = ServerMaterial.from_arrays(pair.plan, ours.pairing, copies[0])
            theirs = ClientMaterial.from_arrays(pair.plan, theirs.pairing, copies[1])
        values, _ = together(
            {
                "server": server(pair.plan, model.weights, ours),
                "client": client(pair.plan, theirs, x),
            }
        )
        results.append(values["client"])
    assert np.array_equal(*results)


def test_what_is_received_offline_is_uniform_for_either_party():
    """Every message of the dealer and of the client: nothing of it is small or even."""
    batch = 64
    for corrections in (SERVER, CLIENT):
        pair = Pair(planned(*residual()), corrections=corrections)
        *_, transcript = pair.prepare(0, batch, keep=True)
        senders = {(sender, event.to) for sender, event in transcript.sends}
        assert senders == {("dealer", corrections), ("client", "server")}
        # Parts of a kind, of all chunks and steps, are looked at together.
        kinds: dict[tuple, list[np.ndarray]] = {}
        for sender, event in transcript.sends:
            for place, (array, bits) in enumerate(event.parts):
                values = array.reshape(-1).astype(np.int64)
                kinds.setdefault((sender, place, bits), []).append(values)
        assert len(kinds) > 10
        for (*kind, bits), arrays in kinds.items():
            values = np.concatenate(arrays)
            for shift in (0, bits - 8):
                counts = np.bincount((values >> shift) & 255, minlength=256)
                mean = values.size / 256
                chi = float(((counts - mean) ** 2 / mean).sum())
                assert values.size > 8192 and 150 < chi < 400, (kind, bits, shift)


@pytest.mark.parametrize("corrections", [SERVER, CLIENT])
def test_what_material_holds_is_not_printed(small, corrections):
    ours, theirs, _ = Pair(small, corrections=corrections).prepare(0, 1)
    for material in (ours, theirs):
        text = repr(material)
        assert "array" not in text and "seed" not in text and len(text) < 200
