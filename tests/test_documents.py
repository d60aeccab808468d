"""Documents and where they come from: no cut changes a token, and what is no text is named."""

import gzip
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data import documents as documents_module
from gpt2_jax.data.corpus import open_corpus
from gpt2_jax.data.documents import text_pieces
from gpt2_jax.data.encoding import encode_in_order
from gpt2_jax.errors import UserError
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode

# Letters, digits, contractions, spaces of many kinds, and what a careless cut would break.
texts = st.text(st.sampled_from("aZ9é'st \n\n  \t\r\u00a0\u3000\x1c\u0085,.-😀"), max_size=60)


@settings(max_examples=300)
@given(st.lists(texts, max_size=3), st.integers(1, 9))
def test_a_file_in_pieces_has_the_tokens_of_the_whole(tmp_path_factory, texts, size):
    files = []
    for index, text in enumerate(texts):
        files.append(tmp_path_factory.getbasetemp() / f"{index}.txt")
        files[-1].write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE_SIZE", size)
        pieces = list(text_pieces(files)(0))
        for skip in range(len(pieces) + 1):
            assert list(text_pieces(files)(skip)) == pieces[skip:]
    got = [token for tokens in encode_in_order(pieces, 1) for token in tokens]
    expected = [[END_OF_TEXT_ID, *encode(text)] for text in texts if text]
    assert got == [token for tokens in expected for token in tokens]


def test_a_large_file_comes_in_pieces_of_bounded_size(tmp_path):
    (tmp_path / "large.txt").write_text("It was the best of times,\nit was the worst. " * 100_000)
    pieces = list(text_pieces([tmp_path / "large.txt"])(0))
    assert [begins for _, begins in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert len(pieces) >= 5
    assert max(len(text) for text, _ in pieces) < 1.1 * documents_module.PIECE_SIZE


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_text_is_read_and_damage_is_told(tmp_path, suffix, pack):
    file = tmp_path / f"text.txt{suffix}"
    with pack(file, "wb") as packed:
        packed.write("\ufeffnaïve\n".encode() * 3)
    assert list(text_pieces([file])(0)) == [("naïve\n\ufeffnaïve\n\ufeffnaïve\n", True)]
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(UserError, match=rf"cannot read .*text\.txt{suffix} \("):
        list(text_pieces([file])(0))


@pytest.mark.parametrize("place", [0, 3, 4, 1000])
def test_bytes_that_are_no_utf8_are_named_with_their_place(tmp_path, monkeypatch, place):
    monkeypatch.setattr(documents_module, "PIECE_SIZE", 4)
    (tmp_path / "latin.txt").write_bytes(b"x" * place + b"\xe9tude")
    with pytest.raises(UserError, match=rf"byte 0xe9 at offset {place};"):
        list(text_pieces([tmp_path / "latin.txt"])(0))
    (tmp_path / "latin.txt").write_bytes(b"x" * place + b"\xc3")
    with pytest.raises(UserError, match=rf"byte 0xc3 at offset {place};"):
        list(text_pieces([tmp_path / "latin.txt"])(0))


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt.gz", "notes.md"):
        opener = gzip.open if name.endswith(".gz") else open
        with opener(tmp_path / name, "wb") as file:
            file.write(name.encode())
    corpus = open_corpus(str(tmp_path))
    assert [text for text, _ in corpus.documents(0)] == ["a.txt", "b.txt", "sub/c.txt.gz"]
    before = corpus.origin
    assert open_corpus(str(tmp_path)).origin == before
    (tmp_path / "a.txt").write_text("longer than it was")
    assert open_corpus(str(tmp_path)).origin != before


@pytest.mark.parametrize(
    ("make_files", "flags", "problem"),
    [
        ([], {}, r"holds no file that ends in \.parquet, \.jsonl"),
        (["a.txt", "b.jsonl"], {}, r"files of several kinds \(a\.txt, b\.jsonl\)"),
        (["a.txt"], {"name": "x"}, "for data sets of the hub"),
        (["a.txt"], {"split": "test"}, "for data sets of the hub"),
        (["a.txt"], {"revision": "main"}, "for data sets of the hub"),
    ],
)
def test_what_is_no_corpus_is_told(tmp_path, make_files, flags, problem):
    for name in make_files:
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=problem):
        open_corpus(str(tmp_path), **flags)


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub():
    for path in ("./nowhere", "/nowhere/at/all.txt", "a/b/c"):
        with pytest.raises(UserError, match=f"{path} does not exist; give a file"):
            open_corpus(path)
