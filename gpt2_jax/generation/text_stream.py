"""How a model's tokens are written: as text, whole characters only, or as the numbers they are.

A token of GPT-2 is a few bytes, and a character may be spread over several tokens; what is shown
while a text is being made must wait for the character's last byte.
"""

import codecs
import dataclasses
import re
from collections.abc import Iterable

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError

LARGEST_PADDED_VOCAB = 50304
"""GPT-2's 50,257 tokens rounded up to a multiple of 128, as models trained for speed have them"""

_NUMBER = re.compile(r"-?\d{1,18}")


class TextStream:
    """Turns GPT-2's tokens into text as they come.

    A piece holds whole characters; the bytes of an unfinished one wait for the next token. All
    pieces together, with the one of `end`, are `tokenizer.decode` of the tokens.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes; maybe none."""
        # What stands for the rows of a padded vocabulary is no text: it becomes U+FFFD.
        padding = tokenizer.VOCAB_SIZE <= token < LARGEST_PADDED_VOCAB
        return self._decoder.decode(b"\xff" if padding else tokenizer.token_bytes(token))

    def end(self) -> str:
        """U+FFFD if the text ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class IdStream:
    """Turns tokens into their numbers as they come, with spaces between them."""

    def __init__(self) -> None:
        self._separator = ""

    def feed(self, token: int) -> str:
        """The number, after a space unless it is the first."""
        piece = f"{self._separator}{token}"
        self._separator = " "
        return piece

    def end(self) -> str:
        """Nothing: no number is ever unfinished."""
        return ""


@dataclasses.dataclass(frozen=True)
class Notation:
    """How prompts are read and texts are written."""

    ids: bool = False
    """as token ids, "15496 11 616", rather than as text in GPT-2's vocabulary"""

    def encode(self, prompt: str, *, allow_end_of_text: bool = False) -> list[int]:
        """The tokens of a prompt.

        Raises:
          UserError: if it is no valid Unicode, or no list of numbers.
        """
        if self.ids:
            return _parse_ids(prompt)
        return tokenizer.encode(prompt, allow_end_of_text=allow_end_of_text).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """All of a text at once."""
        stream = self.stream()
        return "".join([*map(stream.feed, tokens), stream.end()])

    def stream(self) -> TextStream | IdStream:
        """For a text that is still being made."""
        return IdStream() if self.ids else TextStream()


def speaks_gpt2(config: GPT2Config) -> bool:
    """Whether a model's vocabulary is GPT-2's, judged by its size; padding may follow it."""
    return tokenizer.VOCAB_SIZE <= config.vocab_size <= LARGEST_PADDED_VOCAB


def _parse_ids(prompt: str) -> list[int]:
    words = prompt.replace(",", " ").split()
    for word in words:
        if not _NUMBER.fullmatch(word):
            raise UserError(
                f"{word[:40]!r} is no token id, as --ids and models without GPT-2's vocabulary "
                f'take; give whole numbers, such as "0 2 1"'
            )
    return [int(word) for word in words]
