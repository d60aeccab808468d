"""Documents as a stream of pieces, pairs (text, begins), from text files of any size.

A piece is a document or a part of one; `begins` is true for its first. A source is a function
of the number of pieces to leave out, so that whoever has read n of them can go on behind them.
"""

import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gpt2_jax.errors import UserError

Piece = tuple[str, bool]
Source = Callable[[int], Iterator[Piece]]

PIECE_SIZE = 1 << 20  # bytes of a file, characters of a chunk for a tokenizer process
# GPT-2's tokens never reach across the space or newline before a word from the left, so text
# cut there has the same tokens. Python's \S leaves out more than the tokenizer's own, no less.
_LAST_CUT = re.compile(r"(?s:.+)(?=[ \n]\S)")


def text_pieces(files: list[Path]) -> Source:
    """Pieces of UTF-8 text files, plain, .gz or .xz: each file is one document.

    Reading raises UserError if a file cannot be read or is not UTF-8 (the first bad byte is
    named).
    """

    def pieces(skip: int) -> Iterator[Piece]:
        for file in files:
            for index, text in enumerate(_read_in_parts(file)):
                if skip:
                    skip -= 1
                else:
                    yield text, index == 0

    return pieces


def _read_in_parts(file: Path) -> Iterator[str]:
    """The text of a file in parts of about PIECE_SIZE, cut where tokens end."""
    text = ""
    try:
        with _open(file) as data:
            for decoded in _decode(data, file):
                if decoded and (cut := _LAST_CUT.match(text)):
                    yield cut[0]
                    text = text[cut.end() :]
                text += decoded
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {file} ({error}); give a whole, readable file") from None
    if text:
        yield text


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    return lzma.open(file) if file.suffix == ".xz" else file.open("rb")  # type: ignore[return-value]


def _decode(data: BinaryIO, file: Path) -> Iterator[str]:
    """Decodes UTF-8 in blocks, without a leading byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while True:
        block = data.read(PIECE_SIZE)
        held_back = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = offset - held_back + error.start
            raise UserError(
                f"{file} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
                f"{place}; convert it first, for example with iconv -t UTF-8"
            ) from None
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(block)
        if not block:
            return
