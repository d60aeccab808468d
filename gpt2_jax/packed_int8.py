"""The product of activations with int8 weights in whole numbers, on a CPU.

Eight bits are too few for GPT-2's activations, some of which are a hundred times larger than the
rest. A few rows are written in 16 bits: products of such numbers, summed in pairs, are what vector
units do fastest (`vpmaddwd`), and LLVM makes that of a plain sum over the inputs, if XLA leaves the
sum whole, see `generation.engine.compiled`. Many rows are written in two bytes each, for XLA's own
product of bytes.

Shapes: N rows, D inputs, F outputs; H halves of d inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.precision import einsum

# With more, the product of bytes is faster.
FEW_ROWS = 8


class Levels(NamedTuple):
    """Activations as int16 multiples of a step for each row."""

    level_ND: jax.Array
    step_N1: jax.Array


def product_int8(x_ND: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """The product of float x with int8 weights, float32 [N, F]; only x is rounded, to 15 bits."""
    x_ND = x_ND.astype(jnp.float32)
    few = x_ND.shape[0] <= FEW_ROWS
    return _product_of_few(x_ND, weight_FD) if few else _product_of_bytes(x_ND, weight_FD)


def _product_of_few(x_ND: jax.Array, weight_FD: jax.Array) -> jax.Array:
    level_ND, step_N1 = in_levels(x_ND)
    # Tied to x, the matrix is not converted in full and once, before the decode loop.
    level_ND, weight_FD = jax.lax.optimization_barrier((level_ND, weight_FD))
    (N, D), F = level_ND.shape, weight_FD.shape[0]
    halves = 2 if D % 2 == 0 else 1
    level_1NHd = level_ND.reshape(1, N, halves, -1).astype(jnp.int32)
    weight_F1Hd = weight_FD.reshape(F, 1, halves, -1).astype(jnp.int32)
    sums_FNH = jnp.sum(weight_F1Hd * level_1NHd, axis=3).astype(jnp.float32)
    # A product ends what XLA:CPU fuses, or it would compute the sums again for each use of them.
    y_FN = einsum("FNH,HX->FNX", sums_FNH, jnp.ones((halves, 1)), jnp.float32)[..., 0]
    return y_FN.T * step_N1


def in_levels(x_ND: jax.Array) -> Levels:
    """Rounds to 32,767 levels up to the largest, or to fewer if a sum of 32 bits needs that.

    Such a sum holds any weights times x while 127 (|level_1| + ... + |level_D|) < 2^31. That
    asks for larger steps only where most of more than 500 inputs are as large as the largest.
    """
    D = x_ND.shape[1]
    size_ND = jnp.abs(x_ND)
    by_largest_N1 = jnp.max(size_ND, axis=1, keepdims=True) / 32767
    # Rounding adds half a level to each input at most.
    by_sum_N1 = jnp.sum(size_ND, axis=1, keepdims=True) * (127 / (2**31 - 128 * D))
    step_N1 = jnp.maximum(by_largest_N1, by_sum_N1)

    def divide() -> jax.Array:
        return jnp.round(x_ND / jnp.where(step_N1 > 0, step_N1, 1.0)).astype(jnp.int16)

    # XLA:CPU never fuses a conditional with what comes after it; it would compute these
    # levels again for every output.
    any_steps = jnp.any(step_N1 > 0)
    return Levels(
        jax.lax.cond(any_steps, divide, lambda: jnp.zeros(x_ND.shape, jnp.int16)), step_N1
    )


def _product_of_bytes(x_ND: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """Each row of x is written as step * (high + low / 254), and both are multiplied at once."""
    step_N1 = jnp.max(jnp.abs(x_ND), axis=-1, keepdims=True) / 127
    scaled_ND = x_ND / jnp.where(step_N1 > 0, step_N1, 1.0)
    high_ND = jnp.round(scaled_ND)
    low_ND = jnp.round((scaled_ND - high_ND) * 254)
    bytes_2ND = jnp.stack([high_ND, low_ND]).astype(jnp.int8)
    sums_2NF = jax.lax.dot_general(
        bytes_2ND, weight_FD, (((2,), (1,)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    return (sums_2NF[0] + sums_2NF[1] / 254) * step_N1
