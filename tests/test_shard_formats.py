"""Shards as NumPy, nanoGPT and llm.c write them: told apart by content, refused unless whole."""

import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data import shard_formats
from gpt2_jax.data.dataset import open_dataset
from gpt2_jax.data.shard_formats import largest_token, open_shard
from gpt2_jax.data.shards import read_shards, split_of, write_dataset
from gpt2_jax.errors import UserError

TOKENS = np.arange(50000, 50100, dtype=np.uint16)


def numpy_file(tokens=TOKENS):
    data = io.BytesIO()  # np.save to a path would add .npy to its name
    np.save(data, tokens)
    return lambda file: file.write_bytes(data.getvalue())


def headerless(tokens=TOKENS):
    return lambda file: file.write_bytes(tokens.astype("<u2").tobytes())


def llm_c(tokens=TOKENS, *, magic=20240520, version=1, count=None):
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    return lambda file: file.write_bytes(header.ljust(1024, b"\0") + tokens.astype("<u2").tobytes())


def written(write, change):
    """Writes a file and changes its bytes."""

    def write_and_change(file):
        write(file)
        file.write_bytes(change(file.read_bytes()))

    return write_and_change


def cut(write, length):
    return written(write, lambda data: data[:length])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("edufineweb_train_000001.npy", numpy_file()),
        ("train.bin", headerless()),
        ("fineweb_train_000001.bin", llm_c()),
        ("numpy_train.bin", numpy_file()),
        ("llm_c_train.npy", llm_c()),
    ],
)
def test_every_format_gives_the_same_tokens(tmp_path, name, write):
    write(tmp_path / name)
    (shard,) = read_shards(tmp_path, "train", 50257)
    assert isinstance(shard, np.memmap)
    assert shard.dtype == np.uint16
    np.testing.assert_array_equal(shard, TOKENS)


def test_a_dataset_may_be_nanogpts(tmp_path):
    headerless()(tmp_path / "train.bin")
    headerless(TOKENS[:9])(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"of no interest")
    train, validation = open_dataset(str(tmp_path), sequence_length=4, vocab_size=50257)
    assert (len(train), len(validation)) == (24, 2)


