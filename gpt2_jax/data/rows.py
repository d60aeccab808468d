"""Rows of data sets, of the Hugging Face hub or of local files, streamed through `datasets`.

A stream needs no room: FineWeb-Edu's sample of 10 billion tokens would be 28 GB on disk before
its first token. To go on in the middle, the rows before are read again, but not tokenized.
"""

import contextlib
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_jax.data.documents import Piece, Source
from gpt2_jax.errors import UserError


def hub_rows(
    dataset: str, name: str | None, split: str, revision: str | None, text_column: str
) -> tuple[Source, str | None]:
    """Opens a data set of the hub (HF_HOME, HF_ENDPOINT and HF_TOKEN are honoured).

    Args:
      dataset: its id.
      name: its configuration, None for the only one.
      split: as the hub names it, such as "train".
      revision: branch, tag or commit; None is the newest.
      text_column: the column that holds a document in each row.

    Returns:
      The documents, and the commit they are read from.

    Raises:
      UserError: if there is no such set, or it is out of reach; if it has no such column.
    """
    datasets = _import_datasets()
    from huggingface_hub import HfApi

    with quiet_hub(), one_line(f"the hub's data set {dataset} cannot be opened", _ONLINE):
        commit = HfApi().dataset_info(dataset, revision=revision).sha
        rows = datasets.load_dataset(
            dataset, name=name, split=split, revision=commit, streaming=True
        )
    return _column(rows, text_column, dataset), commit


def local_rows(kind: str, files: list[Path], text_column: str) -> Source:
    """Opens local files, plain or compressed.

    Args:
      kind: "parquet", "json" (one object a line, or a list of them) or "csv".
      files: all of that kind.
      text_column: the column that holds a document in each row.

    Raises:
      UserError: if they cannot be read as what they are, or have no such column.
    """
    datasets = _import_datasets()
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"{name} is empty; give another --dataset")
    with one_line(f"{name} cannot be read", "give whole files"):
        rows = datasets.load_dataset(
            kind, data_files=[str(file) for file in files], split="train", streaming=True
        )
    return _column(rows, text_column, name)


_ONLINE = "see its page on the hub, connect, set HF_ENDPOINT, or give a local copy"


def _import_datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            "reading rows of data sets takes the package datasets; "
            "pip install datasets, or give text files"
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs is told in one line below
    return datasets


def _column(rows: Any, text_column: str, name: str) -> Source:
    """The texts of a column, each a document; where a row has none, an empty one.

    Args:
      rows: a `datasets.IterableDataset`.
      text_column: the column to take.
      name: of the set, for messages.
    """
    again = "what is finished is kept: give the same command to go on"
    with one_line(f"{name} cannot be read", "give whole files"):
        columns = rows.column_names or list(next(iter(rows), {}))
    if text_column not in columns:
        raise UserError(
            f"{name} has no column {text_column!r} but {', '.join(columns) or 'none at all'}; "
            f"choose with --text_column"
        )
    column = rows.select_columns([text_column])

    def pieces(skip: int) -> Iterator[Piece]:
        rest = iter(column.skip(skip))
        while True:
            with one_line(f"{name} could not be read to its end", again):
                row = next(rest, None)
            if row is None:
                return
            text = row[text_column]
            if not isinstance(text, str | None):
                raise UserError(
                    f"column {text_column!r} of {name} holds {type(text).__name__}, not text; "
                    f"choose another of {', '.join(columns)} with --text_column"
                )
            yield text or "", True

    return pieces


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """The hub's client says nothing of its retries, of some 20 seconds, before it gives up."""
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def one_line(problem: str, remedy: str) -> Iterator[None]:
    """Tells any failure of a library that passes on whatever its transport or parser raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise UserError(f"{problem} ({reason}); {remedy}") from None
