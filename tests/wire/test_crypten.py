"""CrypTen's own protocols over a direct channel."""

from __future__ import annotations

import pytest

from crypten_espn.errors import PeerError


def over_direct_channel():
    """Every collective once over gloo and once direct; then a ReLU on both."""
    import crypten
    import torch
    from crypten import communicator as comm

    from crypten_espn.errors import EspnError
    from crypten_espn.wire.crypten import use_direct_channel

    def collectives(rank):
        c = comm.get()
        torch.manual_seed(rank)
        a, b = torch.randint(-(2**62), 2**62, (2, 3, 5)).unbind()
        bits = torch.tensor([1 + rank], dtype=torch.uint8)
        out = [
            c.all_reduce(a),
            *c.all_reduce([a, b], batched=True),
            c.all_reduce(a, op=torch.distributed.ReduceOp.BXOR),
            c.all_reduce(bits),
            c.reduce(a, 0),
            c.reduce([a, b], 1, batched=True),
            c.broadcast(a.clone(), 1),
            *c.broadcast([a.clone(), b.clone()], 0, batched=True),
            c.gather(a, 0),
            c.all_gather(b),
            c.scatter([a, b] if rank == 0 else None, 0, size=(3, 5)),
        ]
        if rank == 0:
            c.send(b, 1)
        else:
            out.append(c.recv(torch.zeros(3, 5, dtype=torch.long), 0))
        c.barrier()
        out.append(c.broadcast_obj({"k": [1, 2]} if rank == 0 else None, 0))
        return out

    def private():
        torch.manual_seed(3)
        x = torch.randn(2, 7)
        return crypten.cryptensor(x, src=1).relu().get_plain_text()

    rank = comm.get().get_rank()
    before = comm.get()
    plain = collectives(rank), private()
    with use_direct_channel(timeout=20) as channel:
        direct = collectives(rank), private()
        messages, size = channel.messages_sent, channel.bytes_sent
        channel.reset_counters()
        crypten.cryptensor(torch.ones(4), src=0).get_plain_text()
        last = channel.bytes_sent
    restored = comm.get() is before
    try:
        with use_direct_channel(listen="0.0.0.0", timeout=20):
            refusal = ""
    except EspnError as error:
        refusal = str(error)
    return plain, direct, messages, size, last, restored, refusal


def same(a, b):
    import torch

    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_crypten_computes_the_same_over_a_direct_channel():
    from crypten_espn import run_parties

    outcomes = run_parties(over_direct_channel, world_size=2, timeout=60)
    for plain, direct, messages, size, last, restored, _ in outcomes:
        assert same(plain[0], direct[0])
        assert float((plain[1] - direct[1]).abs().max()) < 1e-3
        assert messages >= 19 and size > 20 * messages
        assert last == 4 * 8 + 20  # one opening: one message, one header
        assert restored
    # Plain TCP for everybody is refused, and rank 1 does not wait for it.
    assert "--insecure" in outcomes[0][-1]
    assert outcomes[1][-1] == "Rank 0 cannot listen; it says why."


def test_direct_channel_needs_two_crypten_processes():
    from crypten_espn.wire.crypten import use_direct_channel

    with pytest.raises(PeerError, match=r"crypten\.init"), use_direct_channel():
        pass
