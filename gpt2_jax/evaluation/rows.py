"""Texts as rows of tokens for a model: what begins alike is read once, and lengths are few.

    question  = context + continuations, such as the four endings of an item of HellaSwag
    row       = context | continuation 1 | continuation 2 | ...
    batch     = rows of one length, padded at their ends

The last token of a continuation is only predicted, so it is not in the row.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# In a longer row, attention over what a query may not see costs more than sharing saves.
_LONGEST_SHARED = 512
MOST_CONTINUATIONS = 32
"""in a row; a question with more has several rows"""
PREDICTIONS_STEP = 16
"""predicted tokens of a row that are computed together"""


class Question(NamedTuple):
    """A beginning, and what may follow it."""

    context: np.ndarray
    """token ids [C], at least one"""
    continuations: tuple[np.ndarray, ...]
    """token ids [E] of each, at least one"""


class Span(NamedTuple):
    """Which predictions of a row belong to a continuation."""

    question: int
    continuation: int
    start: int
    end: int
    cut: bool
    """whether the text lost its beginning, for want of context"""


class Row(NamedTuple):
    """What a model reads, M places where it predicts, and what is to come there."""

    tokens: np.ndarray
    """[T]"""
    position: np.ndarray
    """[T], see `gpt2_jax.attention.Branches`"""
    branch: np.ndarray
    """[T]"""
    place: np.ndarray
    """[M], indices into `tokens`"""
    target: np.ndarray
    """[M], token ids"""
    spans: tuple[Span, ...]

    @property
    def is_single(self) -> bool:
        """Whether it reads as one text: at most one continuation has tokens in it."""
        return len(np.unique(self.branch)) <= 2


class Batch(NamedTuple):
    """Rows side by side, int32; the last ones may be copies that fill the batch up."""

    tokens_BT: np.ndarray
    position_BT: np.ndarray | None
    """None where every row is a single text"""
    branch_BT: np.ndarray | None
    place_BM: np.ndarray
    target_BM: np.ndarray
    chunks: int
    """how many times `PREDICTIONS_STEP` predictions the fullest row has"""
    rows: tuple[Row, ...]
    """the rows without the copies"""


def make_batches(
    questions: Sequence[Question], n_positions: int, batch_size: int, length_step: int = 16
) -> list[Batch]:
    """Arranges questions so that little is padding, the longest rows first.

    What stands in a question's row does not depend on `batch_size`, nor on the other questions.

    Args:
      questions: what to score.
      n_positions: most tokens that a text may have in a row. A longer one loses its beginning.
      batch_size: rows in every batch.
      length_step: of the padded lengths, see `row_length`.

    Raises:
      ValueError: if a context or a continuation is empty.
    """
    if not all(map(len, (text for context, texts in questions for text in (context, *texts)))):
        raise ValueError("a context or continuation has no tokens")
    rows = [
        row
        for number, question in enumerate(questions)
        for row in _rows(number, question, n_positions)
    ]
    # Rows with about as many predictions go together: a batch computes as many as its fullest.
    rows.sort(
        key=lambda row: (row_length(len(row.tokens), length_step), len(row.place)), reverse=True
    )
    batches = []
    for is_single in (False, True):
        alike = [row for row in rows if row.is_single == is_single]
        for start in range(0, len(alike), batch_size):
            chosen = alike[start : start + batch_size]
            length = row_length(len(chosen[0].tokens), length_step)
            length = min(length, n_positions) if is_single else length
            batches.append(_stack(chosen, length, batch_size, is_single))
    return batches


def length_step(platform: str) -> int:
    """The step of padded lengths: programs are soon compiled for a CPU, and padding takes long."""
    return 16 if platform == "cpu" else 32


def row_length(tokens: int, step: int) -> int:
    """The padded length: a multiple of `step` up to 256, of 2 step to 512, of 4 step to 1024 ..."""
    step *= max(1, (1 << (tokens - 1).bit_length()) // 256)
    return -(-tokens // step) * step


def _rows(number: int, question: Question, n_positions: int) -> Iterator[Row]:
    """The rows of a question: one, unless its texts or the row were too long."""
    context, continuations = question
    longest = max(map(len, continuations))
    if len(context) + longest - 1 > n_positions:
        for index, continuation in enumerate(continuations):
            text = np.concatenate([context, continuation])
            cut = len(text) > n_positions + 1
            text = text[-(n_positions + 1) :]
            start = max(1, len(text) - len(continuation))
            yield _join(number, text[:start], [(index, text[start:])], cut)
        return
    together: list[tuple[int, np.ndarray]] = []
    length = len(context)
    for index, continuation in enumerate(continuations):
        inner = len(continuation) - 1
        length += inner
        too_long = inner and length > _LONGEST_SHARED
        if together and (too_long or len(together) == MOST_CONTINUATIONS):
            yield _join(number, context, together, cut=False)
            together, length = [], len(context) + inner
        together.append((index, continuation))
    yield _join(number, context, together, cut=False)


def _join(
    number: int, context: np.ndarray, continuations: Sequence[tuple[int, np.ndarray]], cut: bool
) -> Row:
    """One row of a context and some of its continuations, each with its index."""
    C = len(context)
    tokens, position, branch = [context], [np.arange(C)], [np.zeros(C, int)]
    place: list[np.ndarray] = []
    spans = []
    length, predictions = C, 0
    for name, (index, continuation) in enumerate(continuations, start=1):
        inner = len(continuation) - 1
        tokens.append(continuation[:-1])
        position.append(np.arange(C, C + inner))
        branch.append(np.full(inner, name))
        # The context's last token predicts the first of every continuation.
        place.append(np.concatenate([[C - 1], np.arange(length, length + inner)]))
        spans.append(Span(number, index, predictions, predictions + inner + 1, cut))
        length, predictions = length + inner, predictions + inner + 1
    return Row(
        np.concatenate(tokens),
        np.concatenate(position),
        np.concatenate(branch),
        np.concatenate(place),
        np.concatenate([continuation for _, continuation in continuations]),
        tuple(spans),
    )


def _stack(rows: Sequence[Row], length: int, batch_size: int, is_single: bool) -> Batch:
    """Pads rows to one length and fills the batch up with copies of them."""
    order = [rows[index % len(rows)] for index in range(batch_size)]
    # A row of T tokens predicts at most T - 1 + its number of continuations.
    most = length + MOST_CONTINUATIONS
    most = -(-most // PREDICTIONS_STEP) * PREDICTIONS_STEP

    def padded(name: str, size: int, fill: int = 0) -> np.ndarray:
        array = np.full((batch_size, size), fill, np.int32)
        for filled, row in zip(array, order, strict=True):
            values = getattr(row, name)
            filled[: len(values)] = values
        return array

    return Batch(
        padded("tokens", length),
        None if is_single else padded("position", length),
        None if is_single else padded("branch", length, fill=-1),
        padded("place", most),
        padded("target", most),
        -(-max(len(row.place) for row in rows) // PREDICTIONS_STEP),
        tuple(rows),
    )
