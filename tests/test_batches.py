"""Batches as a pure function of (tokens, seed, step)."""

import re

import grain
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


@few_examples
@given(datasets(), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.data())
def test_the_shares_of_any_number_of_hosts_are_the_global_batch(dataset, hosts, per_host, data):
    shards, T = dataset
    B = hosts * per_host
    windows = Windows(shards * B, T)
    step = data.draw(st.integers(0, 3 * len(windows) // B))
    whole = training_batches(windows, B, seed=7)(step)
    # Each host has its own iterator over its own copy of the data.
    shares = [
        training_batches(Windows(shards * B, T), B, seed=7)(
            step, range(host * per_host, (host + 1) * per_host)
        )
        for host in range(hosts)
    ]
    assert all(share.shape == (per_host, T + 1) for share in shares)
    np.testing.assert_array_equal(np.concatenate(shares), whole, strict=True)


@few_examples
@given(st.lists(st.integers(0, 6), max_size=9), st.integers(0, 20))
def test_rows_come_in_any_choice_and_order(rows, step):
    batches = training_batches(Windows(shards_of_lengths([41, 33]), 4), 7, seed=1)
    share = batches(step, np.array(rows, np.int64))
    assert share.shape == (len(rows), 5)
    np.testing.assert_array_equal(share, batches(step)[rows], strict=True)


@pytest.mark.parametrize("row", [-1, 3, 100])
def test_a_row_outside_the_batch_is_an_error(row):
    batches = training_batches(Windows(shards_of_lengths([41]), 4), 3, seed=0)
    with pytest.raises(IndexError, match=f"row {row} of a batch of 3"):
        batches(2, [0, row])


def test_a_host_reads_its_rows_and_no_others():
    class Recorded(Windows):
        read = 0

        def __getitem__(self, index):
            Recorded.read += 1
            return super().__getitem__(index)

    batches = training_batches(Recorded(shards_of_lengths([161]), 4), 20, seed=0)
    batches(3, [5, 6, 7])
    assert Recorded.read == 3


def test_the_order_is_that_of_grains_own_batches():
    """Runs of other versions of this package go on with the batches they would have had."""
    windows = Windows(shards_of_lengths([161, 50]), 4)
    grains = grain.MapDataset.source(windows).seed(3).shuffle().repeat().batch(7)
    batches = training_batches(windows, 7, seed=3)
    for step in (0, 1, 6, 7, 50):
        np.testing.assert_array_equal(batches(step), grains[step], strict=True)


def test_shards_are_mixed_within_an_epoch():
    windows = Windows(shards_of_lengths([81, 81]), 4)
    first_half = training_batches(windows, 20, seed=0)(0)[:, 0]
    assert 0 < np.sum(first_half < 81) < 20


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


def test_the_tokens_after_the_last_window_are_the_only_ones_left_out():
    T = 4
    assert len(Windows(shards_of_lengths([T]), T)) == 0
    for n in range(T + 1, 4 * T):
        windows = Windows(shards_of_lengths([n]), T)
        seen = {int(token) for window in windows for token in window}
        left_out = set(range(n)) - seen
        assert left_out == set(range(len(seen), n))
        assert len(left_out) < T


def fingerprints():
    """Of datasets that differ a little, by what differs."""
    shards = shards_of_lengths([41, 33])
    last = [shards[0], np.append(shards[1][:-1], np.uint16(9))]
    return {
        "nothing": Windows(shards, 4).fingerprint(),
        "the length of windows": Windows(shards, 8).fingerprint(),
        "the order of shards": Windows(shards[::-1], 4).fingerprint(),
        "a token": Windows(last, 4).fingerprint(),
        "a token that no window holds": Windows(shards_of_lengths([42, 33]), 4).fingerprint(),
        "a shard more": Windows([*shards, shards[0][:1]], 4).fingerprint(),
        "no windows": Windows([], 4).fingerprint(),
    }


def test_a_fingerprint_tells_datasets_apart():
    assert fingerprints() == fingerprints()
    assert len(set(fingerprints().values())) == len(fingerprints())
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in fingerprints().values())


def test_a_fingerprint_reads_at_most_a_thousand_windows_from_first_to_last():
    class Recorded(Windows):
        read: list = []  # noqa: RUF012

        def __getitem__(self, index):
            self.read.append(int(index))
            return super().__getitem__(index)

    Recorded(shards_of_lengths([50001]), 2).fingerprint()
    assert len(set(Recorded.read)) == len(Recorded.read) == 1000
    assert (Recorded.read[0], Recorded.read[-1]) == (0, 24999)
    assert set(np.diff(Recorded.read)) == {25, 26}


def test_validation_takes_the_first_windows():
    windows = Windows(shards_of_lengths([9, 13]), 4)
    assert validation_windows(windows, 3).tolist() == [list(windows[i]) for i in range(3)]
    assert validation_windows(windows, 3).dtype == np.int32
    assert len(validation_windows(windows, 100)) == len(windows) == 5
    with pytest.raises(UserError, match="validation data have no window of "):
        validation_windows(Windows([], 4), 3)
