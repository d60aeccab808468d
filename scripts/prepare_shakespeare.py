"""Makes token shards of tiny Shakespeare: python scripts/prepare_shakespeare.py."""

import dataclasses
from pathlib import Path

from gpt2_jax.cli import parse_flags, run
from gpt2_jax.data.shakespeare import download_shakespeare, read_shakespeare
from gpt2_jax.data.shards import write_dataset
from gpt2_jax.data.text import encode_documents


@dataclasses.dataclass(frozen=True)
class Flags:
    """Downloads tiny Shakespeare, checks its sha256 and writes uint16 .npy shards."""

    input: Path | None = None
    """a local copy of the file, instead of the download"""
    output: Path = Path("data/shakespeare")
    """directory for the shards, where configs/shakespeare.py looks"""
    overwrite: bool = False
    """replace another dataset in the output directory"""


def main() -> None:
    """Downloads if need be, tokenizes, writes, reports."""
    flags = parse_flags(Flags)
    file = flags.input
    if file is None:
        file = flags.output.with_suffix(".txt")
        download_shakespeare(file)
    train, validation = encode_documents([read_shakespeare(file)], validation_fraction=0.1)
    write_dataset(flags.output, {"train": train, "val": validation}, overwrite=flags.overwrite)
    print(
        f"{len(train) + len(validation):,} tokens in {flags.output}: "
        f"{len(train):,} for training, {len(validation):,} for validation"
    )


if __name__ == "__main__":
    run(main)
