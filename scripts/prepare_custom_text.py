"""Turns text into token shards: python scripts/prepare_custom_text.py --input FILE --output DIR."""

import dataclasses
from pathlib import Path

from gpt2_jax.cli import parse_flags, run
from gpt2_jax.data.shards import write_dataset
from gpt2_jax.data.text import encode_documents, text_files
from gpt2_jax.errors import UserError
from gpt2_jax.files import read_text


@dataclasses.dataclass(frozen=True)
class Flags:
    """Tokenizes UTF-8 text and writes training and validation shards, uint16 .npy."""

    input: Path
    """a text file, or a folder: each file in it is a document"""
    output: Path
    """directory for the shards; give it to train.py as --data.path"""
    pattern: str = "*.txt"
    """which files of a folder to take, at any depth"""
    validation_fraction: float = 0.1
    """share of each document, its tail, that is held out"""
    overwrite: bool = False
    """replace another dataset in the output directory"""


def main() -> None:
    """Reads, tokenizes, writes, reports."""
    flags = parse_flags(Flags)
    if not 0 < flags.validation_fraction < 1:
        raise UserError(f"validation_fraction={flags.validation_fraction} must be between 0 and 1")
    files = text_files(flags.input, flags.pattern)
    train, validation = encode_documents(map(read_text, files), flags.validation_fraction)
    for name, tokens in (("training", train), ("validation", validation)):
        if not len(tokens):
            raise UserError(f"{flags.input} holds too little text for {name} data; bring more")
    splits = {"train": train, "val": validation}
    write_dataset(flags.output, splits, overwrite=flags.overwrite)
    print(
        f"{len(train) + len(validation):,} tokens from {len(files):,} file(s) in {flags.output}: "
        f"{len(train):,} for training, {len(validation):,} for validation"
    )


if __name__ == "__main__":
    run(main)
