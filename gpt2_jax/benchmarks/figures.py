"""What measurements of generation mean: rates, shares and ratios, from seconds and tokens."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gpt2_jax.benchmarks.engines import EngineName, precision
from gpt2_jax.config import GPT2Config

Tokens = list[list[int]]
REFERENCE: EngineName = "ours-f32"

# What a step reads of every weight; 32 weights of q8_0 share a 16-bit scale.
_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1 + 2 / 32, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked for: to continue so many rows of random tokens, greedily."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int) -> Tokens:
        """The same ones every time."""
        shape = (self.batch, self.prompt_tokens)
        return np.random.default_rng(0).integers(0, vocab_size, shape).tolist()


class Turn(NamedTuple):
    """One measurement of an engine."""

    first: float
    """seconds until the first token of every row"""
    last: float
    """seconds until the last one, from the same start"""
    bandwidth: Mapping[str, float]
    """bytes read from memory in a second just before, by method"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured with a load.

    Attributes:
      tokens: what each engine made.
      turns: of each engine, one in every round.
    """

    load: Load
    tokens: Mapping[EngineName, Tokens]
    turns: Mapping[EngineName, Sequence[Turn]]

    @property
    def bandwidth(self) -> tuple[str, float]:
        """The best method to read memory, and its bytes per second; the median of all turns."""
        return best_bandwidth([turn for turns in self.turns.values() for turn in turns])


def best_bandwidth(turns: Sequence[Turn]) -> tuple[str, float]:
    """The method with the largest median, and that."""
    speeds = {
        method: statistics.median(turn.bandwidth[method] for turn in turns)
        for method in turns[0].bandwidth
    }
    return max(speeds.items(), key=lambda speed: speed[1])


@dataclasses.dataclass(frozen=True)
class EngineFigures:
    """What came of an engine; medians of the rounds.

    Attributes:
      first_token: seconds to read the prompts and make one token for each, in a warm process.
      overall: tokens per second, of all rows together.
      decode: the same after the first token; None if that took no time that could be measured.
      share_of_limit: of the steps per second that reading the weights from memory allows.
      same_tokens: share of the tokens that are the reference's, in each row up to where it first
        differs; None if the reference was not measured.
    """

    first_token: float
    overall: float
    decode: float | None
    share_of_limit: float | None
    same_tokens: float | None


def evaluate(measured: Measured, config: GPT2Config) -> dict[EngineName, EngineFigures]:
    """Works out the figures of every engine, all taken to read the memory that was measured."""
    load, figures = measured.load, {}
    for name, turns in measured.turns.items():
        first = statistics.median(turn.first for turn in turns)
        last = statistics.median(turn.last for turn in turns)
        steps = (load.new_tokens - 1) / (last - first) if last > first else None
        limit = best_bandwidth(turns)[1] / weight_bytes(config, precision(name))
        figures[name] = EngineFigures(
            first_token=first,
            overall=load.batch * load.new_tokens / last,
            decode=load.batch * steps if steps else None,
            share_of_limit=steps / limit if steps else None,
            same_tokens=_agreement(measured.tokens[name], measured.tokens.get(REFERENCE)),
        )
    return figures


def weight_bytes(config: GPT2Config, precision: str) -> float:
    """What a step of decoding must read of the weights; its caches come on top.

    All matrices are read, the output head among them, but not the tables of embeddings.
    """
    D, F = config.n_embd, config.mlp_width
    block = 4 * D * D + 2 * D * F
    return _BYTES[precision] * (config.n_layer * block + config.vocab_size * D)


def _agreement(tokens: Tokens, reference: Tokens | None) -> float | None:
    if reference is None:
        return None
    same_BT = np.array(tokens) == np.array(reference)
    return float(np.logical_and.accumulate(same_BT, axis=1).mean())
