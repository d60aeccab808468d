"""SHA-256 manifests of checkpoints: Orbax itself restores flipped bits without a word.

    RUN_DIR/checkpoints/STEP/manifest.json

The manifest is written last. A checkpoint without one was never finished.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpt2_jax.files import write_text

NAME = "manifest.json"


class DamagedError(Exception):
    """What is wrong with a checkpoint, as half a sentence."""


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Records size and SHA-256 of every file below a finished checkpoint, and the facts."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    names = [file.relative_to(checkpoint).as_posix() for file in files]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_sync, files))  # the checkpoint before may go as soon as this one counts
        digests = dict(zip(names, pool.map(_digest, files), strict=True))
    body = json.dumps({**facts, "files": digests}, indent=1)
    # The last line is the digest of all before it, so that the manifest vouches for itself.
    write_text(checkpoint / NAME, f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns the facts and, under "files", the digests.

    Raises:
      DamagedError: if there is no manifest, or it has changed since it was written.
    """
    try:
        text = (checkpoint / NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DamagedError("it was not finished") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"its {NAME} cannot be read ({error})") from None
    body, _, digest = text.removesuffix("\n").rpartition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise DamagedError(f"its {NAME} has changed")
    manifest: dict[str, Any] = json.loads(body)
    return manifest


def verify(checkpoint: Path, parts: Iterable[str]) -> None:
    """Checks all files of the named parts, and those that belong to no part.

    Raises:
      DamagedError: naming the first file that is missing, cut short or changed.
    """
    wanted = set(parts)
    digests = {
        name: digest
        for name, digest in read_manifest(checkpoint)["files"].items()
        if "/" not in name or name.split("/")[0] in wanted
    }
    with ThreadPoolExecutor() as pool:
        present = pool.map(_digest_if_there, [checkpoint / name for name in digests])
        for (name, digest), found in zip(digests.items(), present, strict=True):
            if found is None:
                raise DamagedError(f"its file {name} is missing or cannot be read")
            if found["bytes"] != digest["bytes"]:
                raise DamagedError(
                    f"its file {name} has {found['bytes']} bytes, not {digest['bytes']}"
                )
            if found != digest:
                raise DamagedError(f"its file {name} has changed since it was written")


def _sync(file: Path) -> None:
    with file.open("rb") as data:
        os.fsync(data.fileno())


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
        return {"bytes": data.tell(), "sha256": digest}


def _digest_if_there(file: Path) -> dict[str, Any] | None:
    try:
        return _digest(file)
    except OSError:
        return None