BROKEN = {
    "npy cut in its tokens": ("a.npy", cut(numpy_file(), -3), "mmap length"),
    "npy cut in its header": ("a.npy", cut(numpy_file(), 20), "EOF: reading array header"),
    "npy with more behind it": (
        "a.npy",
        written(numpy_file(), lambda data: data + b"more"),
        "goes on for 4 bytes after its 100 tokens",
    ),
    "npy of int32": ("a.npy", numpy_file(TOKENS.astype(np.int32)), "holds int32 of shape (100,)"),
    "npy big-endian": ("a.npy", numpy_file(TOKENS.astype(">u2")), "holds >u2 of shape"),
    "npy of rows": ("a.npy", numpy_file(TOKENS.reshape(10, 10)), "holds uint16 of shape (10, 10)"),
    "npy of objects": (
        "a.npy",
        lambda file: np.save(file, np.array([{}], object), allow_pickle=True),
        "Python objects",
    ),
    "npy of nothing": ("a.npy", numpy_file(TOKENS[:0]), "holds no tokens"),
    "text called npy": ("a.npy", lambda file: file.write_text("1 2 3"), "does not begin as a .npy"),
    "empty npy": ("a.npy", lambda file: file.touch(), "is empty"),
    "empty bin": ("a.bin", lambda file: file.touch(), "is empty"),
    "bin of odd size": ("a.bin", cut(headerless(), -1), "has 199 bytes, an odd number"),
    "llm.c of version 2": ("a.bin", llm_c(version=2), "version 2 of llm.c's format, not 1"),
    "llm.c cut short": ("a.bin", cut(llm_c(), -2), "cut short: 1222 bytes, not the 1224"),
    "llm.c cut at an odd byte": ("a.bin", cut(llm_c(), -1), "cut short: 1223 bytes"),
    "llm.c too long": ("a.bin", llm_c(count=99), "too long: 1224 bytes, not the 1222"),
    "llm.c of a negative count": ("a.bin", llm_c(count=-1), "too long: 1224 bytes"),
    "llm.c cut in its header": ("a.bin", cut(llm_c(), 1000), "less than the header of 1024"),
    "llm.c cut behind its magic": ("a.bin", cut(llm_c(), 4), "cut short: 4 bytes"),
    "llm.c of nothing": ("a.bin", llm_c(TOKENS[:0]), "holds no tokens"),
    "llm.c of Llama 3": ("a.bin", llm_c(magic=20240801, version=7), "Llama 3's tokenizer"),
    "llm.c's questions": ("a.bin", llm_c(magic=20240522), "multiple-choice questions"),
    "a directory": ("a.npy", lambda file: file.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_shard_is_told_in_one_line_with_its_name(tmp_path, kind):
    name, write, problem = BROKEN[kind]
    write(tmp_path / name)
    with pytest.raises(UserError) as refusal:
        open_shard(tmp_path / name)
    assert f"shard {tmp_path / name} " in str(refusal.value)
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


@settings(max_examples=200)
@given(
    st.sampled_from([numpy_file(), headerless(), llm_c()]),
    st.lists(st.tuples(st.integers(0, 130), st.integers(0, 255)), max_size=4),
    st.integers(0, 1300),
)
def test_damage_of_any_kind_is_a_user_error_or_harmless(tmp_path_factory, write, changes, length):
    file = tmp_path_factory.getbasetemp() / "damaged.bin"

    def damage(data):
        data = bytearray(data)
        for place, byte in changes:
            data[place % len(data)] = byte
        return bytes(data[:length])

    written(write, damage)(file)
    with contextlib.suppress(UserError):
        tokens = open_shard(file)
        assert tokens.dtype == np.uint16
        assert tokens.ndim == 1
        assert largest_token(tokens) == tokens.max()


@pytest.mark.parametrize("write", [numpy_file, headerless, llm_c])
def test_one_token_outside_the_vocabulary_is_found_wherever_it_is(tmp_path, monkeypatch, write):
    monkeypatch.setattr(shard_formats, "_PART", 7)
    for place in (0, 6, 7, 50, 99):
        tokens = TOKENS.copy()
        tokens[place] = 60000
        write(TOKENS)(tmp_path / "train_0.bin")
        write(tokens)(tmp_path / "train_1.bin")
        with pytest.raises(UserError, match=r"train_1\.bin holds token 60000, outside the voc"):
            read_shards(tmp_path, "train", 50257)


def test_a_shard_of_ours_is_checked_again_each_time(tmp_path):
    write_dataset(tmp_path / "data", {"train": TOKENS, "val": TOKENS}, shard_tokens=30)
    file = tmp_path / "data" / "train_000002.npy"
    data = bytearray(file.read_bytes())
    data[-10:-8] = struct.pack("<H", 60000)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"train_000002\.npy holds token 60000"):
        open_dataset(str(tmp_path / "data"), sequence_length=8, vocab_size=50257)


def test_the_same_split_in_two_formats_would_count_twice(tmp_path):
    numpy_file()(tmp_path / "train.npy")
    headerless()(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"both train\.bin and train\.npy"):
        read_shards(tmp_path, "train", 50257)


def test_a_file_instead_of_its_directory_is_told_so(tmp_path):
    headerless()(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin is a file; give the directory"):
        open_dataset(str(tmp_path / "train.bin"), sequence_length=8, vocab_size=50257)


def test_hidden_files_are_no_shards(tmp_path):
    headerless()(tmp_path / "train.bin")
    for name in ("._train.bin", ".train_000001.npy"):
        (tmp_path / name).write_bytes(b"half")
    assert len(read_shards(tmp_path, "train", 50257)) == 1


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train", "train"),
        ("val", "val"),
        ("validation", "val"),
        ("edufineweb_val_000000", "val"),
        ("TinyStories-Validation", "val"),
        ("tiny_shakespeare_train", "train"),
        ("train000001", "train"),
        ("medieval_train", "train"),
        ("trainer", None),
        ("training", None),
        ("interval", None),
        ("test_0", None),
        ("pretrain_val_0", "val"),
        ("train_val_split_val_0", "val"),
    ],
)
def test_a_split_is_a_word_of_the_name(stem, split):
    assert split_of(stem) == split
