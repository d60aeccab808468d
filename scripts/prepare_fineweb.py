"""Turns FineWeb-Edu, or any text, into token shards: python scripts/prepare_fineweb.py."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from gpt2_jax.cli import parse_flags, run
from gpt2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """Streams documents, tokenizes them in several processes and writes uint16 .npy shards.

    The first shard is for validation, the rest for training. Interrupted, the same command goes
    on where it was; finished shards are kept in OUTPUT.partial.
    """

    dataset: str = "HuggingFaceFW/fineweb-edu"
    """a data set of the Hugging Face hub, or a local file or folder: .parquet, .jsonl, .json and
    .csv (each row a document), .txt (each file a document), also as .gz or .xz"""
    name: str | None = None
    """configuration of the hub's data set; FineWeb-Edu's default is sample-10BT"""
    split: str = "train"
    """split of the hub's data set; all of it is used, whatever it is called"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    text_column: str = "text"
    """the column of rows that holds the text"""
    pretokenized: str | None = None
    """instead of text: a data set repository of the hub that holds token shards, such as
    kjj0/finewebedu10B-gpt2"""
    limit_tokens: int | None = None
    """tokens in all shards together; with --pretokenized as many whole shards as it takes"""
    shard_tokens: int | None = None
    """tokens in a shard; default: 100,000,000, or a tenth of a smaller --limit_tokens"""
    output: Path = Path("data/edu_fineweb10B")
    """directory for the shards; configs/124m.py reads the default"""
    processes: int | None = None
    """processes that tokenize; default: one for each CPU"""
    overwrite: bool = False
    """replace another dataset in the output directory"""


def main() -> None:
    """Checks the flags, makes the shards, reports."""
    flags = parse_flags(Flags)
    for name in ("limit_tokens", "shard_tokens", "processes"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    description = _tokenize(flags) if flags.pretokenized is None else _download(flags)
    tokens = description["tokens"]
    print(
        f"{sum(tokens.values()):,} tokens in {flags.output}: {tokens['train']:,} for training, "
        f"{tokens['val']:,} for validation"
    )


def _tokenize(flags: Flags) -> dict[str, Any]:
    from gpt2_jax.data.corpus import open_corpus
    from gpt2_jax.data.shard_progress import ShardProgress
    from gpt2_jax.data.shards import SHARD_TOKENS
    from gpt2_jax.data.token_stream import write_stream
    from gpt2_jax.data.unfinished import make_dataset

    limit, shard_tokens = flags.limit_tokens, flags.shard_tokens or SHARD_TOKENS
    if flags.shard_tokens is None and limit is not None:
        shard_tokens = min(shard_tokens, max(1, limit // 10))
    if limit is not None and limit <= shard_tokens:
        raise UserError(
            f"limit_tokens={limit} must be more than shard_tokens={shard_tokens}: the first "
            f"shard is for validation; raise one or lower the other"
        )
    corpus = open_corpus(
        flags.dataset,
        name=flags.name,
        split=flags.split,
        revision=flags.revision,
        text_column=flags.text_column,
    )
    sizes = {"shard_tokens": shard_tokens, "limit_tokens": limit}
    with ShardProgress("tokenizing") as progress:
        grow = functools.partial(
            write_stream,
            documents=corpus.documents,
            progress=progress,
            processes=flags.processes or len(os.sched_getaffinity(0)),
            **sizes,
        )
        return make_dataset(flags.output, corpus.origin | sizes, grow, overwrite=flags.overwrite)


def _download(flags: Flags) -> dict[str, Any]:
    from gpt2_jax.data.pretokenized import download_shards, list_shards
    from gpt2_jax.data.shard_progress import ShardProgress
    from gpt2_jax.data.unfinished import make_dataset

    for field in ("dataset", "name", "split", "text_column", "shard_tokens", "processes"):
        if getattr(flags, field) != getattr(Flags, field):
            raise UserError(f"--{field} is for text to tokenize; leave it out, or --pretokenized")
    repo_id = str(flags.pretokenized)
    names, commit = list_shards(repo_id, flags.revision)
    origin = {"pretokenized": repo_id, "revision": commit, "limit_tokens": flags.limit_tokens}
    grow = functools.partial(
        download_shards,
        repo_id=repo_id,
        names=names,
        revision=commit,
        progress=ShardProgress("downloading"),  # never started: the hub's client has its own bar
        limit_tokens=flags.limit_tokens,
    )
    return make_dataset(flags.output, origin, grow, overwrite=flags.overwrite)


if __name__ == "__main__":
    run(main)
