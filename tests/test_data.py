"""Token shards: what is written comes back, whole or not at all, and nothing broken gets in."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest

from gpt2_jax.data.batches import Windows
from gpt2_jax.data.dataset import PYTHON_DOCUMENTATION, open_dataset
from gpt2_jax.data.shards import read_shards, write_dataset
from gpt2_jax.errors import UserError

TRAIN = np.arange(1000, 1025, dtype=np.uint16)
VAL = np.arange(7, dtype=np.uint16)
SPLITS = {"train": TRAIN, "val": VAL}


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def names(directory):
    return sorted(file.name for file in directory.iterdir())


def test_tokens_come_back_as_they_were(tmp_path):
    write_dataset(tmp_path / "new" / "data", SPLITS)
    for split, tokens in SPLITS.items():
        (shard,) = read_shards(tmp_path / "new" / "data", split, 50257)
        np.testing.assert_array_equal(shard, tokens, strict=True)


def test_a_long_stream_is_split_into_shards_in_order(tmp_path):
    write_dataset(tmp_path / "data", SPLITS, shard_tokens=10)
    shards = read_shards(tmp_path / "data", "train", 50257)
    assert [len(shard) for shard in shards] == [10, 10, 5]
    np.testing.assert_array_equal(np.concatenate(shards), TRAIN)
    assert len(read_shards(tmp_path / "data", "val", 50257)) == 1


def test_the_description_tells_what_is_there(tmp_path):
    directory = tmp_path / "data"
    description = write_dataset(directory, SPLITS, tokenizer="other", shard_tokens=20)
    assert json.loads((directory / "dataset.json").read_text()) == description
    assert description["tokenizer"] == "other"
    assert description["dtype"] == "uint16"
    assert description["tokens"] == {"train": 25, "val": 7}
    assert [(shard["file"], shard["tokens"]) for shard in description["shards"]] == [
        ("train_000000.npy", 20),
        ("train_000001.npy", 5),
        ("val_000000.npy", 7),
    ]
    for shard in description["shards"]:
        data = (directory / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()


def test_writing_the_same_again_changes_nothing(tmp_path):
    first = write_dataset(tmp_path / "data", SPLITS)
    inode = (tmp_path / "data" / "dataset.json").stat().st_ino
    assert write_dataset(tmp_path / "data", SPLITS) == first
    assert write_dataset(tmp_path / "data", SPLITS, overwrite=True) == first
    assert (tmp_path / "data" / "dataset.json").stat().st_ino == inode
    assert names(tmp_path) == ["data"]


def test_another_dataset_is_replaced_only_when_asked_for(tmp_path):
    directory = tmp_path / "data"
    write_dataset(directory, SPLITS, shard_tokens=5)
    before = contents(directory)
    with pytest.raises(UserError, match="--overwrite"):
        write_dataset(directory, {"train": VAL, "val": TRAIN})
    assert contents(directory) == before

    write_dataset(directory, {"train": VAL, "val": TRAIN}, overwrite=True)
    np.testing.assert_array_equal(read_shards(directory, "train", 50257)[0], VAL)
    assert names(directory) == ["dataset.json", "train_000000.npy", "val_000000.npy"]
    assert names(tmp_path) == ["data"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_dataset_is_never_replaced(tmp_path, overwrite):
    directory = tmp_path / "home"
    directory.mkdir()
    (directory / "thesis.txt").write_text("five years of work")
    with pytest.raises(UserError, match="not a dataset of ours"):
        write_dataset(directory, SPLITS, overwrite=overwrite)
    assert names(directory) == ["thesis.txt"]
    assert names(tmp_path) == ["home"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", SPLITS)
    assert "dataset.json" in names(tmp_path / "data")


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["save", "replace"])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, function):
    monkeypatch.setattr(*{"save": (np, "save"), "replace": (os, "replace")}[function], fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_dataset(tmp_path / "data", SPLITS)
    assert names(tmp_path) == []


@pytest.mark.parametrize("failing_call", [0, 1])
def test_a_failed_replacement_leaves_the_old_dataset(tmp_path, monkeypatch, failing_call):
    directory = tmp_path / "data"
    write_dataset(directory, SPLITS)
    before = contents(directory)
    replace, calls = os.replace, []

    def replace_or_fail(source, target, **options):
        calls.append(target)
        return (fail if len(calls) == failing_call + 1 else replace)(source, target, **options)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_dataset(directory, {"train": VAL, "val": TRAIN}, overwrite=True)
    assert contents(directory) == before
    assert names(tmp_path) == ["data"]


def test_a_replacement_stopped_by_the_user_leaves_the_old_dataset(tmp_path, monkeypatch):
    directory = tmp_path / "data"
    write_dataset(directory, SPLITS)
    before = contents(directory)
    replace, calls = os.replace, []

    def replace_or_stop(source, target, **options):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(directory, {"train": VAL, "val": TRAIN}, overwrite=True)
    assert contents(directory) == before


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_dataset(tmp_path / "file" / "data", SPLITS)
    with pytest.raises(UserError, match="file exists"):
        write_dataset(tmp_path / "file", SPLITS)


def save(array, **options):
    return lambda file: np.save(file, array, **options)


def save_cut_short(file):
    np.save(file, TRAIN)
    file.write_bytes(file.read_bytes()[:-9])


BROKEN = {
    "another dtype": save(TRAIN.astype(np.int32)),
    "two dimensions": save(TRAIN.reshape(5, 5)),
    "no dimension": save(np.uint16(3)),
    "floats": save(TRAIN.astype(np.float16)),
    "a token outside the vocabulary": save(np.append(TRAIN, np.uint16(50257))),
    "a pickled object": save(np.array([{"run": "me"}], object), allow_pickle=True),
    "cut short": save_cut_short,
    "empty": lambda file: file.write_bytes(b""),
    "no array": lambda file: file.write_text("tokens: 1 2 3"),
    "a directory": lambda file: file.mkdir(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_shard_is_named(tmp_path, kind):
    np.save(tmp_path / "train_000000.npy", TRAIN)
    BROKEN[kind](tmp_path / "train_000001.npy")
    with pytest.raises(UserError, match=r"train_000001\.npy"):
        read_shards(tmp_path, "train", 50257)


def test_preparing_the_data_anew_mends_a_broken_shard(tmp_path):
    """The message about a broken shard tells the user to do just this."""
    write_dataset(tmp_path / "data", SPLITS)
    save_cut_short(tmp_path / "data" / "train_000000.npy")
    write_dataset(tmp_path / "data", SPLITS, overwrite=True)
    np.testing.assert_array_equal(read_shards(tmp_path / "data", "train", 50257)[0], TRAIN)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_shards(tmp_path / "nowhere", "train", 50257)
    with pytest.raises(UserError, match="holds no val shard"):
        read_shards(tmp_path, "val", 50257)


def test_shards_under_build_nanogpts_names_are_read(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000.npy", VAL)
    for index in (2, 1):
        np.save(tmp_path / f"edufineweb_train_{index:06d}.npy", TRAIN[:index])
    train, validation = open_dataset(str(tmp_path), sequence_length=3, vocab_size=50257)
    assert isinstance(train, Windows)
    assert len(validation) == 2
    assert [len(shard) for shard in read_shards(tmp_path, "train", 50257)] == [1, 2]


def test_a_name_that_holds_the_other_split_as_part_of_a_word_is_not_taken(tmp_path):
    np.save(tmp_path / "medieval_train_000000.npy", TRAIN)
    np.save(tmp_path / "medieval_val_000000.npy", VAL)
    assert len(read_shards(tmp_path, "val", 50257)) == 1


def test_pythons_documentation_is_data_without_any_file():
    train, validation = open_dataset(PYTHON_DOCUMENTATION, sequence_length=128, vocab_size=50257)
    # A tenth is held out; topics differ a little between versions of Python.
    share = len(validation) / (len(train) + len(validation))
    assert len(train) > 500
    assert abs(share - 0.1) < 0.01
    with pytest.raises(UserError, match="vocab_size=97 is too small"):
        open_dataset(PYTHON_DOCUMENTATION, sequence_length=128, vocab_size=97)
