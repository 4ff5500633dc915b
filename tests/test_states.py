"""States of some clients at a time: the rows of all are the same, and what was there before is left alone."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from shoal.messages import Rows, Vector
from shoal.runtimes.states import After, Joined, take


class State(NamedTuple):
    h: Rows
    w: Vector


def test_rows_that_follow_each_other_in_memory_stay_there():
    whole = torch.randn(7, 3)
    for cuts in ((0, 7), (0, 2, 7), (0, 1, 2, 6, 7)):
        joined = Joined(7)
        for lo, hi in pairwise(cuts):
            joined.put(whole[lo:hi])
        assert joined.rows.data_ptr() == whole.data_ptr()
        assert torch.equal(joined.rows, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(
    "pieces",
    [
        lambda x: [x[:2], x[2:3].clone(), x[3:]],  # elsewhere
        lambda x: [x[:2].clone(), x[2:5].clone(), x[5:].clone()],
        lambda x: [x[:2], torch.cat([x[:2], x[2:]])[2:]],  # the right place of another memory
        lambda x: [x.T.contiguous().T[:2], x.T.contiguous().T[2:]],  # not packed
        lambda x: [x[:2], x[2:4], x[4:].clone()],  # elsewhere at last
    ],
)
def test_rows_that_lie_apart_are_copied(pieces, dtype):
    whole = torch.randn(7, 3).mul(100).to(dtype)
    before, joined = whole.clone(), Joined(7)
    for piece in pieces(whole):
        joined.put(piece)
    assert torch.equal(joined.rows, before)
    assert joined.rows.data_ptr() != whole.data_ptr()
    joined.rows.zero_()
    assert torch.equal(whole, before), "what was put in is nobody's to write to"


def test_rows_out_of_order_in_one_memory_are_copied():
    whole, joined = torch.randn(4, 3), Joined(4)
    joined.put(whole[2:])
    joined.put(whole[:2])
    assert torch.equal(joined.rows, torch.cat([whole[2:], whole[:2]]))


@pytest.mark.parametrize("cohort", [False, True])
def test_a_state_in_parts(cohort):
    before = State(torch.randn(5, 3), torch.zeros(2))
    kept, new, shared = before.h.clone(), torch.randn(5, 3), torch.ones(2)
    after = After(before, 5, cohort)
    parts = [torch.tensor([0, 3]), torch.tensor([4])] if cohort else [slice(0, 2), slice(2, 5)]
    for part in parts:
        assert torch.equal(take(before, part).h, kept[part])
        after.put(part, State(new[part].clone(), shared))
    expected = kept.clone()
    for part in parts:
        expected[part] = new[part]
    assert torch.equal(after.state.h, expected)
    assert after.state.w is shared
    assert torch.equal(before.h, kept)


@pytest.mark.parametrize("cohort", [False, True])
def test_states_without_rows_are_taken_as_they_are(cohort):
    class Shared(NamedTuple):
        w: Vector

    assert take((), slice(0, 1)) == ()
    for state in ((), Shared(torch.zeros(2))):
        after = After(state, 3, cohort)
        assert after.state is state
        after.put(slice(0, 3), state)
        assert after.state is state
