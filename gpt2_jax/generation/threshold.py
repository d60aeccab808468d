"""The search for a rule's threshold: which tokens stay is found without sorting them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# low and high, as integers; what is left at each
_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Threshold(NamedTuple):
    """The float32 interval (low, high] that holds the least value to stay."""

    low_B: jax.Array
    high_B: jax.Array
    left_B: jax.Array
    """what is left at low"""


def find_threshold(
    left: Callable[[jax.Array], jax.Array],
    low_B: jax.Array,
    high_B: jax.Array,
    least: Callable[[jax.Array], jax.Array | float],
) -> Threshold:
    """Narrows (low, high] until it holds one token of each row, or several of equal value.

    By bisection of the bits: read as integers, they have the order of the float32 numbers, so that
    32 steps always suffice; half of that usually does.

    Args:
      left: how much more may go, if every token up to a value goes; it falls as the value rises.
      low_B: where that is not negative.
      high_B: where it is, or is taken to be, so that something stays; not below `low_B`.
      least: how much a token above a value takes of that, at least.
    """

    def halve(state: _State) -> _State:
        low_B, high_B, left_low_B, left_high_B = state
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, without overflow
        left_B = left(_to_float(middle_B))
        too_high_B = left_B < 0
        return (
            jnp.where(too_high_B, low_B, middle_B),
            jnp.where(too_high_B, middle_B, high_B),
            jnp.where(too_high_B, left_low_B, left_B),
            jnp.where(too_high_B, left_B, left_high_B),
        )

    def going(state: _State) -> jax.Array:
        low_B, high_B, left_low_B, left_high_B = state
        holds_several_B = left_low_B - left_high_B >= 2 * least(_to_float(low_B))
        return jnp.any((low_B + 1 < high_B) & holds_several_B)

    state = _to_order(low_B), _to_order(high_B), left(low_B), left(high_B)
    low_B, high_B, left_B, _ = jax.lax.while_loop(going, halve, state)
    return Threshold(_to_float(low_B), _to_float(high_B), left_B)


def _to_order(x_B: jax.Array) -> jax.Array:
    """Integers that have the order of the float32 numbers."""
    return _turn_negatives(jax.lax.bitcast_convert_type(x_B, jnp.int32))


def _to_float(order_B: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_turn_negatives(order_B), jnp.float32)


def _turn_negatives(bits_B: jax.Array) -> jax.Array:
    """The bits of negative numbers have the opposite order; turned twice, they are as before."""
    return bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)
