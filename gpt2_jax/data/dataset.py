"""Opens the data of a run by path: token shards on disk, or text that Python itself carries."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt2_jax import tokenizer
from gpt2_jax.data.batches import Windows
from gpt2_jax.data.shard_formats import SUFFIXES
from gpt2_jax.data.shards import SPLITS, read_shards
from gpt2_jax.data.text import encode_documents, python_documentation
from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text

PYTHON_DOCUMENTATION = "pydoc_data.topics"
"""The path that stands for the documentation in every Python."""
HELD_OUT = 0.1
"""share of each text, its tail, that is validation where the texts are no shards yet"""


def open_dataset(path: str, sequence_length: int, vocab_size: int) -> tuple[Windows, Windows]:
    """Returns the training and the validation windows.

    Args:
      path: a directory of shards (ours, build-nanogpt's, nanoGPT's or llm.c's; see `shards`), a
        UTF-8 text file, or `PYTHON_DOCUMENTATION`.
      sequence_length: T; windows hold T + 1 tokens.
      vocab_size: every token must be below it.

    Raises:
      UserError: if the data are missing, broken or of another vocabulary.
    """
    splits: list[Sequence[np.ndarray]]
    if path == PYTHON_DOCUMENTATION:
        splits = _encode(python_documentation(), path, vocab_size)
    elif Path(path).is_file() and Path(path).suffix not in SUFFIXES:
        splits = _encode([read_text(Path(path))], path, vocab_size)
    else:
        splits = [read_shards(Path(path), split, vocab_size) for split in SPLITS]
    train, validation = (Windows(shards, sequence_length) for shards in splits)
    return train, validation


def _encode(documents: list[str], path: str, vocab_size: int) -> list[Sequence[np.ndarray]]:
    if vocab_size < tokenizer.VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size={vocab_size} is too small for {path}, which is tokenized with "
            f"GPT-2's {tokenizer.VOCAB_SIZE} tokens; give shards of the model's own tokens"
        )
    return [[tokens] for tokens in encode_documents(documents, HELD_OUT)]
