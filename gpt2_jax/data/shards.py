"""Token shards: a folder of them, and a `dataset.json` that describes it.

    DIR/train_000000.npy, train_000001.npy, ..., val_000000.npy, ..., dataset.json

is what we write. What others write is read as well, without a dataset.json and under any name
that has the split as a word in it: build-nanogpt's edufineweb_train_000001.npy, nanoGPT's
train.bin, llm.c's fineweb_val_000000.bin. `shard_formats` tells one from another.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.data.installation import describe_shard, install, write_description
from gpt2_jax.data.shard_formats import SUFFIXES, TOKEN, largest_token, open_shard
from gpt2_jax.errors import UserError

SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000
# A split is a word of a name: medieval_train_0.npy is no validation shard.
_SPLIT_OF_WORD = {"train": "train", "val": "val", "validation": "val"}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF_WORD)})(?![a-z])", re.IGNORECASE)


def write_dataset(
    directory: Path,
    splits: dict[str, np.ndarray],
    *,
    tokenizer: str = "gpt2",
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes token streams as shards; the directory appears whole or not at all.

    Writing what is already there is no error: it changes nothing, or mends broken shards.

    Args:
      directory: where to; its parent is made if need be.
      splits: uint16 token streams by split name.
      tokenizer: recorded in dataset.json.
      shard_tokens: tokens in every shard but a split's last.
      overwrite: replace another dataset that is there.

    Returns:
      The contents of dataset.json.

    Raises:
      UserError: if the directory holds something else, or cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}; choose another") from None
    try:
        scratch.chmod(0o755)  # mkdtemp's own mode hides the data from everyone else
        description = {
            "tokenizer": tokenizer,
            "dtype": "uint16",
            "tokens": {split: len(tokens) for split, tokens in splits.items()},
            "shards": [
                shard
                for split, tokens in splits.items()
                for shard in _write_shards(scratch, split, tokens, shard_tokens)
            ],
        }
        write_description(scratch, description)
        install(scratch, directory, description, overwrite)
    except OSError as error:
        raise UserError(
            f"cannot write {directory}: {error.strerror}; free space or choose another"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return description


def read_shards(directory: Path, split: str, vocab_size: int) -> Sequence[np.ndarray]:
    """Opens the shards of a split, memory-mapped, in order of their names: each uint16 [N].

    Every token is compared with the vocabulary, each time: one id that is too large makes the
    loss NaN, some day, and no record of an earlier check tells that a file was damaged since. It
    costs one reading of the files, 0.8 s for a billion tokens on a fast disk.

    Raises:
      UserError: if there are none, if one is not whole or holds an id that is not below
        `vocab_size`, or if two have one name but for the suffix.
    """
    files = [file for file in _shard_files(directory) if split_of(file.stem) == split]
    if not files:
        raise UserError(
            f"{directory} holds no {split} shard, such as {split}_000000.npy or {split}.bin; "
            f"prepare the data anew"
        )
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other is not file:
            raise UserError(
                f"{directory} holds both {other.name} and {file.name}, and their tokens would "
                f"count twice; remove one"
            )
    shards = [open_shard(file) for file in files]
    with ThreadPoolExecutor(max_workers=8) as threads:
        for file, largest in zip(files, threads.map(largest_token, shards), strict=True):
            if largest >= vocab_size:
                raise UserError(
                    f"shard {file} holds token {largest}, outside the vocabulary of {vocab_size}; "
                    f"it is damaged, or was made for another tokenizer"
                )
    return shards


def split_of(stem: str) -> str | None:
    """The split that a file's name speaks of, the last if of several: train, val or None."""
    words = _SPLIT_WORD.findall(stem)
    return _SPLIT_OF_WORD[words[-1].lower()] if words else None


def _shard_files(directory: Path) -> list[Path]:
    if directory.is_file():
        raise UserError(
            f"data directory {directory} is a file; give the directory it lies in, where names "
            f"say which shards are train and which val"
        )
    if not directory.is_dir():
        raise UserError(
            f"data directory {directory} does not exist; "
            f"make one with scripts/prepare_custom_text.py or give another --data.path"
        )
    return sorted(
        file
        for file in directory.iterdir()
        if file.suffix in SUFFIXES and not file.name.startswith(".")
    )


def _write_shards(
    directory: Path, split: str, tokens: np.ndarray, shard_tokens: int
) -> list[dict[str, Any]]:
    shards = []
    for index, start in enumerate(range(0, len(tokens), shard_tokens)):
        part = np.ascontiguousarray(tokens[start : start + shard_tokens], TOKEN)
        file = directory / f"{split}_{index:06d}.npy"
        np.save(file, part, allow_pickle=False)
        shards.append(describe_shard(file, len(part)))
    return shards
