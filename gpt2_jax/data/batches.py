"""Batches as a pure function of (tokens, seed, step).

Each shard is cut into windows of T tokens and the one that follows: inputs are tokens 0..T-1,
targets 1..T. A window never reaches past its shard's end; a shard of n tokens holds
(n - 1) // T windows. The remainder is never seen: fewer than T tokens after a shard's last window,
and all of a shard of T tokens or fewer.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np

from gpt2_jax.errors import UserError

_FINGERPRINT_WINDOWS = 1000


class Batches(Protocol):
    """The batches of a run by step, whole or in part."""

    def __call__(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """The global batch of a step, int32 [B, T + 1], or the `rows` of it, [len(rows), T + 1].

        Nothing but those rows is read, so each of several hosts can ask for its own: row r is
        the same whoever asks, and whatever else they ask for.

        Raises:
          IndexError: if a row is not in 0..B-1.
        """


class Windows(Sequence[np.ndarray]):
    """The windows of a list of shards in order: item i is int32 [T + 1]."""

    def __init__(self, shards: Sequence[np.ndarray], sequence_length: int) -> None:
        self._shards = shards
        self.sequence_length = sequence_length
        counts = [max(0, len(shard) - 1) // sequence_length for shard in shards]
        self._ends = np.cumsum(counts)
        self.longest = max(map(len, shards), default=0)
        """tokens of the longest shard"""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Window `index`; grain passes plain integers below `len(self)`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        start = (index - before) * self.sequence_length
        window = self._shards[shard][start : start + self.sequence_length + 1]
        return window.astype(np.int32)

    def fingerprint(self) -> str:
        """A sha256 by which a resumed run can tell whether its data are still the same.

        It covers T, the length of every shard, and the tokens of up to 1,000 windows, evenly
        spaced from the first to the last: cheap for any size, blind to a few changed tokens.
        """
        lengths = [self.sequence_length, *(len(shard) for shard in self._shards)]
        digest = hashlib.sha256(np.array(lengths, "<i8").tobytes())
        count = min(len(self), _FINGERPRINT_WINDOWS)
        for index in np.linspace(0, len(self) - 1, count, dtype=np.int64):
            digest.update(self[index].astype("<i4").tobytes())
        return digest.hexdigest()


def training_batches(windows: Windows, batch_size: int, seed: int) -> Batches:
    """Returns batch(step): int32 [B, T + 1], the same for the same arguments, in any order.

    Windows come in a new random order each epoch, within and across shards, every one exactly
    once before the next epoch begins; a batch may hold the end of one epoch and the beginning
    of the next. Row r of step s is window s * B + r of that order: neither the number of hosts
    nor what was read before matters.

    Raises:
      UserError: if there are fewer windows than one batch needs.
    """
    if not len(windows):
        raise _too_short("training", windows)
    if len(windows) < batch_size:
        raise UserError(
            f"the training data hold {len(windows)} windows, fewer than one batch of {batch_size}; "
            f"lower --data.batch_size or --data.sequence_length, or bring more text"
        )
    shuffled = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()

    def batch(step: int, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        wanted = [int(row) for row in (range(batch_size) if rows is None else rows)]
        for row in wanted:
            if not 0 <= row < batch_size:
                raise IndexError(f"row {row} of a batch of {batch_size}")
        tokens_NT = np.empty((len(wanted), windows.sequence_length + 1), np.int32)
        for row_T, row in zip(tokens_NT, wanted, strict=True):
            row_T[:] = shuffled[step * batch_size + row]
        return tokens_NT

    return batch


def _too_short(split: str, windows: Windows) -> UserError:
    return UserError(
        f"the {split} data have no window of {windows.sequence_length + 1} tokens, only pieces of "
        f"up to {windows.longest:,}; lower --data.sequence_length or bring more text"
    )


def validation_windows(windows: Windows, count: int) -> np.ndarray:
    """The first `count` windows, or all if there are fewer: int32 [N, T + 1].

    Raises:
      UserError: if there is not a single window.
    """
    if not len(windows):
        raise _too_short("validation", windows)
    return np.stack([windows[index] for index in range(min(count, len(windows)))])
