"""Batches as a pure function of (tokens, seed, step).

Each shard is cut into windows of T tokens and the one that follows: inputs are tokens 0..T-1,
targets 1..T. A window never reaches past its shard's end; a shard of n tokens holds
(n - 1) // T windows, and the tokens after the last one, fewer than T + 1, are left out.
"""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from gpt2_jax.errors import UserError

Batches = Callable[[int], np.ndarray]


class Windows(Sequence[np.ndarray]):
    """The windows of a list of shards in order: item i is int32 [T + 1]."""

    def __init__(self, shards: Sequence[np.ndarray], sequence_length: int) -> None:
        self._shards = shards
        self._sequence_length = sequence_length
        counts = [max(0, len(shard) - 1) // sequence_length for shard in shards]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Window `index`; grain passes plain integers below `len(self)`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        start = (index - before) * self._sequence_length
        window = self._shards[shard][start : start + self._sequence_length + 1]
        return window.astype(np.int32)


def training_batches(windows: Windows, batch_size: int, seed: int) -> Batches:
    """Returns batch(step): int32 [B, T + 1], the same for the same arguments, in any order.

    Windows come in a new random order each epoch, every one exactly once before the next
    epoch begins; a batch may hold the end of one epoch and the beginning of the next.

    Raises:
      UserError: if there are fewer windows than one batch needs.
    """
    if len(windows) < batch_size:
        raise UserError(
            f"the training data hold {len(windows)} windows, fewer than one batch of {batch_size}; "
            f"lower --data.batch_size or --data.sequence_length, or bring more text"
        )
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat().batch(batch_size)
    return dataset.__getitem__


def validation_windows(windows: Windows, count: int) -> np.ndarray:
    """The first `count` windows, or all if there are fewer: int32 [N, T + 1].

    Raises:
      UserError: if there is not a single window.
    """
    if not len(windows):
        raise UserError(
            "the validation data are shorter than one window; "
            "lower --data.sequence_length or bring more text"
        )
    return np.stack([windows[index] for index in range(min(count, len(windows)))])
