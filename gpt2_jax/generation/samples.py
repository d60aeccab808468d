"""From tokens in the order they are made to samples, one after another, shown as they grow."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from gpt2_jax.generation.text_stream import Notation

if TYPE_CHECKING:  # the decoder imports JAX, which takes a second
    from gpt2_jax.generation.decode import NewToken

# Control characters but for tab and newline: a terminal would obey them.
_CONTROL = {
    code: f"\\x{code:02x}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if code not in (0x09, 0x0A)
}


def in_order(tokens: Iterable["NewToken"]) -> Iterator["NewToken"]:
    """Brings the tokens of rows that grow side by side into the order of the rows.

    The first unfinished row's tokens are passed on as they come; those of the rows after it
    wait until it is finished.
    """
    waiting: collections.defaultdict[int, collections.deque[NewToken]]
    waiting = collections.defaultdict(collections.deque)
    front = 0
    for token in tokens:
        waiting[token.row].append(token)
        while waiting[front]:
            first = waiting[front].popleft()
            yield first
            front += first.finish_reason is not None


def next_row(tokens: Iterator["NewToken"]) -> Iterator["NewToken"]:
    """Takes the tokens up to the end of a row from those `in_order`, one by one."""
    for token in tokens:
        yield token
        if token.finish_reason is not None:
            return


def write_growing(
    out: TextIO, prompt: Sequence[int], tokens: Iterable["NewToken"], notation: Notation
) -> list["NewToken"]:
    r"""Writes the text of a row as it is made, its prompt first, and a newline after it.

    Only whole characters are written, and <|endoftext|> is not, where it ends the text. A
    terminal gets control characters escaped, such as \x1b; a file or a pipe gets them as they are.

    Returns:
      The tokens.
    """
    stream = notation.stream()
    safe = _CONTROL if out.isatty() else {}

    def write(piece: str) -> None:
        out.write(piece.translate(safe))
        out.flush()

    seen = []
    try:
        write("".join(map(stream.feed, prompt)))
        for token in tokens:
            seen.append(token)
            if token.finish_reason != "stop":
                write(stream.feed(token.token))
    except KeyboardInterrupt:
        write(stream.end() + "\n")
        raise
    write(stream.end() + "\n")
    return seen


@dataclasses.dataclass(frozen=True)
class Sample:
    """A finished continuation."""

    prompt_index: int
    """counted from 0, like the next"""
    sample_index: int
    """among the samples of its prompt"""
    prompt: Sequence[int]
    new: Sequence["NewToken"]

    def to_json(self, notation: Notation) -> dict[str, Any]:
        """All about it that a program may want; log-probabilities are natural logarithms.

        `text` is the continuation alone, without <|endoftext|> where that ended it; `tokens`
        and `logprobs` have it. `alternatives` are [token, logprob] pairs, if there are any.
        """
        ended = self.new[-1].finish_reason == "stop"
        fields = {
            "prompt_index": self.prompt_index,
            "sample_index": self.sample_index,
            "prompt": notation.decode(self.prompt),
            "text": notation.decode(new.token for new in self.new[: len(self.new) - ended]),
            "prompt_tokens": list(self.prompt),
            "tokens": [new.token for new in self.new],
            "logprobs": [_finite(new.logprob) for new in self.new],
            "finish_reason": self.new[-1].finish_reason,
        }
        if self.new[0].alternatives:
            fields["alternatives"] = [
                [[token, _finite(logprob)] for token, logprob in new.alternatives]
                for new in self.new
            ]
        return fields


def _finite(logprob: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return logprob if math.isfinite(logprob) else None
