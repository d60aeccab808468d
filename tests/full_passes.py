"""What generation is held to: texts by full passes of the model, one for each token, no cache."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2, Params, apply
from gpt2_jax.packed import PackedParams

_apply = jax.jit(apply, static_argnums=0)


class FullPasses:
    """A model without a cache."""

    def __init__(self, params: Params | PackedParams, config: GPT2Config) -> None:
        self.config = config
        self._logits = functools.partial(_apply, GPT2(config), params)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """What the model says of the token after these, float64 [V]."""
        # Padding at the end changes nothing before it, and one program serves all lengths.
        padded_1T = np.zeros((1, self.config.n_positions), np.int32)
        padded_1T[0, : len(tokens)] = tokens
        return np.asarray(self._logits(padded_1T)[0, len(tokens) - 1], np.float64)

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """The natural logarithms of the next token's probabilities, float64 [V]."""
        logits_V = self.logits(tokens)
        return logits_V - np.logaddexp.reduce(logits_V)

    def greedy(self, prompt: Sequence[int], count: int, penalty: float = 1.0) -> list[int]:
        """The likeliest continuation; the context slides where it is full, see `next_context`."""
        context, text = list(prompt), []
        for _ in range(count):
            logits_V = self.logits(context)
            seen = list({*prompt, *text})
            logits_V[seen] *= np.where(logits_V[seen] < 0, penalty, 1 / penalty)
            text.append(int(np.argmax(logits_V)))
            context = self.next_context(context, text[-1])
        return text

    def contexts(self, prompt: Sequence[int], text: Sequence[int]) -> list[list[int]]:
        """What the model has before it as it makes each token of a text."""
        contexts = [list(prompt)]
        for token in text[:-1]:
            contexts.append(self.next_context(contexts[-1], token))
        return contexts

    def next_context(self, context: Sequence[int], token: int) -> list[int]:
        """One token more, or only the last half of the window where there is no room for it."""
        context = [*context, token]
        n_positions = self.config.n_positions
        return context if len(context) <= n_positions else context[-max(1, n_positions // 2) :]


def cut(text: Sequence[int], end: int) -> list[int]:
    """A text up to and with its first end of text, if it has one."""
    return list(text[: text.index(end) + 1] if end in text else text)
