"""The text that shards are made of: by name from the hub, or by path from local files."""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from gpt2_jax.data.documents import Source, text_pieces
from gpt2_jax.errors import UserError

FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_SAMPLE = "sample-10BT"
# How files are read, by suffix; a last .gz or .xz is looked behind.
_KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, and what to record of where they come from."""

    documents: Source
    origin: dict[str, Any]


def open_corpus(
    dataset: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_column: str = "text",
) -> Corpus:
    """Opens a local file, a local folder or, where neither exists, a data set of the hub.

    Local text files are a document each. Rows are a document each, of .parquet, .jsonl, .json
    and .csv files and of the hub's sets. All but parquet may be compressed, .gz or .xz. From a
    folder every file of these kinds is taken, at any depth, in sorted order.

    Args:
      dataset: a path, or an id of the hub.
      name: configuration of the hub's set; FineWeb-Edu's default is its sample of 10 billion
        tokens.
      split: of the hub's set.
      revision: branch, tag or commit of the hub's set; None is the newest.
      text_column: the column of rows that holds the text.

    Raises:
      UserError: if there is no such thing, it cannot be read, or it has no such column.
    """
    path = Path(dataset)
    if path.exists():
        if (name, split, revision) != (None, "train", None):
            raise UserError(
                f"--name, --split and --revision are for data sets of the hub; {path} is local"
            )
        kind, files = _local_files(path)
        origin: dict[str, Any] = {"dataset": dataset, "files": _digest(files)}
        if kind == "text":
            return Corpus(text_pieces(files), origin)
        from gpt2_jax.data.rows import local_rows

        documents = local_rows(kind, files, text_column)
        return Corpus(documents, origin | {"text_column": text_column})
    if not _HUB_ID.fullmatch(dataset):
        raise UserError(f"{dataset} does not exist; give a file, a folder, or an id of the hub")
    from gpt2_jax.data.rows import hub_rows

    if dataset == FINEWEB and name is None:
        name = FINEWEB_SAMPLE
    documents, commit = hub_rows(dataset, name, split, revision, text_column)
    origin = {"dataset": dataset, "name": name, "split": split, "revision": commit}
    return Corpus(documents, origin | {"text_column": text_column})


def _local_files(path: Path) -> tuple[str, list[Path]]:
    """The files at a path and how to read them; a lone file of an unknown suffix is text."""
    if path.is_file():
        return _kind(path) or "text", [path]
    by_kind: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        kind = _kind(file)
        if kind is not None and file.is_file():
            by_kind.setdefault(kind, []).append(file)
    if not by_kind:
        raise UserError(
            f"{path} holds no file that ends in {', '.join(_KINDS)}; give another --dataset"
        )
    if len(by_kind) > 1:
        examples = ", ".join(str(files[0].relative_to(path)) for files in by_kind.values())
        raise UserError(
            f"{path} holds files of several kinds ({examples}); give a folder or file of one kind"
        )
    return by_kind.popitem()


def _kind(file: Path) -> str | None:
    plain = file.with_suffix("") if file.suffix in (".gz", ".xz") else file
    return _KINDS.get(plain.suffix)


def _digest(files: list[Path]) -> str:
    """A sha256 over names and sizes, by which to see, without reading them, that files changed."""
    listing = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()
