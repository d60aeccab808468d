"""A tokenizer as `transformers.AutoTokenizer` and llama.cpp's converter read it from files."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.generation.text_stream import speaks_gpt2
from gpt2_jax.interop.model_directory import TOKENIZER_FILES, TOKENIZERS, read_bytes
from gpt2_jax.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, bpe_files


def tokenizer_files(config: GPT2Config, source: Path | None = None) -> tuple[dict[str, bytes], str]:
    """The files of a model's tokenizer: those of its source, else GPT-2's if that can be its own.

    Args:
      config: the model. A vocabulary that is GPT-2's but for rows of padding is GPT-2's.
      source: a Hugging Face directory that the model is from, or a file in it.

    Returns:
      Contents by file name; and if there are none, why.

    Raises:
      UserError: if a file cannot be read.
    """
    if source is not None:
        own = _read(source if source.is_dir() else source.parent)
        largest = _largest_id(own)
        if largest >= config.vocab_size:
            return {}, (
                f"that of {source} has ids up to {largest}, and the model's vocabulary "
                f"ends at {config.vocab_size - 1}"
            )
        if own:
            return own, ""
    if not speaks_gpt2(config):
        return {}, (
            f"the vocabulary of {config.vocab_size} is not GPT-2's, and the source has no "
            f"tokenizer files"
        )
    return gpt2_files(config.n_positions), ""


def gpt2_files(model_max_length: int) -> dict[str, bytes]:
    """GPT-2's tokenizer: OpenAI's two files, the same in one, and the roles of <|endoftext|>.

    Raises:
      UserError: if OpenAI's files are missing or differ from what was published.
    """
    vocab_bpe, encoder_json = (file.read_bytes() for file in bpe_files())
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    details = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        **roles,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
    }
    return {
        "vocab.json": encoder_json,
        "merges.txt": vocab_bpe,
        "tokenizer.json": json.dumps(
            _fast_tokenizer(encoder_json, vocab_bpe), ensure_ascii=False
        ).encode(),
        "tokenizer_config.json": json.dumps(details, indent=2).encode(),
    }


def _fast_tokenizer(encoder_json: bytes, vocab_bpe: bytes) -> dict[str, Any]:
    """The contents of tokenizer.json, of which merges as "a b" are read by old and new versions."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": END_OF_TEXT_ID,
                "content": END_OF_TEXT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": json.loads(encoder_json),
            "merges": vocab_bpe.decode().split("\n")[1:-1],
        },
    }


def _read(directory: Path) -> dict[str, bytes]:
    """The tokenizer that lies in a directory; empty if there is none."""
    present = {name for name in TOKENIZER_FILES if (directory / name).is_file()}
    if not any(present.issuperset(names) for names in TOKENIZERS):
        return {}
    return {name: read_bytes(directory / name) for name in sorted(present)}


def _largest_id(files: Mapping[str, bytes]) -> int:
    """The largest id that a tokenizer gives; -1 if its files are of a kind not read here.

    Raises:
      UserError: if a file is not what its name says.
    """
    largest = -1
    for name, contents in files.items():
        try:
            largest = max(largest, *_ids(name, contents))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{name} beside the source is no tokenizer's ({error}); mend it or take it away"
            ) from None
    return largest


def _ids(name: str, contents: bytes) -> Iterable[int]:
    """The ids in one of a tokenizer's files, and -1."""
    yield -1
    if name == "vocab.txt":
        yield len(contents.splitlines()) - 1
    if name in ("vocab.json", "added_tokens.json"):
        yield from json.loads(contents).values()
    if name == "tokenizer_config.json":
        yield from map(int, json.loads(contents).get("added_tokens_decoder") or ())
    if name == "tokenizer.json":
        whole = json.loads(contents)
        vocab = whole["model"]["vocab"]
        # A Unigram model lists its tokens, others give each its id.
        yield from vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        yield from (token["id"] for token in whole.get("added_tokens") or ())
