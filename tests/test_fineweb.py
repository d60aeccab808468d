"""Documents to shards: the tokens are those of the documents, however they are cut and read."""

import collections
import errno
import itertools
import json
import multiprocessing
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data import encoding
from gpt2_jax.data.encoding import encode_in_order
from gpt2_jax.data.shard_progress import ShardProgress
from gpt2_jax.data.shards import read_shards
from gpt2_jax.data.token_stream import write_stream
from gpt2_jax.data.unfinished import make_dataset
from gpt2_jax.errors import UserError
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode

few_examples = settings(max_examples=20)
DOCUMENTS = [f"Document {n} has {'many ' * (7 * n % 11)}words. " * (n % 5) for n in range(40)]
EXPECTED = np.concatenate(
    [np.append(np.uint16(END_OF_TEXT_ID), encode(document)) for document in DOCUMENTS]
)


def documents(skip):
    return iter([(document, True) for document in DOCUMENTS[skip:]])


def make(output, source=documents, *, shard_tokens=100, limit_tokens=None, overwrite=False):
    """Tokenizes in this process; returns dataset.json's contents."""

    def grow(dataset):
        write_stream(
            dataset,
            source,
            ShardProgress("tokenizing"),
            processes=1,
            shard_tokens=shard_tokens,
            limit_tokens=limit_tokens,
        )

    origin = {"shard_tokens": shard_tokens, "limit_tokens": limit_tokens}
    return make_dataset(output, origin, grow, overwrite=overwrite)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def tokens_in(directory):
    """All tokens of a dataset in order: validation is the beginning."""
    shards = [*read_shards(directory, "val", 50257), *read_shards(directory, "train", 50257)]
    return np.concatenate(shards)


