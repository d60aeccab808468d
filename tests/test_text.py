"""Text on its way to tokens: bytes that are no text are named, and no token is lost."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data import shakespeare
from gpt2_jax.data.text import encode_documents, text_files
from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text
from gpt2_jax.tokenizer import END_OF_TEXT_ID, decode, encode


def test_text_is_read_as_it_is_but_for_the_byte_order_mark(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntw\xc3\xb6\n\n")
    assert read_text(file) == "one\r\ntw\u00f6\n\n"


def test_the_first_byte_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait\xff")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        read_text(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="Is a directory"):
        read_text(tmp_path)


def test_a_folder_gives_its_matching_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    found = [str(file.relative_to(tmp_path)) for file in text_files(tmp_path, "*.txt")]
    assert found == ["a.txt", "b.txt", "sub/c.txt"]
    assert text_files(tmp_path / "notes.md", "*.txt") == [tmp_path / "notes.md"]
    with pytest.raises(UserError, match=r"'\*\.rst'"):
        text_files(tmp_path, "*.rst")
    with pytest.raises(UserError, match="does not exist"):
        text_files(tmp_path / "nowhere", "*.txt")


def test_the_tail_of_every_document_is_held_out():
    documents = ["one two three four five six seven eight nine ten", "a b c d e f g h i j"]
    train, validation = encode_documents(documents, 0.2)
    first, second = (encode(document) for document in documents)
    assert len(first) == len(second) == 10
    end = END_OF_TEXT_ID
    assert train.tolist() == [*first[:8], end, *second[:8]]
    assert validation.tolist() == [*first[8:], end, *second[8:]]
    assert train.dtype == validation.dtype == np.uint16


def test_a_lone_document_gets_no_separator():
    train, validation = encode_documents(["some words and then some more"], 0.5)
    assert END_OF_TEXT_ID not in (*train, *validation)


def test_text_that_spells_the_separator_does_not_end_a_document():
    train, _ = encode_documents(["a<|endoftext|>b"], 0.0)
    assert END_OF_TEXT_ID not in train
    assert decode(train) == "a<|endoftext|>b"


def test_nothing_in_gives_two_empty_streams():
    for stream in encode_documents([], 0.1):
        assert stream.shape == (0,)
        assert stream.dtype == np.uint16


def split_documents(stream):
    return [part.tolist() for part in np.split(stream, np.flatnonzero(stream == END_OF_TEXT_ID))]


@settings(max_examples=50)
@given(st.lists(st.text(max_size=20), max_size=5), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_no_token_is_lost_or_added_but_separators(documents, fraction):
    streams = encode_documents(documents, fraction)
    expected = np.concatenate([encode(document) for document in ["", *documents]])
    kept = np.concatenate([stream[stream != END_OF_TEXT_ID] for stream in streams])
    assert sorted(kept) == sorted(expected)
    for stream in streams:
        assert all(part != [END_OF_TEXT_ID] for part in split_documents(stream))
    separators = sum(np.sum(stream == END_OF_TEXT_ID) for stream in streams)
    assert separators <= 2 * max(0, len(documents) - 1)


def test_another_file_is_not_taken_for_shakespeare(tmp_path):
    file = tmp_path / "input.txt"
    file.write_text("To be, or to be?")
    with pytest.raises(UserError, match="is not tiny Shakespeare"):
        shakespeare.read_shakespeare(file)


def test_a_download_is_kept_only_if_it_is_the_file(tmp_path, monkeypatch):
    source, target = tmp_path / "source.txt", tmp_path / "new" / "input.txt"
    source.write_text("First Citizen:")
    with pytest.raises(UserError, match="is not tiny Shakespeare"):
        shakespeare.download_shakespeare(target, source.as_uri())
    assert not target.parent.exists()

    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(shakespeare, "SHA256", digest)
    shakespeare.download_shakespeare(target, source.as_uri())
    assert [file.name for file in target.parent.iterdir()] == ["input.txt"]
    assert shakespeare.read_shakespeare(target) == "First Citizen:"


def test_a_download_out_of_reach_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="--input"):
        shakespeare.download_shakespeare(tmp_path / "input.txt", (tmp_path / "gone").as_uri())
    assert list(tmp_path.iterdir()) == []
