"""Perplexity and bits per byte of documents that may be longer than a model's context.

A document is read in windows, and a token is scored in one of them. Two protocols lay them:

- strided: "Perplexity of fixed-length models" in Hugging Face's documentation. A window has
  `context` tokens, the next begins `stride` tokens later, and only what no window before it held
  is scored. The document's first token is context alone; with stride = context so is the first of
  every window.
- rolling: `loglikelihood_rolling` of lm-evaluation-harness. <|endoftext|> stands before the
  document and every token is scored. A window has `context` inputs, and the last one reaches back
  over what is scored already.

Every scored token counts the same. The documentation's loop, where it puts the windows' means
together, counts one token less of each than is in its mean, also of windows that lose none.

    perplexity = exp(nll / tokens), byte perplexity = exp(nll / bytes),
    bits per byte = nll / bytes / ln 2, with nll the sum of the losses in nats
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.continuations import Question, Report, Scorer
from gpt2_jax.model import AdaptedParams, Params
from gpt2_jax.tokenizer import VOCAB_SIZE, token_bytes


def number_text(value: float | None) -> str:
    """A count, a loss or a perplexity as all reports print it; None is "n/a"."""
    if value is None:
        return "n/a"
    if isinstance(value, int):
        return f"{value:,}"
    digits = ",.4f" if value < 100 else ",.2f" if value < 1e6 else ".4g"
    return f"{value:{digits}}"


class Window(NamedTuple):
    """Of a document's tokens, `begin` to `start` are context and `start` to `end` are scored."""

    begin: int
    start: int
    end: int

    def question(self, tokens: np.ndarray) -> Question:
        """The window on a document as the scorer takes it."""
        return Question(tokens[self.begin : self.start], (tokens[self.start : self.end],))


class Protocol(NamedTuple):
    """How windows lie on a document."""

    name: Literal["strided", "rolling"]
    context: int
    """strided: tokens of a window; rolling: inputs of one"""
    stride: int | None = None
    """strided: from the beginning of a window to that of the next, in tokens"""

    def windows(self, length: int) -> Iterator[Window]:
        """The windows of a document of so many tokens, the first of which is context alone."""
        if self.stride is None:
            return _rolling(length, self.context)
        return _strided(length, self.context, self.stride)

    def check(self, n_positions: int | None = None) -> None:
        """Raises UserError if windows would leave tokens out, or are too long for a model."""
        if self.context < 2 or self.context > (n_positions or self.context):
            most = f"n_positions={n_positions} of the model" if n_positions else "n_positions"
            raise UserError(f"context={self.context} must be from 2 to {most}; change --context")
        if self.stride is not None and not 1 <= self.stride <= self.context:
            raise UserError(
                f"stride={self.stride} must be from 1 to context={self.context}; change --stride"
            )


class Document(NamedTuple):
    """A text to score."""

    name: str
    tokens: np.ndarray
    """ids [N]; the first is context alone"""


class Figures(NamedTuple):
    """How well a model predicts a document, or several together; None is what there is not."""

    name: str
    tokens: int
    """scored ones"""
    bytes: int | None
    """of the scored tokens' text in UTF-8; None if one has no text"""
    nll: float
    """sum of the losses, nats"""

    @property
    def loss(self) -> float | None:
        """Nats/token."""
        return self.nll / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """Of a token; infinity if it is too large for a float."""
        return _exp(self.nll / self.tokens) if self.tokens else None

    @property
    def byte_perplexity(self) -> float | None:
        """Of a byte."""
        return _exp(self.nll / self.bytes) if self.bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """The length of the text under the model's own best code."""
        return self.nll / self.bytes / math.log(2) if self.bytes else None

    def values(self) -> dict[str, float | None]:
        """All that is told of a document, by name."""
        names = ("tokens", "bytes", "loss", "perplexity", "byte_perplexity", "bits_per_byte")
        return {name: getattr(self, name) for name in names}


def total(name: str, figures: Sequence[Figures]) -> Figures:
    """All together: a token, or a byte, counts the same whichever document it is in."""
    sizes = [one.bytes for one in figures if one.bytes is not None]
    return Figures(
        name,
        sum(one.tokens for one in figures),
        sum(sizes) if len(sizes) == len(figures) else None,
        math.fsum(one.nll for one in figures),
    )


