"""Sampling rules: pure functions from float32 logits to logits, and the draw of a token.

The rules come in Hugging Face's order: repetition penalty, temperature, top-k, top-p, min-p. A
token that a rule excludes gets -inf. None of them sorts: on a CPU, sorting GPT-2's vocabulary takes
longer than the model's own step, and a search by bisection only sums over it a few times.

Shapes: B batch, V vocabulary, cut for the draw into N blocks of M tokens.
"""

import dataclasses
import math
from numbers import Integral, Real

import jax
import jax.numpy as jnp

from gpt2_jax.errors import UserError
from gpt2_jax.generation.threshold import find_threshold

FLOAT32 = jnp.finfo(jnp.float32)
GREEDY_BELOW = 1e-30
"""Temperatures that nothing but the largest logit survives: two that differ, though it be in their
last digit, are 1e20 apart after the division."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; a static argument of compiled functions.

    Raises:
      UserError: if a value is out of its range.
    """

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token, after the repetition penalty alone"""
    top_k: int | None = None
    """keep only this many of the likeliest tokens; None keeps all"""
    top_p: float | None = None
    """keep the likeliest tokens that together reach this probability; None keeps all"""
    min_p: float | None = None
    """keep the tokens at least this many times as likely as the likeliest; None keeps all"""
    repetition_penalty: float = 1.0
    """above 1, makes tokens less likely that the row holds already, the prompt's included"""

    def __post_init__(self) -> None:
        if not (_is_real(self.temperature) and 0 <= self.temperature <= FLOAT32.max):
            raise UserError(
                f"temperature={self.temperature!r} must be a finite number, not negative; "
                f"0 takes the likeliest token"
            )
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 1):
            raise UserError(
                f"top_k={self.top_k!r} must be a whole number of at least 1; "
                f"leave it out to keep all"
            )
        if self.top_p is not None and not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(
                f"top_p={self.top_p!r} must be a number in (0, 1]; leave it out to keep all"
            )
        if self.min_p is not None and not (_is_real(self.min_p) and 0 <= self.min_p <= 1):
            raise UserError(
                f"min_p={self.min_p!r} must be a number in [0, 1]; leave it out to keep all"
            )
        penalty = self.repetition_penalty
        if not (_is_real(penalty) and FLOAT32.tiny <= penalty <= FLOAT32.max):
            raise UserError(
                f"repetition_penalty={penalty!r} must be a finite number above 0; 1 turns it off"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is random."""
        return self.temperature < GREEDY_BELOW

    @property
    def needs_seen(self) -> bool:
        """Whether the rules ask which tokens a row holds already."""
        return self.repetition_penalty != 1


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


GREEDY = Sampling(temperature=0.0)


def choose(
    logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None
) -> jax.Array:
    """Chooses one token a row, each with its own key, so that rows don't depend on each other.

    Args:
      logits_BV: float32.
      keys_B: a random key for each row; greedy sampling ignores them.
      sampling: the rules.
      seen_BV: bool, the tokens that each row holds already; needed if `sampling.needs_seen`.

    Returns:
      Token ids, int32 [B].
    """
    logits_BV = apply_rules(logits_BV, sampling, seen_BV)
    return likeliest(logits_BV) if sampling.greedy else draw(logits_BV, keys_B)


def apply_rules(
    logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None
) -> jax.Array:
    """The logits that `choose` takes its token from.

    Raises:
      ValueError: if the rules need `seen_BV` and it is missing.
    """
    if sampling.needs_seen:
        if seen_BV is None:
            raise ValueError("a repetition penalty needs seen_BV")
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.greedy:
        return logits_BV
    logits_BV = apply_temperature(logits_BV, sampling.temperature)
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return logits_BV


def penalize_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """CTRL's penalty (Keskar et al., 2019, sec. 4.1): seen tokens get l / penalty.

    As in Hugging Face's, a negative logit is multiplied instead, so that it falls as well.
    """
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, _divide(logits_BV, penalty))
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def apply_temperature(logits_BV: jax.Array, temperature: float) -> jax.Array:
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it."""
    return _divide(logits_BV, temperature)


def _divide(x_BV: jax.Array, divisor: float) -> jax.Array:
    """The quotient, rounded as Hugging Face's is.

    XLA multiplies by the inverse of a constant, which at GPT-2's logits of about -100 changes
    probabilities by up to 4e-6; so the divisor is made to look like none.
    """
    return x_BV / jnp.where(jnp.isnan(x_BV), jnp.nan, divisor)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest logits; those equal to the k-th stay too."""
    V = logits_BV.shape[-1]
    if k >= V:
        return logits_BV

    def left(value_B: jax.Array) -> jax.Array:
        """How many more tokens may go, if all up to a value go."""
        gone_BV = logits_BV <= value_B[:, None]
        # float32 counts exactly to 2^24, and twice as fast as integers do.
        return (V - k) - jnp.sum(gone_BV, axis=-1, dtype=jnp.float32)

    below_all_B = jnp.minimum(2 * jnp.min(logits_BV, axis=-1), -1.0)
    largest_B = jnp.max(logits_BV, axis=-1)
    threshold = find_threshold(left, below_all_B, largest_B, least=lambda _: 1.0)
    return jnp.where(logits_BV > threshold.low_B[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Nucleus sampling (Holtzman et al., 2020).

    The least likely tokens go, as many as have a probability of at most 1 - p together, but never
    all. Where some of several equally likely tokens must go, those of lower id do; Hugging Face
    leaves that to a sort that isn't stable.
    """
    if p >= 1:
        return logits_BV
    probability_BV = jax.nn.softmax(logits_BV, axis=-1)

    def left(value_B: jax.Array) -> jax.Array:
        """How much more probability may go, if all up to a value goes."""
        gone_BV = probability_BV <= value_B[:, None]
        return (1 - p) - jnp.sum(probability_BV, axis=-1, where=gone_BV)

    # V tokens of (1 - p) / V may all go; half of that is far from any rounding.
    low_B = jnp.full(len(logits_BV), 0.5 * (1 - p) / logits_BV.shape[-1], jnp.float32)
    high_B = jnp.max(probability_BV, axis=-1)
    threshold = find_threshold(left, low_B, high_B, least=lambda low_B: low_B)
    low_B1, high_B1, left_B1 = (x_B[:, None] for x_B in threshold)

    def all_up_to_low() -> jax.Array:
        return probability_BV <= low_B1

    def some_equals_too() -> jax.Array:
        equal_BV = (low_B1 < probability_BV) & (probability_BV <= high_B1)
        rank_BV = jnp.cumsum(equal_BV, axis=-1, dtype=jnp.int32)
        fits_BV = (rank_BV * high_B1 <= left_B1) & (rank_BV < rank_BV[:, -1:])
        return all_up_to_low() | (equal_BV & fits_BV)

    gone_BV = jax.lax.cond(jnp.any(left_B1 >= high_B1), some_equals_too, all_up_to_low)
    return jnp.where(gone_BV, -jnp.inf, logits_BV)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the tokens at least p times as likely as the likeliest (Nguyen et al., 2024)."""
    ratio_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    return jnp.where(ratio_BV < p, -jnp.inf, logits_BV)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The token of the largest logit; of equals, the first.

    The same as jnp.argmax, in a fifth of its time on a CPU.

    Returns:
      Token ids, int32 [B].
    """
    ids_1V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)[None]
    is_largest_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest_BV, ids_1V, ids_1V.size - 1), axis=-1)


def draw(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws one token a row with probabilities softmax(logits), each row with its own key.

    First a block of tokens is drawn, then a token within it, P(token) = P(block) P(token | block):
    that takes about 2 sqrt(V) random numbers, where drawing among all tokens takes V.

    Returns:
      Token ids, int32 [B].
    """
    B, V = logits_BV.shape
    M = math.isqrt(V - 1) + 1
    # Around the largest, where the choice is, logits near zero round least.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, -V % M)), constant_values=-jnp.inf)

    def draw_row(logits_NM: jax.Array, key: jax.Array) -> jax.Array:
        block_key, token_key = jax.random.split(key)
        block = jax.random.categorical(block_key, jax.nn.logsumexp(logits_NM, axis=-1))
        return block * M + jax.random.categorical(token_key, logits_NM[block])

    return jax.vmap(draw_row)(logits_BV.reshape(B, -1, M), keys_B).astype(jnp.int32)
