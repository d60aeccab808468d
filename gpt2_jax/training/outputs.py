"""Where a run's records go: metrics.jsonl always, trackers on request."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from gpt2_jax.training.metrics import MetricsLog, Record
from gpt2_jax.training.trackers import Tracker


class Outputs:
    """Takes records to all their places; a context manager that closes them.

    Args:
      path: metrics.jsonl; None, as in all processes but one, keeps nothing.
      trackers: further places.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self._log = None if path is None else MetricsLog(path)
        self._trackers = trackers

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for tracker in reversed(self._trackers):
                stack.callback(tracker.close)
            if self._log is not None:
                stack.callback(self._log.close)

    def write(self, record: Record) -> None:
        """Writes one record."""
        if self._log is not None:
            self._log.write(record)
        for tracker in self._trackers:
            tracker.write(record)

    def sync(self) -> None:
        """Waits until the disk has every record."""
        if self._log is not None:
            self._log.sync()
