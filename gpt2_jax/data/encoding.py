"""Tokenizes a stream of documents in several processes, in order and in bounded memory."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from gpt2_jax.data.documents import PIECE_SIZE, Piece
from gpt2_jax.errors import UserError
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode


def encode_in_order(pieces: Iterable[Piece], processes: int) -> Generator[np.ndarray]:
    """Yields the tokens of each piece, uint16, a document's first with <|endoftext|> before it.

    That is where build-nanogpt's fineweb.py puts it. The result does not depend on the number
    of processes. At most 2 * processes + 1 chunks of about a million characters are under way.

    Raises:
      UserError: if a text is not valid Unicode, or something else ends one of the processes.
    """
    chunks = _chunks(pieces)
    if processes == 1:
        for chunk in chunks:
            yield from _encode_chunk(chunk)
        return
    # A fresh interpreter each: a fork would copy the locks of the threads that read the hub.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        pending = collections.deque(
            pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 2 * processes)
        )
        while pending:
            yield from pending.popleft().result()
            pending.extend(
                pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 1)
            )
    except BrokenProcessPool:
        raise UserError(
            "a tokenizer process was ended from outside, perhaps for want of memory; "
            "lower --processes and give the same command to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces by the million characters, so that passing them on costs little beside the work."""
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece[0])
        if size >= PIECE_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunk(chunk: list[Piece]) -> list[np.ndarray]:
    separator = np.array([END_OF_TEXT_ID], np.uint16)
    return [
        np.concatenate([separator, encode(text)]) if begins else encode(text)
        for text, begins in chunk
    ]


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