def test_the_number_of_processes_changes_nothing(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_SIZE", 300)  # some 30 chunks, more than under way at once
    one, two = (list(encode_in_order(documents(0), processes)) for processes in (1, 2))
    assert len(one) == len(DOCUMENTS)
    for tokens_one, tokens_two in zip(one, two, strict=True):
        np.testing.assert_array_equal(tokens_one, tokens_two, strict=True)
    np.testing.assert_array_equal(np.concatenate(two), EXPECTED, strict=True)


def test_no_more_is_read_than_is_under_way(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_SIZE", 1)
    read = []

    def endless():
        while True:
            read.append("word")
            yield "word", True

    tokens = encode_in_order(endless(), 2)
    for _ in range(20):
        next(tokens)
    tokens.close()
    assert len(read) <= 20 + 5


def test_a_text_that_is_no_unicode_is_told_from_any_process():
    for processes in (1, 2):
        with pytest.raises(UserError, match="not valid Unicode"):
            list(encode_in_order([("fine", True), ("\ud800", True)], processes))


def test_a_tokenizer_process_that_dies_is_told():
    tokens = encode_in_order(itertools.repeat(("word " * 50_000, True)), 2)
    next(tokens)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(UserError, match="process was ended from outside"):
        collections.deque(tokens, maxlen=0)


@few_examples
@given(st.integers(40, 300), st.one_of(st.none(), st.integers(301, 1500)))
def test_shards_are_the_stream_cut_evenly(tmp_path_factory, shard_tokens, limit_tokens):
    output = tmp_path_factory.mktemp("data") / "out"
    description = make(output, shard_tokens=shard_tokens, limit_tokens=limit_tokens)
    expected = EXPECTED[:limit_tokens]
    np.testing.assert_array_equal(tokens_in(output), expected)
    sizes = [shard["tokens"] for shard in description["shards"]]
    assert set(sizes[:-1]) == {shard_tokens}
    assert 0 < sizes[-1] <= shard_tokens
    assert description["tokens"] == {"train": len(expected) - sizes[0], "val": sizes[0]}
    assert json.loads((output / "dataset.json").read_text()) == description
    assert description["shards"][0]["file"] == "val_000000.npy"
    assert description["shards"][1]["file"] == "train_000001.npy"
    assert len(contents(output)) == len(sizes) + 1
    shutil.rmtree(output)


def stopping_after(count):
    """A source that is interrupted when so many documents were read since it was opened."""

    def source(skip):
        for index, piece in enumerate(documents(skip)):
            if index == count:
                raise KeyboardInterrupt
            yield piece

    return source


@pytest.mark.parametrize("limit_tokens", [None, 300])
@pytest.mark.parametrize(("often", "shard_tokens"), [(4, 20), (8, 50), (12, 100)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, often, shard_tokens, limit_tokens
):
    monkeypatch.setattr(encoding, "PIECE_SIZE", 1)
    flags = {"shard_tokens": shard_tokens, "limit_tokens": limit_tokens}
    make(tmp_path / "at_once", **flags)
    kept = [0]
    for _ in range(len(DOCUMENTS)):
        try:
            make(tmp_path / "in_parts", stopping_after(often), **flags)
            break
        except KeyboardInterrupt:
            present = contents(tmp_path / "in_parts.partial")
            kept.append(len(present))
            assert kept[-1] > kept[-2]
            description = json.loads(present["dataset.json"])
            assert {shard["file"] for shard in description["shards"]} <= present.keys()
    assert len(kept) > 1
    assert contents(tmp_path / "in_parts") == contents(tmp_path / "at_once")
    assert not (tmp_path / "in_parts.partial").exists()


def test_a_damaged_shard_is_made_again_with_all_behind_it(tmp_path):
    make(tmp_path / "data")
    before = contents(tmp_path / "data")
    untouched = (tmp_path / "data" / "val_000000.npy").stat().st_ino
    (tmp_path / "data" / "train_000002.npy").write_bytes(b"damaged")
    read = []

    def source(skip):
        read.append(skip)
        return documents(skip)

    make(tmp_path / "data", source)
    assert contents(tmp_path / "data") == before
    assert (tmp_path / "data" / "val_000000.npy").stat().st_ino == untouched
    assert read[0] > 0
    make(tmp_path / "data", source)  # nothing is missing now, so nothing is read
    assert len(read) == 1


def test_another_dataset_is_replaced_only_when_asked_for(tmp_path):
    make(tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match="holds another dataset; choose another --output or pass"):
        make(tmp_path / "data", shard_tokens=70)
    assert contents(tmp_path / "data") == before
    make(tmp_path / "data", shard_tokens=70, overwrite=True)
    np.testing.assert_array_equal(tokens_in(tmp_path / "data"), EXPECTED)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_unfinished_dataset_is_not_mixed_with_another(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_SIZE", 1)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data", stopping_after(20))
    before = contents(tmp_path / "data.partial")
    remedy = "give the same to go on, another --output, or --overwrite to begin anew"
    with pytest.raises(
        UserError, match=rf"begun with shard_tokens=100, not shard_tokens=70; {remedy}"
    ):
        make(tmp_path / "data", shard_tokens=70)
    assert contents(tmp_path / "data.partial") == before
    make(tmp_path / "data", shard_tokens=70, overwrite=True)
    np.testing.assert_array_equal(tokens_in(tmp_path / "data"), EXPECTED)


@pytest.mark.parametrize("name", ["data", "data.partial"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_dataset_is_left_alone(tmp_path, name, overwrite):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("five years of work")
    with pytest.raises(UserError, match=rf"{name} exists and is not a dataset of ours"):
        make(tmp_path / "data", overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == [name, "thesis.txt"]


def test_two_processes_cannot_write_the_same(tmp_path):
    def source(skip):
        with pytest.raises(UserError, match="another process is writing"):
            make(tmp_path / "data")
        return documents(skip)

    make(tmp_path / "data", source)
    np.testing.assert_array_equal(tokens_in(tmp_path / "data"), EXPECTED)


def test_text_for_a_single_shard_leaves_nothing_for_training(tmp_path):
    for shard_tokens in (len(EXPECTED), len(EXPECTED) + 1, 10**6):
        with pytest.raises(UserError, match=r"nothing is left for training; lower --shard_tokens"):
            make(tmp_path / "data", shard_tokens=shard_tokens)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="the text is empty"):
        make(tmp_path / "data", lambda _: iter(()))
    description = make(tmp_path / "data", shard_tokens=len(EXPECTED) - 1)
    assert description["tokens"] == {"train": 1, "val": len(EXPECTED) - 1}


def test_a_full_disk_is_told_and_finished_shards_are_kept(tmp_path, monkeypatch):
    save, calls = np.save, []

    def save_or_fail(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **options)

    monkeypatch.setattr(np, "save", save_or_fail)
    with pytest.raises(UserError, match=r"cannot write .*No space left.*finished shards are kept"):
        make(tmp_path / "data")
    description = json.loads((tmp_path / "data.partial" / "dataset.json").read_text())
    assert [shard["tokens"] for shard in description["shards"]] == [100, 100]
    make(tmp_path / "data")
    np.testing.assert_array_equal(tokens_in(tmp_path / "data"), EXPECTED)