def cut_documents(shards: Iterable[np.ndarray], end_of_text: int | None) -> Iterator[np.ndarray]:
    """Yields the documents of a stream of tokens, each with the end-of-text token before it.

    A stream that does not begin with one gives a first document without. One at the very end
    begins no document.

    Args:
      shards: ids [N]; a document may begin in one and end in another.
      end_of_text: the token between documents; None makes the stream one document.
    """
    parts: list[np.ndarray] = []
    for shard in shards:
        tokens = np.asarray(shard)
        # -1 is no token: the stream stays whole.
        cuts = np.flatnonzero(tokens == (-1 if end_of_text is None else end_of_text))
        for index, piece in enumerate(np.split(tokens, cuts)):
            if index and any(map(len, parts)):
                yield np.concatenate(parts)
                parts = []
            parts.append(piece)
    last = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    if len(last) > 1 or (len(last) and last[0] != end_of_text):
        yield last


def beginning_with(end_of_text: int, tokens: np.ndarray) -> np.ndarray:
    """A document with one end-of-text token before it."""
    if len(tokens) and tokens[0] == end_of_text:
        return tokens
    # The narrowest type keeps the document's own.
    return np.concatenate([np.array([end_of_text], np.min_scalar_type(end_of_text)), tokens])


def byte_lengths() -> np.ndarray:
    """How many bytes of text each of GPT-2's tokens is, int [50257]."""
    return np.array([len(token_bytes(token)) for token in range(VOCAB_SIZE)])


def check_documents(documents: Sequence[Document], protocol: Protocol, config: GPT2Config) -> None:
    """Raises UserError if a model lacks one of the tokens, or none would be scored."""
    for name, tokens in documents:
        if len(tokens) and tokens.max() >= config.vocab_size:
            raise UserError(
                f"document {name} holds token {tokens.max()}, outside the model's vocabulary of "
                f"{config.vocab_size}; give text of the model's own tokenizer"
            )
    if not any(any(protocol.windows(len(tokens))) for _, tokens in documents):
        raise UserError(
            f"{len(documents)} document(s) hold no token after the first; give more text to score"
        )


def score_documents(
    scorer: Scorer,
    params: Params | AdaptedParams,
    documents: Sequence[Document],
    protocol: Protocol,
    lengths: np.ndarray | None,
    report: Report,
) -> list[Figures]:
    """Scores documents for which both checks have passed; sums are taken in float64.

    Args:
      scorer: from `make_scorer`.
      params: the model's parameters.
      documents: what to score.
      protocol: how windows lie on them.
      lengths: `byte_lengths`; None if the tokens are not GPT-2's.
      report: told how many predictions of all are done.
    """
    windows = [list(protocol.windows(len(tokens))) for _, tokens in documents]
    pairs = [(number, one) for number, some in enumerate(windows) for one in some]
    questions = [window.question(documents[number].tokens) for number, window in pairs]
    nll = np.zeros(len(documents))
    for (number, _), (continuation,) in zip(pairs, scorer(params, questions, report), strict=True):
        nll[number] += continuation.losses_E.sum(dtype=np.float64)
    figures = []
    for (name, tokens), some, one_nll in zip(documents, windows, nll.tolist(), strict=True):
        scored = [tokens[start:end] for _, start, end in some]
        figures.append(Figures(name, sum(map(len, scored)), _bytes(scored, lengths), one_nll))
    return figures


def _strided(length: int, context: int, stride: int) -> Iterator[Window]:
    held = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        start = max(held, begin + 1)
        if start < end:
            yield Window(begin, start, end)
        if end == length:
            return
        held = end


def _rolling(length: int, context: int) -> Iterator[Window]:
    for start in range(1, length, context):
        end = min(start + context, length)
        yield Window(max(0, end - 1 - context), start, end)


def _bytes(scored: Sequence[np.ndarray], lengths: np.ndarray | None) -> int | None:
    if lengths is None or any(part.max() >= len(lengths) for part in scored):
        return None
    return sum(int(lengths[part].sum()) for part in scored)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(value)))
