"""The run's record: metrics.jsonl.

Lines are JSON objects in order of time. All speak of the parameters after `step` updates, so
step 0 is the untrained model. A step whose gradient was not finite has null for it, and counts
in "skipped".

    {"step": 0, "val_loss": 10.83}
    {"step": 0, "loss": 10.84, "grad_norm": 4.1, "learning_rate": 2e-05, "skipped": 0,
     "tokens_per_second": 5100.0}
    {"step": 50, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.26}
    {"step": 50, "samples": ["Hello, ...", ...]}
"""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from gpt2_jax.errors import UserError
from gpt2_jax.files import write_text

Record = dict[str, Any]


class MetricsLog:
    """Appends records to metrics.jsonl; a killed process loses none of them."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Writes one record; values must be finite."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until the disk has all records, so that no checkpoint is ahead of them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics.jsonl, in order; a last line cut short is left out.

    Raises:
      UserError: if another line is not a record.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # nothing, or half a line, follows "\n"
        try:
            record = json.loads(line.decode())
            if type(record["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number}: not a record of a run; restore the file, or move it away"
            ) from None
        records.append(record)
    return records


def records_until(path: Path, step: int) -> list[Record]:
    """What was recorded when the checkpoint of `step` was saved; nothing if there is no file."""
    records = read_metrics(path) if path.exists() else []
    # What was measured after `step` updates came before that checkpoint, the update to
    # step + 1 after it.
    return [r for r in records if r["step"] < step or (r["step"] == step and "loss" not in r)]


def rewrite(path: Path, records: list[Record]) -> None:
    """Replaces a metrics.jsonl."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
