"""A directory that holds a Hugging Face model: its files' names, and whether it may be replaced."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

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
    target = directory.resolve()
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write {directory}: {existing} is a file; give another --output")
    for source in sources:
        if target in (source.resolve(), *source.resolve().parents):
            raise UserError(
                f"--output {directory} is where {source} is read from; give another --output"
            )
    beside = target.parent if existing == target else existing
    if not os.access(beside, os.W_OK | os.X_OK):
        raise UserError(f"cannot write in {beside}: no permission; give another --output")
    if existing == target and any(target.iterdir()):
        _check_replaceable(directory, overwrite)


def _check_replaceable(directory: Path, overwrite: bool) -> None:
    known = (CONFIG, GENERATION_CONFIG, SAFETENSORS, *TOKENIZER_FILES)
    foreign = [
        path.name
        for path in sorted(directory.iterdir())
        if path.name not in known or not path.is_file()
    ]
    if not foreign and not _is_model(directory / CONFIG):
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


def _is_model(config_file: Path) -> bool:
    try:
        return "model_type" in json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
