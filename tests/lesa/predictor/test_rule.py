"""The ring of the newest features."""

from __future__ import annotations

import pytest
import torch

from lesa.predictor.rule import History


def feature(value: float) -> torch.Tensor:
    return torch.full((1, 2, 3), float(value))


def test_newest_first_and_the_oldest_leaves() -> None:
    history = History(3)
    for step in (0, 1, 4, 9):
        history.push(step, feature(step))
    assert history.steps == (9, 4, 1)
    assert [float(f[0, 0, 0]) for f in history.features] == [9, 4, 1]


def test_a_new_feature_and_a_reset_forget_the_memo() -> None:
    history = History(2)
    history.push(0, feature(0))
    history.memo["z",] = feature(1)
    history.push(1, feature(1))
    assert history.memo == {}
    history.memo["z",] = feature(1)
    history.reset()
    assert (history.steps, history.features, history.memo) == ((), (), {})


def test_bytes_count_every_storage_once() -> None:
    history = History(2)
    assert history.nbytes == 0
    one = feature(0)
    history.push(0, one)
    history.push(1, one)  # the same storage
    assert history.nbytes == 6 * 4
    history.memo["z",] = feature(2)
    history.memo["view",] = one.view(-1)
    assert history.nbytes == 2 * 6 * 4


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_history_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {size}"):
        History(size)
