"""Tokens with the losses that several models, a base and others, have on them.

Shapes: M models, N windows, T tokens of a window but its first.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.losses import token_losses
from gpt2_jax.generation.text_stream import Notation
from gpt2_jax.model import Params

# With GPT-2's vocabulary their logits take 0.8 GB.
_TOKENS_PER_BATCH = 4096


class Token(NamedTuple):
    """A token of a text, and how well each model predicted it."""

    id: int
    text: str
    """lone surrogates (PEP 383) are bytes of an unfinished character"""
    losses: tuple[float, ...]
    """of each model, nats"""

    def difference(self, model: int) -> float:
        """Loss of a model less that of the base, nats."""
        return self.losses[model] - self.losses[0]


def score(models: Iterable[Params], config: GPT2Config, windows_NT: np.ndarray) -> np.ndarray:
    """The loss of each token of windows [N, T + 1] under each model, nats, float32 [M, N, T].

    Raises:
      UserError: as `token_losses` does.
    """
    batch_size = max(1, _TOKENS_PER_BATCH // windows_NT.shape[1])
    return np.stack(
        [token_losses(params, config, windows_NT, batch_size=batch_size) for params in models]
    )


def tokens_of(ids: Iterable[int], losses_MT: np.ndarray, notation: Notation) -> list[Token]:
    """Puts words to tokens [T] and their losses; ids that are no text of GPT-2's show as <7>."""
    return [
        Token(int(id_), _text(int(id_), notation), tuple(losses_M.tolist()))
        for id_, losses_M in zip(ids, losses_MT.T, strict=True)
    ]


def _text(token: int, notation: Notation) -> str:
    if notation.ids or token >= tokenizer.VOCAB_SIZE:
        return f"<{token}>"
    return tokenizer.token_bytes(token).decode("utf-8", errors="surrogateescape")


def joined(ids: Iterable[int], notation: Notation) -> str:
    """The tokens' texts with the characters that several of them make up together."""
    text = "".join(_text(int(token), notation) for token in ids)
    return text.encode(errors="surrogateescape").decode(errors="surrogateescape")
