"""A directory that holds a Hugging Face model: its files' names, and whether it may be replaced."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop.weight_files import SAFETENSORS

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZERS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
)
"""Each is a tokenizer that transformers can open alone."""
TOKENIZER_DETAILS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What may lie beside a tokenizer."""
TOKENIZER_FILES = (*(name for names in TOKENIZERS for name in names), *TOKENIZER_DETAILS)
_SPECIAL_TOKENS = ("bos_token_id", "pad_token_id")


def check_output(directory: Path, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Checks that a model may be written to a directory.

    Args:
      directory: need not exist.
      overwrite: whether an exported model may be replaced.
      sources: what the model is made from; none of it may be written over.

    Raises:
      UserError: if the directory cannot be made, holds a source, or holds anything but a model
        that may be replaced.
    """
    target = _resolved(directory)
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write {directory}: {existing} is a file; give another --output")
    for source in sources:
        place = _resolved(source)
        if target in (place, *place.parents):
            raise UserError(
                f"--output {directory} is where {source} is read from; give another --output"
            )
    beside = target.parent if existing == target else existing
    if not os.access(beside, os.W_OK | os.X_OK):
        raise UserError(f"cannot write in {beside}: no permission; give another --output")
    if existing == target and any(target.iterdir()):
        _check_replaceable(directory, overwrite)


def own_fields(source: Path | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a Hugging Face directory says of its model that `GPT2Config` does not.

    Args:
      source: the directory, or a file in it; anything else has nothing of the kind.

    Returns:
      The tokens that begin and pad a text, as config.json has them or is read without them; and
      generation_config.json, if there is one, by its name.

    Raises:
      UserError: if a file cannot be read.
    """
    if source is None:
        return {}, {}
    directory = source if source.is_dir() else source.parent
    fields = _model_fields(directory / CONFIG)
    if "model_type" not in fields:
        return {}, {}
    special = {name: fields[name] for name in _SPECIAL_TOKENS if name in fields}
    generation = directory / GENERATION_CONFIG
    files = {GENERATION_CONFIG: read_bytes(generation)} if generation.is_file() else {}
    # Without one, transformers takes GPT-2's, whatever ends a text.
    return {"bos_token_id": GPT2Config.eos_token_id, **special}, files


def read_bytes(file: Path) -> bytes:
    """The contents of a file of a model.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give a readable source") from None


def _resolved(path: Path) -> Path:
    """The path without symbolic links, of which the end need not exist."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # links in a loop, a name too long, a folder that is closed
        raise UserError(f"cannot reach {path}: {error.strerror}; give another path") from None
    return path.resolve()


def _check_replaceable(directory: Path, overwrite: bool) -> None:
    known = (CONFIG, GENERATION_CONFIG, SAFETENSORS, *TOKENIZER_FILES)
    foreign = [
        path.name
        for path in sorted(directory.iterdir())
        if path.name not in known or not path.is_file()
    ]
    if not foreign and "model_type" not in _model_fields(directory / CONFIG):
        foreign = [min(path.name for path in directory.iterdir())]
    if foreign:
        raise UserError(
            f"{directory} is no exported model, or not that alone: it holds {foreign[0]}; "
            f"give another --output"
        )
    if not overwrite:
        raise UserError(
            f"{directory} already holds a model; give another --output, or replace it with "
            f"--overwrite"
        )


def _model_fields(config_file: Path) -> dict[str, Any]:
    """The contents of a config.json; empty if it is none."""
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
