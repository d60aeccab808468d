"""A base model beside the same with adapters: what they write, and what they make of a text.

Models stand in one order everywhere, the base first. A difference is a loss less the base's:
below 0 the adapter predicted the token better.

Shapes: M models, N texts, T tokens of a text but its first.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.comparison.held_out import HeldOut
from gpt2_jax.comparison.scored_tokens import Token, score, tokens_of
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.decode import FinishReason, stream
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.generation.text_stream import Notation
from gpt2_jax.model import Params
from gpt2_jax.packed import Precision, pack

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A text that one of the models wrote, and what all of them make of it."""

    prompt_index: int
    sample_index: int
    """among the samples of its prompt and model"""
    model: int
    """who wrote it"""
    prompt: tuple[int, ...]
    new: tuple[int, ...]
    finish_reason: FinishReason
    losses_MT: np.ndarray
    """of all its tokens but the first of the prompt, nats, float32"""

    def text(self, notation: Notation) -> str:
        """The continuation, without <|endoftext|> where that ended it."""
        return notation.decode(self.new[: len(self.new) - (self.finish_reason == "stop")])

    def tokens(self, notation: Notation) -> list[Token]:
        """The new ones."""
        return tokens_of(self.new, self.losses_MT[:, len(self.prompt) - 1 :], notation)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that was compared."""

    models: tuple[str, ...]
    """their names"""
    notation: Notation
    held_out: HeldOut | None
    continuations: tuple[Continuation, ...]
    """by prompt, then sample, then model"""


def names_of(adapters: Sequence[Path]) -> tuple[str, ...]:
    """Names of the models: the base, and each adapter by its directory's name or its path."""
    short = [path.absolute().name for path in adapters]
    return BASE, *(
        name if short.count(name) == 1 and name != BASE else str(path)
        for name, path in zip(short, adapters, strict=True)
    )


def continue_prompts(
    models: Sequence[Params],
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    precision: Precision,
) -> tuple[Continuation, ...]:
    """Continues each prompt with each model, by the same draws, and scores all by all.

    Arguments and errors are those of `generation.decode.generate`; `precision` is that of the
    writing, losses are computed in float32.
    """
    if not prompts:
        return ()
    rows = [tuple(prompt) for prompt in prompts for _ in range(num_samples)]
    written: dict[tuple[int, int], tuple[list[int], FinishReason]] = {}
    for model, params in enumerate(models):
        texts: list[list[int]] = [[] for _ in rows]
        for made in stream(
            pack(params, precision, rows=len(rows)),
            config,
            rows,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
        ):
            texts[made.row].append(made.token)
            if made.finish_reason is not None:
                written[made.row, model] = texts[made.row], made.finish_reason
    places = sorted(written)
    whole = [[*rows[row], *written[row, model][0]] for row, model in places]
    # What stands after a text's end has no effect on its losses.
    padded_NT = np.zeros((len(whole), max(map(len, whole))), np.int32)
    for padded_T, text in zip(padded_NT, whole, strict=True):
        padded_T[: len(text)] = text
    losses_MNT = score(models, config, padded_NT)
    return tuple(
        Continuation(
            *divmod(row, num_samples),
            model,
            rows[row],
            tuple(written[row, model][0]),
            written[row, model][1],
            losses_MNT[:, index, : len(whole[index]) - 1],
        )
        for index, (row, model) in enumerate(places)
    )
