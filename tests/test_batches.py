"""Batches as a pure function of (tokens, seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data.batches import Windows, training_batches, validation_windows
from gpt2_jax.errors import UserError

few_examples = settings(max_examples=15)


def shards_of_lengths(lengths):
    """Shards in which every token is its own position, counted through all of them."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.uint16) for n, end in zip(lengths, ends, strict=True)]


@st.composite
def datasets(draw):
    """Shards that hold at least one window, and the window's length."""
    sequence_length = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 17), max_size=4))
    return shards_of_lengths([*lengths, sequence_length + 1]), sequence_length


@few_examples
@given(datasets())
def test_windows_cover_each_shard_and_never_cross_its_end(dataset):
    shards, T = dataset
    windows = Windows(shards, T)
    expected = [
        shard[start : start + T + 1] for shard in shards for start in range(0, len(shard) - T, T)
    ]
    assert len(windows) == len(expected)
    for window_T, expected_T in zip(windows, expected, strict=True):
        assert window_T.dtype == np.int32
        np.testing.assert_array_equal(window_T, expected_T)


def test_no_shards_hold_no_windows():
    assert len(Windows([], 4)) == 0
    windows = Windows(shards_of_lengths([4, 0, 1]), 4)
    assert len(windows) == 0
    for index in (0, -1):
        with pytest.raises(IndexError):
            windows[index]


@few_examples
@given(datasets(), st.integers(0, 2**31 - 1), st.data())
def test_every_window_comes_exactly_once_an_epoch(dataset, seed, data):
    shards, T = dataset
    windows = Windows(shards, T)
    N = len(windows)
    B = data.draw(st.integers(1, N))
    batches = training_batches(windows, B, seed)
    epochs = 3
    rows = np.concatenate([batches(step) for step in range(-(-epochs * N // B))])
    assert rows.shape[1] == T + 1
    everything = sorted(window[0] for window in windows)
    for epoch in range(epochs):
        assert sorted(rows[epoch * N : (epoch + 1) * N, 0]) == everything


@few_examples
@given(datasets(), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_a_batch_depends_on_its_step_alone(dataset, steps):
    shards, T = dataset
    windows = Windows(shards, T)
    used = training_batches(windows, 1, seed=5)
    for step in steps:
        unused = training_batches(windows, 1, seed=5)
        np.testing.assert_array_equal(used(step), unused(step), strict=True)


def test_a_batch_is_int32_rows_of_consecutive_tokens():
    batches = training_batches(Windows(shards_of_lengths([41, 33]), 8), 3, seed=0)
    tokens_BT = batches(2)
    assert tokens_BT.shape == (3, 9)
    assert tokens_BT.dtype == np.int32
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    np.testing.assert_array_equal(targets_BT, inputs_BT + 1)


def order(seed, epoch):
    """First tokens of the windows in the order of one epoch."""
    batches = training_batches(Windows(shards_of_lengths([161]), 4), 40, seed)
    return batches(epoch)[:, 0].tolist()


def test_seeds_and_epochs_differ_in_order():
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(each) for each in orders}) == 4
    assert all(sorted(each) == list(range(0, 160, 4)) for each in orders)
    assert all(each != sorted(each) for each in orders)


def test_fewer_windows_than_a_batch_are_refused():
    windows = Windows(shards_of_lengths([17]), 4)
    assert training_batches(windows, 4, seed=0)(0).shape == (4, 5)
    with pytest.raises(UserError, match="hold 4 windows, fewer than one batch of 5"):
        training_batches(windows, 5, seed=0)


def test_validation_takes_the_first_windows():
    windows = Windows(shards_of_lengths([9, 13]), 4)
    assert validation_windows(windows, 3).tolist() == [list(windows[i]) for i in range(3)]
    assert validation_windows(windows, 3).dtype == np.int32
    assert len(validation_windows(windows, 100)) == len(windows) == 5
    with pytest.raises(UserError, match="shorter than one window"):
        validation_windows(Windows([], 4), 3)
