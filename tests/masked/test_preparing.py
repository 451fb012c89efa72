"""The offline phase and its storage: exact correlations, sizes, used exactly once."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from crypten_espn.errors import MaterialError
from crypten_espn.masked import kernels, offline, plan
from crypten_espn.masked.material import (
    MaterialStore,
    MaterialWriter,
    material_info,
)
from crypten_espn.wire.packing import packed_bytes

from .masked_cases import Pair, centred, planned, residual


@pytest.fixture(scope="module")
def small():
    return planned(*residual())


@pytest.fixture
def pair(small):
    made = Pair(*small)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_plan():
    return planned(*residual(), mode="shared")


def test_dealt_values_are_the_powers_of_the_mask(pair):
    """G_0 + G_1 = B*t + r and the value shares add up, against Python integers."""
    deal = pair.dealer.deal(3)
    chosen = pair.plan
    shares = offline.expand(chosen, pair.dealer.seeds[1], 3, batch=1)
    masks = offline.weight_masks(chosen, pair.dealer.seeds[0])
    for number, r in enumerate(pair.dealer.first_masks(3)):
        segment = chosen.segments[number]
        product = plan.evaluate(
            segment.root,
            offline.narrowed(shares.masks, segment),
            masks,
            ring=segment.ring,
            batch=1,
            public=False,
        )
        total = deal.linear[number] + shares.linear[number]
        expected = product if r is None else product + r
        assert np.array_equal(
            kernels.reduce_ring(total, 32), kernels.reduce_ring(expected, 32)
        )
        act = segment.activation
        if act is None:
            continue
        whole = deal.values[number] + shares.values[number]
        flat = r.reshape(-1).astype(np.int64) & (2**segment.ring - 1)
        for i in range(0, flat.size, 97):
            for case in (0, 1):
                mask = int(flat[i])
                if case == 1 and mask >> (segment.ring - 1):
                    mask -= 1 << segment.ring  # arithmetic shift
                constant, index = 0, 1
                for group in act.groups:
                    t = -(mask >> group.shift)
                    constant += sum(a * t**k for k, a in enumerate(group.coeffs))
                    for j in range(1, group.degree):
                        binomial = sum(
                            act.table[list(act.groups).index(group), j, k].item() * t**k
                            for k in range(1, group.degree - j + 1)
                        )
                        got = int(whole[case, index + j - 1, i])
                        assert (got - binomial) % 2**64 == 0
                    index += group.degree - 1
                assert (int(whole[case, 0, i]) - constant) % 2**64 == 0


@pytest.mark.parametrize("mode", ["owner", "shared"])
def test_traffic_is_what_the_plan_declares(mode, small, shared_plan):
    chosen, weights = small if mode == "owner" else shared_plan
    pair = Pair(chosen, weights)
    for channel in (*pair.channels, *pair.dealing):
        channel.reset_counters()
    pair.prepare(0)
    headers = 20 * pair.dealing[0].messages_sent
    assert pair.dealing[0].bytes_sent == chosen.dealer_bytes() + headers
    assert pair.dealing[1].bytes_sent == 0  # the parties tell the dealer nothing
    down, up = pair.channels
    assert down.bytes_sent == 0
    if mode == "owner":
        halves = sum(
            packed_bytes(s.elements, s.ring) for s in chosen.segments if s.activation
        )
        assert up.bytes_sent == halves + 20 * up.messages_sent
    else:
        assert up.bytes_sent == 0
    assert chosen.dealer_bytes() <= 120 * chosen.activation_elements
    pair.close()


def test_every_inference_draws_fresh_masks(pair):
    seen = set()
    for index in range(3):
        shares = offline.expand(pair.plan, pair.dealer.seeds[1], index, batch=1)
        arrays = [*shares.masks.values(), *shares.linear]
        arrays += [a for a in (*shares.values, *shares.openings) if a is not None]
        arrays += [a for a in pair.dealer.first_masks(index) if a is not None]
        for array in arrays:
            seen.add(array.tobytes()[:64])
    assert len(seen) == 3 * len(arrays)
    other = offline.Dealer(pair.plan)
    assert other.seeds != offline.Dealer(pair.plan).seeds
    assert len({*other.seeds, *pair.dealer.seeds}) == 4


def test_opened_weights_are_masked(small):
    """W - B is uniform: the top and bottom bytes pass a chi-square test."""
    pair = Pair(*small, seed=bytes(range(16)))
    chosen, weights = small
    for rank in (0, 1):
        for opened, mask, integers in zip(
            pair.opened[rank],
            offline.weight_masks(chosen, pair.dealer.seeds[0]),
            weights.integers,
            strict=True,
        ):
            assert np.array_equal(opened + mask, integers)
    data = np.concatenate([a.reshape(-1) for a in pair.opened[1]])
    for byte in (0, 3):
        counts = np.bincount(data.view(np.uint8)[byte::4], minlength=256)
        chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert 150 < chi < 400  # 255 degrees of freedom
    pair.close()


# ---------------------------------------------------------------- on disk


def write(pair, folder, count, *, session=b"s" * 16):
    writers = [
        MaterialWriter(
            folder / str(rank),
            plan=pair.plan,
            rank=rank,
            batch=1,
            count=count,
            session=session,
            seed=pair.dealer.seeds[rank],
            model=pair.weights[0].digest if rank == 0 else b"",
        )
        for rank in (0, 1)
    ]
    for index in range(count):
        for writer, material in zip(writers, pair.prepare(index), strict=True):
            writer.add(material)
    for writer in writers:
        writer.close()


def open_stores(pair, folder):
    return [
        MaterialStore(folder / str(rank), plan=pair.plan, rank=rank) for rank in (0, 1)
    ]


@pytest.mark.parametrize("mode", ["owner", "shared"])
def test_stored_material_gives_the_same_result(mode, small, shared_plan, tmp_path):
    chosen, weights = small if mode == "owner" else shared_plan
    pair = Pair(chosen, weights)
    write(pair, tmp_path, 3)
    stores = open_stores(pair, tmp_path)
    _, x = residual()
    for index in range(3):
        materials = [store.take() for store in stores]
        assert [m.index for m in materials] == [index, index]
        z = pair.online(materials, x[:1])
        _, trace = plan.simulate(chosen, weights, x[:1], masks=pair.masks(index))
        assert np.array_equal(centred(z, chosen), trace[-1])
    assert [store.remaining for store in stores] == [0, 0]
    with pytest.raises(MaterialError, match="exhausted"):
        stores[0].take()
    info = material_info(tmp_path / "0")
    assert info.remaining == 0 and info.count == 3
    assert info.bytes_on_disk == os.path.getsize(tmp_path / "0" / "material.espn")
    assert "0 of 3 inferences left" in str(info)
    if mode == "owner":  # rank 1 keeps a seed, not its shares
        assert material_info(tmp_path / "1").bytes_on_disk < info.bytes_on_disk / 5
    # Used-up material may be replaced; unused material may not.
    write(pair, tmp_path, 1)
    assert [store.remaining for store in open_stores(pair, tmp_path)] == [1, 1]
    with pytest.raises(MaterialError, match="still holds"):
        write(pair, tmp_path, 1)
    pair.close()


def test_files_are_private_and_nothing_is_valid_before_the_end(pair, tmp_path):
    write(pair, tmp_path, 1)
    for name in ("material.espn", "used"):
        assert os.stat(tmp_path / "0" / name).st_mode & 0o077 == 0
    options = {"plan": pair.plan, "batch": 1, "session": b"", "seed": bytes(16)}
    writer = MaterialWriter(tmp_path / "x", rank=0, count=2, **options)
    writer.add(pair.prepare(0)[0])
    with pytest.raises(MaterialError, match="holds no material"):
        material_info(tmp_path / "x")
    with pytest.raises(MaterialError, match="1 of 2"):
        writer.close()
    with pytest.raises(MaterialError, match="holds no material"):
        material_info(tmp_path / "x")


def test_skipping_ahead_loses_records_but_never_repeats(pair, tmp_path):
    write(pair, tmp_path, 4)
    store = open_stores(pair, tmp_path)[0]
    assert store.claim() == 0
    assert store.claim(at_least=2) == 2
    assert store.claim(at_least=1) == 3
    assert store.remaining == 0
    with pytest.raises(MaterialError, match="not claimed"):
        open_stores(pair, tmp_path)[1].load(0)


def test_foreign_or_damaged_material_is_named(pair, small, shared_plan, tmp_path):
    write(pair, tmp_path, 2)
    folder = tmp_path / "0"
    with pytest.raises(MaterialError, match="made for rank 0, this is rank 1"):
        MaterialStore(folder, plan=pair.plan, rank=1)
    with pytest.raises(MaterialError, match="made for plan"):
        MaterialStore(folder, plan=shared_plan[0], rank=0)
    with pytest.raises(MaterialError, match="made for model"):
        MaterialStore(folder, plan=pair.plan, rank=0, model=b"m" * 32)
    with pytest.raises(MaterialError, match="holds no material"):
        MaterialStore(tmp_path / "none", plan=pair.plan, rank=0)
    data = folder / "material.espn"
    original = data.read_bytes()
    data.write_bytes(original[:-4096])
    with pytest.raises(MaterialError, match="cut short"):
        MaterialStore(folder, plan=pair.plan, rank=0)
    flipped = bytearray(original)
    flipped[4096 + 100] ^= 1
    data.write_bytes(flipped)
    with pytest.raises(MaterialError, match="record 0 is damaged"):
        MaterialStore(folder, plan=pair.plan, rank=0).take()
    flipped[20] ^= 1
    data.write_bytes(flipped)
    with pytest.raises(MaterialError, match="damaged"):
        MaterialStore(folder, plan=pair.plan, rank=0)
    data.write_bytes(original)
    (folder / "used").write_bytes(struct.pack("<QQ", 0, 0))
    with pytest.raises(MaterialError, match="unknown what was used"):
        MaterialStore(folder, plan=pair.plan, rank=0).claim()
    (folder / "used").unlink()
    with pytest.raises(MaterialError, match="no record of what was used"):
        MaterialStore(folder, plan=pair.plan, rank=0).claim()


def test_kill_9_never_reuses_an_index(pair, tmp_path):
    """A process claims as fast as it can and is killed; its claims stay used."""
    write(pair, tmp_path, 6)
    (tmp_path / "plan.json").write_text(pair.plan.to_json())
    script = textwrap.dedent(
        """
        import sys, os, signal
        from crypten_espn.masked.material import MaterialStore
        from crypten_espn.masked.plan import Plan
        plan = Plan.from_json(open(sys.argv[1] + "/plan.json").read())
        store = MaterialStore(sys.argv[1] + "/0", plan=plan, rank=0)
        for _ in range(2):
            print(store.claim(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    seen = []
    for _ in range(2):
        child = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert child.returncode == -signal.SIGKILL
        seen += [int(line) for line in child.stdout.split()]
    assert seen == [0, 1, 2, 3]
    assert open_stores(pair, tmp_path)[0].claim() == 4
