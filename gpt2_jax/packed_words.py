"""Weights in words of 32 bits, for the product with one row at the speed of memory on a CPU.

XLA:CPU multiplies one row with a float32 matrix on a single thread, and with a bfloat16 matrix one
number at a time. In words, which are as wide as the numbers that compute, a vector of weights is
loaded whole and taken apart by one or two instructions: a word is 1 float32 or 2 bfloat16 weights.

A row of D inputs is cut into equal parts, and word w holds the weights w of all parts, the first
part's in the lowest bits. So what the words hold is taken apart part by part, and every part
meets inputs that lie side by side.

Shapes: F outputs, D inputs, P parts (weights in a word), W words in a row, L lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.precision import einsum

# Fewer lanes than two vector registers, or more products in a sum, and LLVM's code is slow.
LANES = 32
MOST_PRODUCTS = 64


class PackedWords(NamedTuple):
    """A weight matrix by its outputs, in words: float32, or uint32 of two bfloat16 each."""

    words_FW: jax.Array

    @property
    def parts(self) -> int:
        """Weights in a word."""
        return _parts(self.words_FW)

    @property
    def not_a_number(self) -> float | int:
        """The word of which every weight is none."""
        return 0x7FC07FC0 if self.parts == 2 else jnp.nan


def to_words(weight_FD: jax.Array) -> PackedWords:
    """Joins weights, float32 or bfloat16; rows are filled up with zeros."""
    parts = 4 // weight_FD.dtype.itemsize
    F, D = weight_FD.shape
    lanes = _lanes(-(-D // parts), parts)
    weight_FD = jnp.pad(weight_FD, ((0, 0), (0, -D % (parts * lanes))))
    if parts == 1:
        return PackedWords(weight_FD)
    weight_FWP = weight_FD.reshape(F, parts, -1).swapaxes(1, 2)
    return PackedWords(jax.lax.bitcast_convert_type(weight_FWP, jnp.uint32))


def unpack(words_xW: jax.Array, inputs: int) -> jax.Array:
    """The weights [..., D] that rows of words hold."""
    if _parts(words_xW) == 1:
        return words_xW[..., :inputs]
    parts = [part_xW.astype(jnp.bfloat16) for part_xW in _split(words_xW)]
    return jnp.concatenate(parts, axis=-1)[..., :inputs]


def unpack_after(x: jax.Array, matrix: PackedWords, inputs: int) -> jax.Array:
    """`unpack` for a matrix that is about to be multiplied with x.

    XLA:CPU would unpack a whole model at once, in fresh memory, so the words are made to depend
    on x: a bit is set where x is more than infinite, which is never.
    """
    words_FW = matrix.words_FW
    if matrix.parts == 2:
        words_FW |= (x[(0,) * x.ndim] > jnp.inf).astype(words_FW.dtype)
    return unpack(words_FW, inputs)


def matvec(x_D: jax.Array, matrix: PackedWords) -> jax.Array:
    """The product with one row, float32 [F].

    Written as a sum over slices, it is fused into one loop on all threads that loads vectors of
    words, converts, multiplies and adds.
    """
    words_FW, parts = matrix.words_FW, matrix.parts
    W = words_FW.shape[1]
    lanes = _lanes(W, parts)
    x_PW = jnp.pad(x_D.astype(jnp.float32), (0, parts * W - x_D.shape[0])).reshape(parts, W)
    if parts == 2:  # rounded, as the product of several rows rounds them
        x_PW = jax.lax.reduce_precision(x_PW, exponent_bits=8, mantissa_bits=7)
    # Tied to x, the matrix is not converted in full and once, before the decode loop.
    x_PW, words_FW = jax.lax.optimization_barrier((x_PW, words_FW))
    products_FL = [
        weight_FL * x_PW[part, None, start : start + lanes]
        for start in range(0, W, lanes)
        for part, weight_FL in enumerate(_split(words_FW[:, start : start + lanes]))
    ]
    # Two sums by turns, since an addition has to wait for the one before it.
    sums_FL = sum(products_FL[2::2], products_FL[0]) + sum(products_FL[1::2])
    # The sum over the lanes must not move into that loop: it would leave it one lane at a time.
    sums_FL = jax.lax.optimization_barrier(sums_FL)
    return einsum("FL,LN->FN", sums_FL, jnp.ones((lanes, 1)), jnp.float32)[:, 0]


def _split(words: jax.Array) -> list[jax.Array]:
    """The parts of the words, float32 each."""
    if _parts(words) == 1:
        return [words]
    # bfloat16 is the upper half of a float32
    halves = words << 16, words & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]


def _parts(words: jax.Array) -> int:
    return 2 if words.dtype == jnp.uint32 else 1


def _lanes(words: int, parts: int) -> int:
    """The width of the slices that the words of a row are read in."""
    lanes = LANES
    while -(-words // lanes) * parts > MOST_PRODUCTS:
        lanes *= 2
    return lanes
