"""Sampling rules: pure functions from logits to logits, applied in Hugging Face's order.

Temperature, then top-k, then top-p. A token that a rule excludes gets -inf.
Shapes: B batch, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from gpt2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
      UserError: if a value is out of its range.
    """

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token"""
    top_k: int | None = None
    """keep only this many of the likeliest tokens; None keeps all"""
    top_p: float | None = None
    """keep the likeliest tokens that together reach this probability; None keeps all"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature} must be finite and not negative; "
                f"0 takes the likeliest token"
            )
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise UserError(
                f"top_k={self.top_k} must be a whole number of at least 1; leave it out to keep all"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]; leave it out to keep all")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that nothing is random."""
        return self.temperature < float(jnp.finfo(jnp.float32).tiny)


GREEDY = Sampling(temperature=0.0)


def apply_rules(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Applies temperature, top-k and top-p to float32 logits; not for greedy sampling."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return logits_BV


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest logits; those equal to the k-th stay too."""
    kth_largest_B = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1]
    return jnp.where(logits_BV < kth_largest_B[:, None], -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Nucleus sampling (Holtzman et al., 2020).

    Keeps the smallest set of likeliest tokens whose probabilities sum to at least p, and always
    the likeliest.
    """
    if p >= 1:
        return logits_BV  # the running sum below may round to 1 before the last tokens
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    sorted_BV = jnp.where(before_BV < p, sorted_BV, -jnp.inf)
    return jnp.take_along_axis(sorted_BV, jnp.argsort(order_BV, axis=-1), axis=-1)


def choose(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token a row, each with its own key, so that rows don't depend on each other.

    Returns:
      Token ids, int32 [B].
    """
    if sampling.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # Largest at zero: a tiny temperature then sends the others to -inf, and nothing to nan.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = apply_rules(logits_BV, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
