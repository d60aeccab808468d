"""Token shards: one-dimensional uint16 `.npy` files, and a `dataset.json` that describes them.

    DIR/train_000000.npy, train_000001.npy, ..., val_000000.npy, ..., dataset.json

build-nanogpt writes the same kind of file, under names such as edufineweb_train_000001.npy;
any name with the split as a word in it is read.
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.errors import UserError

SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000


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
        (scratch / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        _install(scratch, directory, description, overwrite)
    except OSError as error:
        raise UserError(
            f"cannot write {directory}: {error.strerror}; free space or choose another"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return description


def read_shards(directory: Path, split: str, vocab_size: int) -> list[np.ndarray]:
    """Opens the shards of a split, memory-mapped, in order of their names.

    Raises:
      UserError: if there are none, or one is not a uint16 vector of ids below `vocab_size`.
    """
    if not directory.is_dir():
        raise UserError(
            f"data directory {directory} does not exist; "
            f"make one with scripts/prepare_custom_text.py or give another --data.path"
        )
    # The split is a word of the name: medieval_train_0.npy is no validation shard.
    word = re.compile(rf"(^|[^a-z]){split}([^a-z]|$)")
    files = sorted(file for file in directory.glob("*.npy") if word.search(file.stem))
    if not files:
        raise UserError(
            f"{directory} holds no {split} shard, such as {split}_000000.npy; prepare the data anew"
        )
    return [_open_shard(file, vocab_size) for file in files]


def _open_shard(file: Path, vocab_size: int) -> np.ndarray:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"shard {file} cannot be read ({error}); prepare the data anew") from None
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise UserError(
            f"shard {file} holds {tokens.dtype} of shape {tokens.shape}, not a uint16 vector; "
            f"prepare the data anew"
        )
    if len(tokens) and tokens.max() >= vocab_size:
        raise UserError(
            f"shard {file} holds token {tokens.max()}, outside the vocabulary of {vocab_size}; "
            f"the data were made for another tokenizer"
        )
    return tokens


def _write_shards(
    directory: Path, split: str, tokens: np.ndarray, shard_tokens: int
) -> list[dict[str, Any]]:
    shards = []
    for index, start in enumerate(range(0, len(tokens), shard_tokens)):
        part = np.ascontiguousarray(tokens[start : start + shard_tokens], np.uint16)
        file = directory / f"{split}_{index:06d}.npy"
        np.save(file, part, allow_pickle=False)
        shards.append({"file": file.name, "tokens": len(part), "sha256": _sha256(file)})
    return shards


def _install(scratch: Path, directory: Path, description: dict[str, Any], overwrite: bool) -> None:
    """Brings the dataset in scratch to its place, or complains if something else is there."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        scratch.replace(directory)
        return
    try:
        present = json.loads((directory / "dataset.json").read_text())
        files = {"dataset.json", *(shard["file"] for shard in present["shards"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory} exists and is not a dataset of ours; choose another --output"
        ) from None
    if present == description:
        _mend(scratch, directory, description)
        return
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in files)
    if foreign:
        raise UserError(
            f"{directory} holds another dataset and {foreign[0]}; choose another --output"
        )
    if not overwrite:
        raise UserError(
            f"{directory} holds another dataset; choose another --output or pass --overwrite"
        )
    _swap(scratch, directory)


def _mend(scratch: Path, directory: Path, description: dict[str, Any]) -> None:
    """Replaces the shards that do not have the sha256 dataset.json gives them."""
    for shard in description["shards"]:
        file = directory / shard["file"]
        if not file.is_file() or _sha256(file) != shard["sha256"]:
            (scratch / shard["file"]).replace(file)


def _swap(scratch: Path, directory: Path) -> None:
    """Renames scratch to directory; what was there steps aside first and goes last."""
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    try:
        directory.replace(aside)
        scratch.replace(directory)
    except BaseException:
        # An interrupt too must leave the old dataset in its place.
        if directory.exists():
            aside.rmdir()
        else:
            aside.replace(directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
