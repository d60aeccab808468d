"""Shards that others have tokenized, from a data set repository of the Hugging Face hub.

kjj0/finewebedu10B-gpt2, for one, holds FineWeb-Edu's 10 billion tokens as modded-nanogpt reads
them: finewebedu_val_000000.bin and finewebedu_train_000001.bin to 000099.bin, of 100 million
tokens each, in llm.c's format.
"""

import shutil
from pathlib import Path

from gpt2_jax.data.installation import describe_shard
from gpt2_jax.data.rows import one_line, quiet_hub
from gpt2_jax.data.shard_formats import SUFFIXES, largest_token, open_shard
from gpt2_jax.data.shard_progress import ShardProgress
from gpt2_jax.data.shards import split_of
from gpt2_jax.data.unfinished import UnfinishedDataset
from gpt2_jax.errors import UserError
from gpt2_jax.tokenizer import VOCAB_SIZE

_REMEDY = "see its page on the hub, connect, or set HF_ENDPOINT; the same command goes on"


def list_shards(repo_id: str, revision: str | None) -> tuple[list[str], str | None]:
    """The shards at a repository's top: validation, then training, each in order of their names.

    Returns:
      Their file names, and the commit that `revision` (None is the newest) stands for.

    Raises:
      UserError: if there is no such repository, it is out of reach, or lacks one of the splits.
    """
    from huggingface_hub import HfApi

    with quiet_hub(), one_line(f"the hub's data set {repo_id} cannot be listed", _REMEDY):
        info = HfApi().dataset_info(repo_id, revision=revision)
    names = sorted(file.rfilename for file in info.siblings or [])
    shards = {
        split: [
            name
            for name in names
            if Path(name).suffix in SUFFIXES
            and "/" not in name
            and split_of(Path(name).stem) == split
        ]
        for split in ("val", "train")
    }
    for split, files in shards.items():
        if not files:
            raise UserError(
                f"the hub's data set {repo_id} has no {split} shard, .npy or .bin; "
                f"give another --pretokenized"
            )
    return [*shards["val"], *shards["train"]], info.sha


def download_shards(
    dataset: UnfinishedDataset,
    repo_id: str,
    names: list[str],
    revision: str | None,
    progress: ShardProgress,
    *,
    limit_tokens: int | None = None,
) -> None:
    """Downloads shards one after another, and checks each.

    Args:
      dataset: where to; what it holds already is not asked for again.
      repo_id: the repository, on the hub or at HF_ENDPOINT.
      names: its files, from `list_shards`.
      revision: branch, tag or commit.
      progress: where to show it.
      limit_tokens: stop with the training shard that makes it so many; None takes all.

    Raises:
      UserError: if a download fails, or a shard is broken or not of GPT-2's tokens.
    """
    from huggingface_hub import hf_hub_download

    done = {shard["file"] for shard in dataset.shards}
    for name in names:
        training = split_of(Path(name).stem) == "train"
        if name in done or (training and _reached(dataset, limit_tokens)):
            continue
        progress.begin(0)
        with quiet_hub(), one_line(f"{name} of {repo_id} cannot be downloaded", _REMEDY):
            hf_hub_download(
                repo_id, name, repo_type="dataset", revision=revision, local_dir=dataset.directory
            )
        tokens = _checked(dataset.directory / name)
        progress.advance(tokens)
        dataset.add(describe_shard(dataset.directory / name, tokens))
        progress.finish(name)
    shutil.rmtree(dataset.directory / ".cache", ignore_errors=True)  # the hub client's notes


def _checked(file: Path) -> int:
    """The number of tokens in a shard just downloaded; a broken one is removed."""
    try:
        tokens = open_shard(file)
        largest = largest_token(tokens)
        if largest >= VOCAB_SIZE:
            raise UserError(
                f"shard {file} holds token {largest}, which GPT-2 does not have; "
                f"give another --pretokenized"
            )
    except UserError:
        file.unlink()
        raise
    return len(tokens)


def _reached(dataset: UnfinishedDataset, limit_tokens: int | None) -> bool:
    has_training = any(split_of(Path(shard["file"]).stem) == "train" for shard in dataset.shards)
    return limit_tokens is not None and has_training and dataset.tokens >= limit_tokens
