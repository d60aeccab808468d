"""A dataset that takes hours to make: it grows shard by shard and survives being killed.

It grows in OUTPUT.partial, whose dataset.json lists the shards that are finished, and takes the
name OUTPUT when all are. A killed run leaves those shards; the same command goes on behind them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_jax.data.installation import (
    check_replaceable,
    install,
    is_intact,
    read_description,
    write_description,
)
from gpt2_jax.data.shards import SPLITS, split_of
from gpt2_jax.errors import UserError
from gpt2_jax.files import held

Shards = list[dict[str, Any]]


class UnfinishedDataset:
    """The finished shards of a dataset in the making.

    Attributes:
      directory: where they lie.
      origin: what they are made from and how, as JSON.
      shards: what dataset.json says of each.
    """

    def __init__(self, directory: Path, origin: dict[str, Any], shards: Shards) -> None:
        self.directory = directory
        self.origin = origin
        self.shards = shards

    def add(self, shard: dict[str, Any]) -> None:
        """Records a shard that lies in the directory, whole."""
        self.shards.append(shard)
        write_description(self.directory, self.description())

    @property
    def tokens(self) -> int:
        """Tokens in the finished shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def description(self) -> dict[str, Any]:
        """The contents of dataset.json."""
        tokens = dict.fromkeys(SPLITS, 0)
        for shard in self.shards:
            tokens[split_of(Path(shard["file"]).stem) or ""] += shard["tokens"]
        return {
            "tokenizer": "gpt2",
            "dtype": "uint16",
            "tokens": tokens,
            "origin": self.origin,
            "shards": self.shards,
        }


def make_dataset(
    output: Path,
    origin: dict[str, Any],
    grow: Callable[[UnfinishedDataset], None],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes a dataset, or goes on with one that was begun, from its first shard not intact.

    If it is there already, whole, nothing is done. No two processes can make the same at a time.

    Args:
      output: the directory of the finished dataset.
      origin: what it is made from and how; only shards of the same are gone on from.
      grow: adds the shards that are missing.
      overwrite: whether another dataset may be replaced, finished or not.

    Returns:
      The contents of dataset.json.

    Raises:
      UserError: if another dataset or anything else is there; if it cannot be written.
    """
    partial = output.with_name(f"{output.name}.partial")
    try:
        present = _present(output, partial, origin, overwrite)
        if present is not None:
            return present
        partial.mkdir(parents=True, exist_ok=True)
        with held(partial, "writing"):
            dataset = UnfinishedDataset(partial, origin, _begun(partial, origin, overwrite))
            try:
                write_description(partial, dataset.description())
                grow(dataset)
                install(partial, output, dataset.description(), overwrite)
            finally:
                if not dataset.shards:
                    shutil.rmtree(partial, ignore_errors=True)
            return dataset.description()
    except BrokenPipeError:
        raise  # whoever read the progress has gone: no fault of the disk
    except OSError as error:
        raise UserError(
            f"cannot write {partial}: {error.strerror or error}; free space or choose another "
            f"--output (finished shards are kept)"
        ) from None


def _present(
    output: Path, partial: Path, origin: dict[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """The dataset, if it is there and whole; a damaged one becomes unfinished again."""
    description = read_description(output)
    if description is None:
        return None
    if description.get("origin") != origin:
        check_replaceable(output, description, overwrite)
        return None
    if all(is_intact(output, shard) for shard in description["shards"]):
        return description
    output.replace(partial)
    return None


def _begun(partial: Path, origin: dict[str, Any], overwrite: bool) -> Shards:
    """The shards of an unfinished dataset up to the first that is not as it was written."""
    description = read_description(partial)
    if description is None:
        return []
    if description.get("origin") != origin:
        if not overwrite:
            raise UserError(
                f"{partial} was begun with {_difference(description.get('origin'), origin)}; "
                f"give the same to go on, another --output, or --overwrite to begin anew"
            )
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return []
    shards = []
    for shard in description["shards"]:
        if not is_intact(partial, shard):
            break
        shards.append(shard)
    return shards


def _difference(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    before = before or {}
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    told = [
        ", ".join(f"{key}={json.dumps(origin.get(key))}" for key in keys)
        for origin in (before, now)
    ]
    return f"{told[0]}, not {told[1]}"
