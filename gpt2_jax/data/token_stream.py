"""Cuts a stream of tokens into shards, so that an interrupted run goes on where it was.

The first shard is for validation, the others for training, as in build-nanogpt's fineweb.py:

    val_000000.npy, train_000001.npy, train_000002.npy, ...

Each is full but the last; a document may begin in one and end in the next. dataset.json says of
every shard where it ends: after so many pieces and so many tokens of the next piece.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gpt2_jax.data.documents import Source
from gpt2_jax.data.encoding import encode_in_order
from gpt2_jax.data.installation import describe_shard
from gpt2_jax.data.shard_formats import TOKEN
from gpt2_jax.data.shard_progress import ShardProgress
from gpt2_jax.data.unfinished import UnfinishedDataset
from gpt2_jax.errors import UserError
from gpt2_jax.files import written_beside


def write_stream(
    dataset: UnfinishedDataset,
    documents: Source,
    progress: ShardProgress,
    *,
    processes: int,
    shard_tokens: int,
    limit_tokens: int | None = None,
) -> None:
    """Adds the shards that a dataset still lacks: the same ones, interrupted or not.

    Args:
      dataset: where to; gone on with behind its last shard.
      documents: what to tokenize.
      progress: where to show it.
      processes: how many tokenize; the tokens do not depend on it.
      shard_tokens: tokens in every shard but the last.
      limit_tokens: tokens in all shards together, if there are so many; None takes all.

    Raises:
      UserError: if there is too little text for a second shard; if the text cannot be read.
    """
    start = dataset.shards[-1]["end"] if dataset.shards else {"pieces": 0, "tokens": 0}
    sizes = _sizes(dataset.tokens, shard_tokens, limit_tokens)
    with contextlib.closing(encode_in_order(documents(start["pieces"]), processes)) as pieces:
        for tokens, end in _cut(pieces, start, sizes, progress):
            index = len(dataset.shards)
            file = dataset.directory / f"{'train' if index else 'val'}_{index:06d}.npy"
            if not index and len(tokens) < shard_tokens:
                raise _too_little(len(tokens), shard_tokens)
            _save(file, tokens)
            dataset.add({**describe_shard(file, len(tokens)), "end": end})
            progress.finish(file.name)
    if len(dataset.shards) < 2:
        tokens_in_all = dataset.tokens
        dataset.shards.clear()  # so that nothing is kept
        raise _too_little(tokens_in_all, shard_tokens)


def _sizes(done: int, shard_tokens: int, limit_tokens: int | None) -> Iterator[int]:
    """The tokens of each further shard, as far as the limit goes."""
    while limit_tokens is None or done < limit_tokens:
        size = shard_tokens if limit_tokens is None else min(shard_tokens, limit_tokens - done)
        yield size
        done += size


def _cut(
    pieces: Iterable[np.ndarray],
    start: dict[str, int],
    sizes: Iterator[int],
    progress: ShardProgress,
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """Yields the tokens of each shard, good until the next, and where in the stream they end.

    The first of `pieces` is the one in which, or before which, the last shard ended.
    """
    count, offset = start["pieces"], start["tokens"]
    room = np.empty(next(sizes, 0), TOKEN)
    filled = 0
    progress.begin(len(room))
    for tokens in pieces if len(room) else ():
        while offset < len(tokens):
            part = tokens[offset : offset + len(room) - filled]
            room[filled : filled + len(part)] = part
            filled += len(part)
            offset += len(part)
            progress.advance(len(part))
            if filled == len(room):
                yield room, {"pieces": count, "tokens": offset}
                room, filled = room[: next(sizes, 0)], 0
                if not len(room):
                    return
                progress.begin(len(room))
        count, offset = count + 1, 0
    if filled:
        yield room[:filled], {"pieces": count, "tokens": 0}


def _save(file: Path, tokens: np.ndarray) -> None:
    with written_beside(file) as scratch:
        np.save(scratch, tokens, allow_pickle=False)


def _too_little(tokens: int, shard_tokens: int) -> UserError:
    if not tokens:
        return UserError("the text is empty; give another --dataset")
    return UserError(
        f"the text is {tokens:,} tokens, and the first shard, of {shard_tokens:,}, is for "
        f"validation: nothing is left for training; lower --shard_tokens, say to {tokens // 10:,}"
    )
