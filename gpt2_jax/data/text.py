"""Where text comes from: files, folders, and the documentation every Python carries."""

import importlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode


def text_files(path: Path, pattern: str) -> list[Path]:
    """A file itself, or the files below a folder whose names match `pattern`, in sorted order.

    Raises:
      UserError: if there is no such path, or nothing in the folder matches.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a text file or a folder of them")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob(pattern) if file.is_file())
    if not files:
        raise UserError(f"no file in {path} matches {pattern!r}; give another --pattern")
    return files


def python_documentation() -> list[str]:
    """The reference texts of Python's `help()`, about 470 kB of English in 79 documents.

    Raises:
      UserError: if this Python was installed without `pydoc_data`.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise UserError(
            "this Python has no pydoc_data.topics; train on a file of yours instead: "
            "scripts/prepare_custom_text.py, then --data.path"
        ) from None
    return [topics[name] for name in sorted(topics)]


def encode_documents(
    documents: Iterable[str], validation_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Makes one stream of token ids for training and one for validation, uint16 [N].

    The tail of every document is held out, so that both streams are of the same kind however
    the documents differ. <|endoftext|> stands between documents; a lone one gets none.

    Args:
      documents: texts.
      validation_fraction: share of each document's tokens that is held out.

    Returns:
      The two streams, (train, validation).
    """
    separator = np.array([END_OF_TEXT_ID], np.uint16)
    train: list[np.ndarray] = []
    validation: list[np.ndarray] = []
    for document in documents:
        tokens = encode(document)
        cut = len(tokens) - round(len(tokens) * validation_fraction)
        for stream, part in ((train, tokens[:cut]), (validation, tokens[cut:])):
            if len(part):
                stream.extend([separator, part] if stream else [part])
    empty = np.zeros(0, np.uint16)
    return np.concatenate([empty, *train]), np.concatenate([empty, *validation])
