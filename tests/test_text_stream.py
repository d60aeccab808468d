"""Text shown while it is made: whole characters, row after row, and nothing lost."""

import io
import itertools
import json
import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.generation.samples import Sample, in_order, next_row, write_growing
from gpt2_jax.generation.text_stream import IdStream, Notation, TextStream, speaks_gpt2

TEXT = Notation()
IDS = Notation(ids=True)
SNOWMAN = tokenizer.encode("\u2603").tolist()
# The 256 tokens of one byte each, by which any text can be cut anywhere.
BYTES = {tokenizer.token_bytes(token): token for token in range(256)}


class Token(NamedTuple):
    """What `stream` gives."""

    row: int
    token: int
    logprob: float = -0.5
    alternatives: list = []  # noqa: RUF012
    finish_reason: str | None = None


def ended(row: int, *tokens: int, reason: str = "length") -> list[Token]:
    """A whole row."""
    return [
        Token(row, token, finish_reason=reason if index == len(tokens) else None)
        for index, token in enumerate(tokens, 1)
    ]


def pieces(tokens: list[int]) -> list[str]:
    stream = TextStream()
    return [*map(stream.feed, tokens), stream.end()]


def bytewise(text: bytes) -> list[int]:
    return [BYTES[bytes([byte])] for byte in text]


@settings(max_examples=200)
@given(st.text(max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_pieces_of_a_text_are_whole_characters_and_join_to_it(text, cuts):
    """Tokens of every kind: those of the text, and single bytes, which tear its characters."""
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    tokens = []
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = text[start:end]
        tokens += bytewise(part.encode()) if index % 2 else tokenizer.encode(part).tolist()
    shown = pieces(tokens)
    assert "".join(shown) == text
    assert shown[-1] == ""


@settings(max_examples=300)
@given(st.lists(st.integers(0, 255) | st.integers(0, tokenizer.VOCAB_SIZE - 1), max_size=30))
def test_pieces_of_any_tokens_join_to_what_decoding_them_gives(tokens):
    assert "".join(pieces(tokens)) == tokenizer.decode(tokens) == TEXT.decode(tokens)


@settings(max_examples=100)
@given(st.text(min_size=1, max_size=8))
def test_a_character_is_shown_with_its_last_byte(text):
    """Neither earlier, torn, nor later than it could be."""
    stream = TextStream()
    for character in text:
        *first, last = bytewise(character.encode())
        assert [stream.feed(token) for token in first] == [""] * len(first)
        assert stream.feed(last) == character


def test_a_text_torn_at_its_end_says_so_once():
    assert len(SNOWMAN) > 1
    assert pieces(SNOWMAN[:1]) == ["", "\ufffd"]
    assert pieces(SNOWMAN) == [*[""] * (len(SNOWMAN) - 1), "\u2603", ""]


def test_rows_of_a_padded_vocabulary_are_no_text():
    assert speaks_gpt2(GPT2Config(vocab_size=50304))
    assert "".join(pieces([50257, 50303])) == "\ufffd\ufffd"
    with pytest.raises(UserError, match="token id 50304 is outside"):
        TextStream().feed(50304)


@pytest.mark.parametrize(
    ("size", "expected"), [(3, False), (50256, False), (50257, True), (50304, True), (50305, False)]
)
def test_a_vocabulary_is_known_by_its_size(size, expected):
    assert speaks_gpt2(GPT2Config(vocab_size=size)) is expected


def test_ids_are_numbers_with_spaces_between():
    stream = IdStream()
    assert [stream.feed(0), stream.feed(21), stream.end()] == ["0", " 21", ""]
    assert IDS.decode([0, 2, 1]) == "0 2 1"
    assert IDS.decode([]) == ""


@given(st.lists(st.integers(0, 10**9), max_size=9))
def test_ids_come_back_as_they_were(tokens):
    assert IDS.encode(IDS.decode(tokens)) == tokens


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("0, 2,1", [0, 2, 1]), (" 7\n-8 ", [7, -8]), ("  ", [])]
)
def test_ids_may_have_commas_and_any_space_between_them(prompt, tokens):
    assert IDS.encode(prompt) == tokens


@pytest.mark.parametrize("prompt", ["hello", "0 1.5", "0x1", "1 --2", "9" * 5000])
def test_what_is_no_id_is_named(prompt):
    with pytest.raises(UserError, match="is no token id") as caught:
        IDS.encode(prompt)
    assert len(str(caught.value)) < 200


def test_text_is_encoded_as_gpt2_does():
    assert TEXT.encode("Hello, my name is") == [15496, 11, 616, 1438, 318]
    end = "<|endoftext|>"
    assert TEXT.encode(end, allow_end_of_text=True) == [50256]
    assert 50256 not in TEXT.encode(end)


