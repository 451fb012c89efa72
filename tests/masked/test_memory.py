"""Memory of the offline phase: used again without mixing up what is still read."""

from __future__ import annotations

import numpy as np

from crypten_espn.masked.memory import Space, in_one_piece
from crypten_espn.masked.messages import AHEAD


def test_an_array_takes_the_memory_of_the_last_one_of_its_name() -> None:
    space = Space()
    large = space.array("a", (4, 8), np.int64)
    other = space.array("b", (4, 8), np.int64)
    small = space.array("a", (5,), np.int32)
    assert small.dtype == np.int32 and small.shape == (5,)
    assert np.shares_memory(small, large) and not np.shares_memory(small, other)
    assert not np.shares_memory(space.array("a", (9, 8), np.int64), large)


def test_a_message_leaves_those_before_it_as_they_are() -> None:
    space = Space()
    made = [space.message("m", (64,), np.int64) for _ in range(9)]
    for number, array in enumerate(made):
        for other in made[max(0, number - AHEAD) : number]:
            assert not np.shares_memory(array, other)
    # And takes the memory of what came before these.
    assert np.shares_memory(made[-1], made[-2 - AHEAD])
    turns = [space.message(name, (64,), np.int64) for name in "xyxyxy"]
    assert not np.shares_memory(turns[0], turns[2])
    assert np.shares_memory(turns[0], turns[4])


def test_arrays_in_one_piece_are_apart_and_aligned() -> None:
    layout = (
        ((16,), np.dtype(np.uint8)),
        ((2, 3), np.dtype(np.int32)),
        ((0,), np.dtype(np.int64)),
        ((7,), np.dtype(np.int64)),
    )
    arrays = in_one_piece(layout)
    assert [(a.shape, a.dtype) for a in arrays] == list(layout)
    for number, array in enumerate(arrays):
        array[...] = number
    for number, array in enumerate(arrays):
        assert (array == number).all() and array.flags.c_contiguous
        assert array.flags.aligned
