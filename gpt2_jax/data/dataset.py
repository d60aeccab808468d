"""Opens the data of a run by path: token shards on disk, or text that Python itself carries."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt2_jax import tokenizer
from gpt2_jax.data.batches import Windows
from gpt2_jax.data.shards import SPLITS, read_shards
from gpt2_jax.data.text import encode_documents, python_documentation
from gpt2_jax.errors import UserError

PYTHON_DOCUMENTATION = "pydoc_data.topics"
"""The path that stands for the documentation in every Python;
a tenth of each text is validation."""


def open_dataset(path: str, sequence_length: int, vocab_size: int) -> tuple[Windows, Windows]:
    """Returns the training and the validation windows.

    Args:
      path: a directory of shards (ours, build-nanogpt's, nanoGPT's or llm.c's; see `shards`), or
        `PYTHON_DOCUMENTATION`.
      sequence_length: T; windows hold T + 1 tokens.
      vocab_size: every token must be below it.

    Raises:
      UserError: if the data are missing, broken or of another vocabulary.
    """
    splits: list[Sequence[np.ndarray]]
    if path == PYTHON_DOCUMENTATION:
        splits = [[tokens] for tokens in _python_documentation(vocab_size)]
    else:
        splits = [read_shards(Path(path), split, vocab_size) for split in SPLITS]
    train, validation = (Windows(shards, sequence_length) for shards in splits)
    return train, validation


def _python_documentation(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    if vocab_size < tokenizer.VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size={vocab_size} is too small for {PYTHON_DOCUMENTATION}, "
            f"which is tokenized with GPT-2's {tokenizer.VOCAB_SIZE} tokens"
        )
    return encode_documents(python_documentation(), 0.1)