def test_rows_that_grow_side_by_side_come_one_after_another():
    first, second, third = ended(0, 1, 2, 3), ended(1, 4), ended(2, 5, 6, 7, 8)
    made = [first[0], second[0], third[0], first[1], third[1], first[2], third[2], third[3]]
    assert list(in_order(made)) == first + second + third


def test_the_first_row_is_passed_on_at_once():
    taken = []

    def made():
        for token in ended(0, 1, 2):
            yield Token(1, 9)
            taken.append(token.token)
            yield token

    ordered = in_order(made())
    assert next(ordered).token == 1
    assert taken == [1]
    assert next(ordered).token == 2


@settings(max_examples=100)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.randoms())
def test_whatever_the_order_they_are_made_in(lengths, random):
    rows = [ended(row, *range(length)) for row, length in enumerate(lengths)]
    waiting = [list(row) for row in rows]
    made = []
    while any(waiting):
        made.append(random.choice([row for row in waiting if row]).pop(0))
    ordered = in_order(made)
    assert [list(next_row(ordered)) for _ in rows] == rows


class Screen(io.StringIO):
    """A terminal, or a pipe, that remembers what it showed when it was last flushed."""

    def __init__(self, *, terminal: bool = False) -> None:
        super().__init__()
        self.shown = ""
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def flush(self) -> None:
        self.shown = self.getvalue()


def test_text_is_shown_while_it_is_made():
    screen = Screen()
    shown = []

    def made():
        for token in ended(0, *SNOWMAN, 616):
            shown.append(screen.shown)
            yield token

    write_growing(screen, [15496], made(), TEXT)
    assert shown == ["Hello"] * len(SNOWMAN) + ["Hello\u2603"]
    assert screen.shown == "Hello\u2603 my\n"


def test_a_character_may_begin_in_the_prompt():
    screen = Screen()
    write_growing(screen, SNOWMAN[:1], ended(0, *SNOWMAN[1:]), TEXT)
    assert screen.shown == "\u2603\n"


def test_the_token_that_ends_a_text_is_not_shown():
    screen = Screen()
    new = ended(0, 616, 50256, reason="stop")
    assert write_growing(screen, [15496], new, TEXT) == new
    assert screen.shown == "Hello my\n"


@pytest.mark.parametrize(
    ("terminal", "expected"),
    [(False, "a\x1b[2J\x9b\tb\u00a0\r\nc\n"), (True, "a\\x1b[2J\\x9b\tb\u00a0\\x0d\nc\n")],
)
def test_a_terminal_is_not_given_orders(terminal, expected):
    screen = Screen(terminal=terminal)
    new = ended(0, *tokenizer.encode("\x1b[2J\x9b\tb\u00a0\r\nc").tolist())
    write_growing(screen, tokenizer.encode("a").tolist(), new, TEXT)
    assert screen.shown == expected


def test_an_interrupted_text_ends_its_line():
    def made():
        yield Token(0, SNOWMAN[0])
        raise KeyboardInterrupt

    screen = Screen()
    with pytest.raises(KeyboardInterrupt):
        write_growing(screen, [15496], made(), TEXT)
    assert screen.shown == "Hello\ufffd\n"


def test_a_sample_as_json():
    new = [
        Token(0, SNOWMAN[0], -1.5, [(5, -0.25), (6, -math.inf)]),
        Token(0, 616, math.nan, [(5, -0.5), (6, -2.5)]),
        Token(0, 50256, -3.5, [(5, -0.5), (6, -2.5)], "stop"),
    ]
    fields = Sample(1, 2, [15496, 11], new).to_json(TEXT)
    assert json.loads(json.dumps(fields, allow_nan=False)) == {
        "prompt_index": 1,
        "sample_index": 2,
        "prompt": "Hello,",
        "text": "\ufffd my",
        "prompt_tokens": [15496, 11],
        "tokens": [SNOWMAN[0], 616, 50256],
        "logprobs": [-1.5, None, -3.5],
        "finish_reason": "stop",
        "alternatives": [[[5, -0.25], [6, None]], [[5, -0.5], [6, -2.5]], [[5, -0.5], [6, -2.5]]],
    }


def test_a_sample_in_ids_as_json():
    fields = Sample(0, 0, [0, 2, 1], ended(0, 0, 1, 2, reason="context")).to_json(IDS)
    assert (fields["prompt"], fields["text"]) == ("0 2 1", "0 1 2")
    assert fields["finish_reason"] == "context"
    assert "alternatives" not in fields
