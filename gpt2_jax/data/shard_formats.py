"""The files that token shards come in, told apart by how they begin.

- NumPy: a `.npy` vector of uint16, as `write_dataset` and build-nanogpt's fineweb.py write.
- llm.c, modded-nanogpt: 256 int32 (magic 20240520, version 1, count of tokens), then uint16.
- nanoGPT: uint16 and nothing else. Nothing in it says so, so the name must: `.bin`.

All are little-endian and memory-mapped: a shard costs memory only where it is read.
"""

import struct
from pathlib import Path

import numpy as np

from gpt2_jax.errors import UserError

SUFFIXES = (".npy", ".bin")
TOKEN = np.dtype("<u2")
# Read as two tokens, each of these magics begins with one above 55,000, which GPT-2 does not
# have: no headerless shard of its tokens can be taken for them.
LLM_C_MAGIC = 20240520
_OTHER_MAGICS = {
    20240522: "llm.c's multiple-choice questions, not text to train on",
    20240801: "llm.c's tokens of Llama 3's tokenizer, not of GPT-2's",
}
_LLM_C_HEADER = 256 * 4  # bytes
_PART = 1 << 22  # tokens


def open_shard(file: Path) -> np.memmap:
    """Opens a shard of any of the formats: uint16 [N], memory-mapped, N at least 1.

    Raises:
      UserError: if the file cannot be read, or is not whole in its format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            beginning = data.read(12)
    except OSError as error:
        raise UserError(f"shard {file} cannot be read ({error.strerror}); make it anew") from None
    if not size:
        raise UserError(f"shard {file} is empty; make it anew or remove it")
    magic = int.from_bytes(beginning[:4], "little")
    if beginning.startswith(b"\x93NUMPY"):
        tokens = _open_numpy(file, size)
    elif magic == LLM_C_MAGIC:
        tokens = _open_llm_c(file, size, beginning)
    elif magic in _OTHER_MAGICS:
        raise UserError(
            f"shard {file} holds {_OTHER_MAGICS[magic]} (magic {magic}); give another --data.path"
        )
    else:
        tokens = _open_headerless(file, size)
    if not len(tokens):
        raise UserError(f"shard {file} holds no tokens; make it anew or remove it")
    return tokens


def largest_token(tokens: np.memmap) -> int:
    """The largest token of a shard from `open_shard`.

    Read from the file in parts, not through the map, so that 20 GB of tokens do not show as
    20 GB of resident memory. Threads can do it side by side: NumPy lets go of the GIL.
    """
    largest = 0
    with Path(str(tokens.filename)).open("rb") as data:
        data.seek(tokens.offset)
        for start in range(0, len(tokens), _PART):
            part = np.fromfile(data, TOKEN, min(_PART, len(tokens) - start))
            largest = max(largest, int(part.max()))
    return largest


def _open_numpy(file: Path, size: int) -> np.memmap:
    try:
        tokens = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:
        # The header is Python text; what NumPy raises for a damaged one has no common type.
        raise UserError(f"shard {file} cannot be read ({error}); make it anew") from None
    if tokens.dtype != TOKEN or tokens.ndim != 1:
        raise UserError(
            f"shard {file} holds {tokens.dtype} of shape {tokens.shape}, "
            f"not a little-endian uint16 vector; make it anew"
        )
    extra = size - tokens.offset - tokens.nbytes
    if extra:
        raise UserError(
            f"shard {file} goes on for {extra} bytes after its {len(tokens)} tokens; make it anew"
        )
    return tokens


def _open_llm_c(file: Path, size: int, beginning: bytes) -> np.memmap:
    if size < _LLM_C_HEADER:
        raise UserError(
            f"shard {file} is cut short: {size} bytes, less than the header of {_LLM_C_HEADER} "
            f"that llm.c's magic number promises; fetch it anew"
        )
    version, count = struct.unpack("<2i", beginning[4:12])
    if version != 1:
        raise UserError(
            f"shard {file} is of version {version} of llm.c's format, not 1; "
            f"only version 1 holds GPT-2 tokens"
        )
    expected = _LLM_C_HEADER + count * TOKEN.itemsize
    if size != expected:
        raise UserError(
            f"shard {file} is {'cut short' if size < expected else 'too long'}: {size} bytes, "
            f"not the {expected} of a header that counts {count} tokens; fetch it anew"
        )
    return _map(file, _LLM_C_HEADER, count)


def _open_headerless(file: Path, size: int) -> np.memmap:
    if file.suffix != ".bin":
        raise UserError(
            f"shard {file} does not begin as a .npy file does; make it anew, or name it .bin if "
            f"it is uint16 tokens and nothing else"
        )
    if size % TOKEN.itemsize:
        raise UserError(
            f"shard {file} has {size} bytes, an odd number, so it is no whole vector of uint16; "
            f"make it anew"
        )
    return _map(file, 0, size // TOKEN.itemsize)


def _map(file: Path, offset: int, count: int) -> np.memmap:
    try:
        return np.memmap(file, TOKEN, "r", offset, (count,))
    except (OSError, ValueError) as error:
        raise UserError(f"shard {file} cannot be read ({error}); make it anew") from None
