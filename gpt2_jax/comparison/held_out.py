"""Text that was held out from training, and what models with and without adapters make of it.

A difference is a model's loss less that of the base: below 0 the token was predicted better.

Shapes: M models, N windows, T tokens of a window but its first.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax.comparison.scored_tokens import Token, joined, score, tokens_of
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.batches import Windows, validation_windows
from gpt2_jax.data.dataset import PYTHON_DOCUMENTATION, open_dataset
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.losses import perplexity
from gpt2_jax.generation.text_stream import Notation
from gpt2_jax.model import Params

LONGEST_WINDOW = 1024
"""T by default, where model and text have room for it"""
_CONTEXT_TOKENS = 16
_BARE_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))


class Change(NamedTuple):
    """A token in its place."""

    token: Token
    context: str
    """the end of what the models saw before it; may hold lone surrogates as well"""


class Summary(NamedTuple):
    """One model's figures on held-out text; against the base where two are compared."""

    model: str
    loss: float
    """mean, nats/token"""
    perplexity: float
    difference: float
    """of the mean losses"""
    improved: float
    """share of the tokens with a smaller loss than under the base"""
    worsened: float
    """share of those with a larger one"""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Text that was held out from training, and the losses of its tokens."""

    name: str
    windows_NT: np.ndarray
    """token ids [N, T + 1]; each window is predicted from its own beginning on"""
    losses_MNT: np.ndarray
    """nats, float32"""

    def summaries(self, models: Sequence[str]) -> list[Summary]:
        """One for each model."""
        base_NT = self.losses_MNT[0]
        return [
            Summary(
                name,
                float(losses_NT.mean(dtype=np.float64)),
                perplexity(losses_NT),
                float((losses_NT - base_NT).mean(dtype=np.float64)),
                float((losses_NT < base_NT).mean()),
                float((losses_NT > base_NT).mean()),
            )
            for name, losses_NT in zip(models, self.losses_MNT, strict=True)
        ]

    def largest_changes(
        self, model: int, count: int, notation: Notation
    ) -> tuple[list[Change], list[Change]]:
        """The tokens whose loss fell most, and those whose loss rose most, largest first."""
        difference_NT = self.losses_MNT[model] - self.losses_MNT[0]
        order = np.argsort(difference_NT, axis=None, kind="stable")
        falling = order[difference_NT.flat[order] < 0][:count]
        rising = order[::-1][difference_NT.flat[order[::-1]] > 0][:count]
        gained, lost = (
            [self._change(index, notation) for index in found.tolist()]
            for found in (falling, rising)
        )
        return gained, lost

    def passage(self, length: int, notation: Notation) -> tuple[str, list[Token]]:
        """The first windows, at least one, up to `length` tokens: first token, the others."""
        T = self.losses_MNT.shape[2]
        count = 1
        # A window begins with the last token of the one before it, unless a shard ended there.
        while (
            count < len(self.windows_NT)
            and (count + 1) * T <= length
            and self.windows_NT[count, 0] == self.windows_NT[count - 1, -1]
        ):
            count += 1
        ids = self.windows_NT[:count, 1:].flatten()
        losses_MT = self.losses_MNT[:, :count].reshape(len(self.losses_MNT), -1)
        return joined(self.windows_NT[0, :1], notation), tokens_of(ids, losses_MT, notation)

    def _change(self, index: int, notation: Notation) -> Change:
        window, place = divmod(index, self.losses_MNT.shape[2])
        ids = self.windows_NT[window]
        (token,) = tokens_of(
            ids[place + 1 : place + 2], self.losses_MNT[:, window, place, None], notation
        )
        start = max(0, place + 1 - _CONTEXT_TOKENS)
        context = joined(ids[start : place + 1], notation)
        # A cut may leave the last bytes of a character, which the models saw whole.
        return Change(token, context.lstrip(_BARE_BYTES) if start else context)


def windows_of_text(tokens: np.ndarray, config: GPT2Config, sequence_length: int | None) -> Windows:
    """Windows of a text from its beginning on; fewer than T tokens at its end are left out.

    Args:
      tokens: ids [N].
      config: the model's.
      sequence_length: T; None takes the longest that model, text and `LONGEST_WINDOW` allow.

    Raises:
      UserError: if the text is too short for one window, or the model's context is.
    """
    _check_length(sequence_length, config)
    if len(tokens) < 2:
        raise UserError(
            f"the held-out text has {len(tokens)} token(s), and a loss needs 2; bring more text"
        )
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"token {token} of the held-out text is outside the model's vocabulary of "
                f"{config.vocab_size}; use the model's own tokenizer"
            )
    T = sequence_length or min(config.n_positions, LONGEST_WINDOW, len(tokens) - 1)
    return Windows([tokens], T)


def check_dataset(path: str) -> None:
    """Raises UserError if `windows_of_dataset` could not find the data; nothing is read yet."""
    if path != PYTHON_DOCUMENTATION and not Path(path).exists():
        raise UserError(
            f"data {path} does not exist; give the directory that scripts/prepare_custom_text.py "
            f"wrote"
        )


def windows_of_dataset(path: str, config: GPT2Config, sequence_length: int | None) -> Windows:
    """The validation windows of what `open_dataset` takes; T is chosen as by `windows_of_text`.

    Raises:
      UserError: as `open_dataset` does, and if the model's context is too short.
    """
    _check_length(sequence_length, config)
    T = sequence_length or min(config.n_positions, LONGEST_WINDOW)
    windows = open_dataset(path, T, config.vocab_size)[1]
    if len(windows) or sequence_length is not None:
        return windows
    tokens = len(open_dataset(path, 1, config.vocab_size)[1])
    return open_dataset(path, tokens, config.vocab_size)[1] if tokens else windows


def score_held_out(
    models: Iterable[Params], config: GPT2Config, name: str, windows: Windows, limit: int
) -> HeldOut:
    """Losses of the first `limit` windows under each model.

    Raises:
      UserError: if there is no window, or a token is outside the vocabulary.
    """
    if not len(windows):
        raise UserError(
            f"{name} is shorter than one window of {windows.sequence_length + 1} tokens; "
            f"lower --sequence_length or bring more text"
        )
    windows_NT = validation_windows(windows, limit)
    return HeldOut(name, windows_NT, score(models, config, windows_NT))


def _check_length(sequence_length: int | None, config: GPT2Config) -> None:
    if sequence_length is not None and sequence_length > config.n_positions:
        raise UserError(
            f"sequence_length={sequence_length} is more than the model's context of "
            f"{config.n_positions}; lower it"
        )
