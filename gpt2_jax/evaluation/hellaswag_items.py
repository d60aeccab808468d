"""HellaSwag's items: read from a file, the validation set from the network if need be.

Zellers et al., 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". A context comes
whole (`ctx`) and in two parts with a headline (`activity_label`, `ctx_a`, `ctx_b`); which of them
a protocol scores is its own affair.
"""

import gzip
import hashlib
import http.client
import itertools
import json
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.files import written_beside

VALIDATION_URL = (
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
)
VALIDATION_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
VALIDATION_FILE = Path("data/hellaswag_val.jsonl")

Protocol = Literal["build-nanogpt", "lm-evaluation-harness"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
FIELDS: dict[Protocol, tuple[str, ...]] = {
    "build-nanogpt": ("ctx",),
    "lm-evaluation-harness": ("activity_label", "ctx_a", "ctx_b"),
}
"""what a protocol needs of an item, beside endings and label"""

ENDINGS = 4
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")

_LABELS = tuple(map(str, range(ENDINGS)))
_GZIP = b"\x1f\x8b"
_SHOWN = 60  # characters of a bad value
_FILE_REMEDY = "give HellaSwag's hellaswag_val.jsonl or .jsonl.gz, from github.com/rowanz/hellaswag"
_REMEDY = "take the file from github.com/rowanz/hellaswag"
_DOWNLOAD_REMEDY = "fetch it elsewhere and pass it with --data"


class Item(NamedTuple):
    """One question, its fields named as in the data set."""

    activity_label: str
    """what is done, such as "Roof shingle removal"; "" if the file has none"""
    ctx_a: str
    """the context's whole sentences; "" if the file has none"""
    ctx_b: str
    """the beginning of the sentence to be ended; empty in WikiHow's items"""
    ctx: str
    """the whole context; "" if the file has none"""
    endings: tuple[str, ...]
    """four of them"""
    label: int
    """index of the true ending"""
    ind: int | None
    """the data set's number, which ActivityNet and WikiHow both count; None if there is none"""


def read_items(
    path: Path, limit: int | None = None, *, fields: Collection[str] = TEXT_FIELDS
) -> list[Item]:
    """Reads a file of HellaSwag, such as hellaswag_val.jsonl with its 10,042 items.

    Args:
      path: one JSON object a line, UTF-8, gzipped or not whatever its name.
      limit: read only the first items; None means all.
      fields: those of `TEXT_FIELDS` that each line must have.

    Raises:
      UserError: if the file cannot be read or holds no items; if a line is no item, its number
        is named.
    """
    if limit is not None:
        check_positive_int("limit", limit)
    if unknown := set(fields) - set(TEXT_FIELDS):
        raise ValueError(f"no such text fields: {unknown}")
    try:
        with path.open("rb") as data:
            # Looked at, not read, so that a pipe does as well.
            packed = data.peek(len(_GZIP)).startswith(_GZIP)
            lines = _lines(gzip.GzipFile(fileobj=data) if packed else data, path)
            items = [
                _parse_item(line, where, fields) for where, line in itertools.islice(lines, limit)
            ]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {_reason(error)}; {_FILE_REMEDY}") from None
    if not items:
        raise UserError(f"{path} is empty; {_FILE_REMEDY}")
    return items


def _lines(data: Iterable[bytes], path: Path) -> Iterator[tuple[str, str]]:
    """Lines with the words for where they are.

    Editors leave blank lines at a file's end. One in between is where an item got lost.
    """
    blank = ""
    for number, line in enumerate(data, start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} "
                f"of the line; {_REMEDY}"
            ) from None
        if not text.strip():
            blank = blank or where
        elif blank:
            raise UserError(f"{blank} is blank, and items follow; {_REMEDY}")
        else:
            yield where, text


def _parse_item(line: str, where: str, required: Collection[str]) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON: {_shown(line.strip())}; {_REMEDY}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object: {_shown(record)}; {_REMEDY}")
    texts = {}
    for name in TEXT_FIELDS:
        text = record.get(name)
        if text is None and name not in required:
            text = ""
        may_be_empty = name == "ctx_b" or name not in required
        texts[name] = _check_text(text, f"{where}: {name}", may_be_empty)
    endings, label, ind = (record.get(name) for name in ("endings", "label", "ind"))
    if not isinstance(endings, list) or len(endings) != ENDINGS:
        raise UserError(f"{where}: endings={_shown(endings)} must be {ENDINGS} texts; {_REMEDY}")
    for choice, ending in enumerate(endings):
        _check_text(ending, f"{where}: endings[{choice}]")
    if isinstance(label, str) and label in _LABELS:  # as the hub's copy of the set has them
        label = int(label)
    if type(label) is not int or not 0 <= label < ENDINGS:
        raise UserError(
            f"{where}: label={_shown(label)} must be a whole number from 0 to {ENDINGS - 1}; "
            f"{_REMEDY}"
        )
    if ind is not None and type(ind) is not int:
        raise UserError(
            f"{where}: ind={_shown(ind)} must be a whole number, or left out; {_REMEDY}"
        )
    return Item(**texts, endings=tuple(endings), label=label, ind=ind)


def _check_text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty):
        rule = "a text" if may_be_empty else "a text, not empty"
        raise UserError(f"{name}={_shown(value)} must be {rule}; {_REMEDY}")
    try:
        value.encode()  # JSON may escape half a character, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}={_shown(value)} must be Unicode, but character {error.start} is "
            f"{value[error.start]!r}; {_REMEDY}"
        ) from None
    return value


def _shown(value: Any) -> str:
    """A value on one line that is not long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _reason(error: Exception) -> str:
    """The system's words for an error, without the file's name, which is told already."""
    return getattr(error, "strerror", None) or str(error)


def validation_file(
    file: Path = VALIDATION_FILE,
    url: str = VALIDATION_URL,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Finds the validation set, or downloads it: 12 MB.

    Args:
      file: where it is kept. A gzipped copy may lie there too, or beside it, .gz at its name's
        end.
      url: an address of it, gzipped or not.
      tell: told what is downloaded.

    Returns:
      The file that is there.

    Raises:
      UserError: if what is there is another file; if the address cannot be reached, or gives
        another file; if the file cannot be written. Nothing is left then.
    """
    for copy in (file, file.with_name(f"{file.name}.gz")):
        try:
            data = copy.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot read {copy}: {_reason(error)}; make it readable, or name another file "
                f"with --data"
            ) from None
        _check_sha256(
            _unpacked(data),
            str(copy),
            "delete it to download it again, or name it with --data to score it as it is",
        )
        return copy
    tell(f"downloading {url} to {file} ...")
    data = _unpacked(_download(url))
    _check_sha256(data, url, _DOWNLOAD_REMEDY)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(file) as scratch:
            scratch.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {_reason(error)}; give it a folder that can be written, or "
            f"{_DOWNLOAD_REMEDY}"
        ) from None
    return file


def _download(url: str) -> bytes:
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(
            f"cannot download {url}: an address must begin with http:// or https://; "
            f"{_DOWNLOAD_REMEDY}"
        )
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        # An address that is none is a ValueError; a refusal keeps its connection open.
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(f"cannot download {url} ({error}); {_DOWNLOAD_REMEDY}") from None


def _unpacked(data: bytes) -> bytes:
    """What a gzip holds; anything else as it is, a broken gzip too: its sha256 is told then."""
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return data


def _check_sha256(data: bytes, source: str, remedy: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != VALIDATION_SHA256:
        raise UserError(
            f"{source} is not HellaSwag's validation set: its sha256 is {digest}, not "
            f"{VALIDATION_SHA256}; {remedy}"
        )
