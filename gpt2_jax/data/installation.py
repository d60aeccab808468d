"""Brings a finished dataset directory to its place: it appears whole, or what was there stays."""

import hashlib
import json
from pathlib import Path
from typing import Any

from gpt2_jax.errors import UserError
from gpt2_jax.files import replace_directory, write_text

DESCRIPTION = "dataset.json"


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Writes dataset.json beside itself and renames it."""
    write_text(directory / DESCRIPTION, json.dumps(description, indent=2) + "\n")


def read_description(directory: Path) -> dict[str, Any] | None:
    """The contents of a directory's dataset.json; None where there is no such directory.

    Raises:
      UserError: if something else is there.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    try:
        description: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
        for shard in description["shards"]:
            shard["file"], shard["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory} exists and is not a dataset of ours; choose another --output"
        ) from None
    return description


def check_replaceable(directory: Path, description: dict[str, Any], overwrite: bool) -> None:
    """Raises UserError unless the dataset in a directory may go: asked for, and nothing else."""
    files = {DESCRIPTION, *(shard["file"] for shard in description["shards"])}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in files)
    if foreign:
        raise UserError(
            f"{directory} holds another dataset and {foreign[0]}; choose another --output"
        )
    if not overwrite:
        raise UserError(
            f"{directory} holds another dataset; choose another --output or pass --overwrite"
        )


def install(scratch: Path, directory: Path, description: dict[str, Any], overwrite: bool) -> None:
    """Brings the dataset in scratch to its place, or complains if something else is there.

    The same dataset is left as it is, but for shards that have not the sha256 they should.
    """
    present = read_description(directory)
    if present is None:
        scratch.replace(directory)
    elif present == description:
        for shard in description["shards"]:
            if not is_intact(directory, shard):
                (scratch / shard["file"]).replace(directory / shard["file"])
    else:
        check_replaceable(directory, present, overwrite)
        replace_directory(scratch, directory)


def describe_shard(file: Path, tokens: int) -> dict[str, Any]:
    """What dataset.json says of a shard."""
    return {"file": file.name, "tokens": tokens, "sha256": _sha256(file)}


def is_intact(directory: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is there with the sha256 dataset.json gives it."""
    file = directory / shard["file"]
    return file.is_file() and _sha256(file) == shard["sha256"]


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
