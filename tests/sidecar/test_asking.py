"""The queue before a server: order, batches, and its end. Nothing is private here."""

from __future__ import annotations

import threading

import pytest
import torch

from crypten_espn.bundle import Description
from crypten_espn.errors import ClosingError, LimitError, PeerError, PlanMismatchError
from crypten_espn.serving.answer import Answer
from crypten_espn.sidecar.asking import Queue

from ..masked.cases import planned, residual

PLAN = planned(*residual()).plan


class Doubling:
    """Answers with twice the input, once it is let go."""

    def __init__(self, prepared: int | None = None) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.next_batch = prepared
        self.closed = False
        self.plan, self.description = PLAN, Description()

    def ask(self, x: object, *, force: bool = False, show: bool = False) -> Answer:
        assert isinstance(x, torch.Tensor) and not force
        self.begun.set()
        assert self.go.wait(60)
        self.batches.append(len(x))
        return Answer(2 * x, 0.5, 10, 20, x.numpy() if show else None)

    def keep(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def inputs(first: int, count: int = 1) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None]


def test_requests_that_wait_share_an_inference_and_each_gets_its_own() -> None:
    client = Doubling()
    with Queue(lambda: client, size=4, waiting=20) as queue:
        futures = [queue.put(inputs(0))]
        assert client.begun.wait(60)  # the others wait while it is under way
        futures += [queue.put(inputs(10 * i, count=2)) for i in range(1, 6)]
        client.go.set()
        for i, future in enumerate(futures):
            wanted = 2 * inputs(10 * i, count=1 if i == 0 else 2)
            assert torch.equal(future.result(60).logits, wanted)
    assert client.batches == [1, 4, 4, 2]


def test_a_request_that_is_shown_shares_nothing() -> None:
    client = Doubling()
    with Queue(lambda: client, size=4, waiting=20) as queue:
        futures = [queue.put(inputs(i), show=i % 2 == 1) for i in range(5)]
        client.go.set()
        shown = [future.result(60).masked is not None for future in futures]
    assert shown == [False, True, False, True, False]
    assert client.batches == [1] * 5


def test_inputs_are_cut_and_filled_up_to_what_was_prepared() -> None:
    client = Doubling(prepared=3)
    with Queue(lambda: client, size=1, waiting=20) as queue:
        client.go.set()
        answer = queue.put(inputs(0, count=7)).result(60)
    assert torch.equal(answer.logits, 2 * inputs(0, count=7))
    assert client.batches == [3, 3, 3]
    assert (answer.seconds, answer.sent, answer.received) == (1.5, 30, 60)


def test_what_waits_at_the_end_is_refused_and_what_is_under_way_is_answered() -> None:
    client = Doubling()
    queue = Queue(lambda: client, size=1, waiting=2)
    under_way = queue.put(inputs(0))
    assert client.begun.wait(60)
    waiting = [queue.put(inputs(1)), queue.put(inputs(2))]
    with pytest.raises(LimitError, match="2 requests wait already"):
        queue.put(inputs(3))
    ending = threading.Thread(target=queue.close)
    ending.start()
    for future in waiting:
        with pytest.raises(ClosingError):
            future.result(60)
    client.go.set()
    assert torch.equal(under_way.result(60).logits, 2 * inputs(0))
    ending.join(60)
    assert not queue.ready and client.closed
    with pytest.raises(ClosingError):
        queue.put(inputs(4))


class Failing(Doubling):
    """Fails so many times first."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.go.set()
        self.errors = list(errors)

    def ask(self, x: object, *, force: bool = False, show: bool = False) -> Answer:
        if self.errors:
            raise self.errors.pop(0)
        return super().ask(x, force=force, show=show)


@pytest.mark.parametrize("count", [1, 2])
def test_a_broken_connection_is_tried_once_more_and_no_more(count: int) -> None:
    client = Failing(*[PeerError(f"gone {i}") for i in range(count)])
    with Queue(lambda: client, size=1, waiting=2) as queue:
        future = queue.put(inputs(0))
        if count == 1:
            assert torch.equal(future.result(60).logits, 2 * inputs(0))
        else:
            with pytest.raises(PeerError, match="gone 1"):
                future.result(60)
        assert queue.put(inputs(1)).result(60)


@pytest.mark.parametrize("error", [LimitError("so many"), ValueError("a fault")])
def test_what_would_be_said_again_is_not_asked_again(error: Exception) -> None:
    client = Failing(error)
    with Queue(lambda: client, size=1, waiting=2) as queue:
        with pytest.raises(type(error)):
            queue.put(inputs(0)).result(60)
        assert queue.ready
        assert queue.put(inputs(1)).result(60)


def test_another_plan_is_connected_to_anew_and_asked() -> None:
    first, second = Failing(PlanMismatchError("another")), Failing()
    clients = [first, second]
    with Queue(lambda: clients.pop(0), size=1, waiting=2) as queue:
        assert torch.equal(queue.put(inputs(3)).result(60).logits, 2 * inputs(3))
    assert first.closed and second.closed and not clients


def test_a_batch_that_cannot_be_made_fails_alone() -> None:
    client = Doubling()
    with Queue(lambda: client, size=4, waiting=9) as queue:
        futures = [queue.put(inputs(0))]
        assert client.begun.wait(60)
        # Checked by two plans, the one before and the one now.
        futures += [queue.put(inputs(1)), queue.put(torch.zeros(1, 2))]
        client.go.set()
        assert futures[0].result(60)
        for future in futures[1:]:
            with pytest.raises(RuntimeError):
                future.result(60)
        assert queue.put(inputs(2)).result(60)
