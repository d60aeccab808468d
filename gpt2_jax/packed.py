"""Weights packed for generation: laid out, and rounded if asked, as decoding reads them fastest.

A decoding step reads every weight once and does little with it, so it takes the size of the
weights over the bandwidth of the memory. Packing stores each matrix with one contiguous row of
weights for each output:

    f32    4 bytes a weight, as trained
    bf16   2 bytes, rounded to 8 significant bits
    int8   1 byte, rounded to 255 levels, with one scale for each output

Only weights are rounded to int8, activations keep at least 15 bits. Biases, layer norms and
position embeddings stay float32. Layers take a matrix from the collection "packed" where they
find one there.

Shapes: B batch, T sequence, N rows, D inputs, F outputs.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.errors import UserError
from gpt2_jax.precision import einsum

# XLA:CPU makes slow code for a number of rows without small factors, such as 50,257.
VOCABULARY_MULTIPLE = 64

Precision = Literal["f32", "bf16", "int8"]


def compute_dtype(precision: Precision) -> DTypeLike:
    """What activations and the cache are kept in, by the precision of the weights.

    16 bits save a GPU memory and time. A CPU has to convert them back and forth.
    """
    return jnp.bfloat16 if precision == "bf16" and jax.default_backend() != "cpu" else jnp.float32


class PackedMatrix(NamedTuple):
    """A weight matrix by its outputs: float32, bfloat16, or int8 with a scale for each row."""

    weight_FD: jax.Array
    scale_F: jax.Array | None = None


class PackedParams(NamedTuple):
    """A model's parameters, packed: what `pack` returns and `apply` takes in place of `Params`."""

    params: dict[str, Any]
    """vectors and position embeddings, as they were"""
    packed: dict[str, Any]
    """a `PackedMatrix` for every matrix product, by the same names"""

    @property
    def precision(self) -> Precision:
        """Of the weights."""
        if not self.packed:
            return "f32"
        dtype = self.packed["wte"]["embedding"].weight_FD.dtype
        return {"float32": "f32", "bfloat16": "bf16", "int8": "int8"}[dtype.name]  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Size of all arrays, in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def pack(params: dict[str, Any], precision: Precision = "f32", *, rows: int = 1) -> PackedParams:
    """Packs a model's parameters.

    Args:
      params: the parameter tree, which is left as it is. What needs no packing is shared with it.
      precision: of the packed weights.
      rows: how many rows will be continued at once. Several float32 rows are fastest with the
        parameters as they are, one row on a CPU with each matrix transposed; either way is right.

    Returns:
      Parameters for `apply` and `generate`.

    Raises:
      UserError: if there is no such precision.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision={precision!r} must be one of {', '.join(get_args(Precision))}")
    if precision == "f32" and (rows > 1 or jax.default_backend() != "cpu"):
        return PackedParams(params, {})
    return _pack_tree(params, precision)


def _pack_tree(params: dict[str, Any], precision: Precision) -> PackedParams:
    kept: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name, child in params.items():
        if name == "kernel":
            packed[name] = _pack_matrix(child, precision, transposed=True)
        elif name == "embedding":
            packed[name] = _pack_matrix(child, precision, transposed=False)
        elif isinstance(child, dict) and name != "wpe":
            inner = _pack_tree(child, precision)
            kept |= {name: inner.params} if inner.params else {}
            packed |= {name: inner.packed} if inner.packed else {}
        else:
            kept[name] = child
    return PackedParams(kept, packed)


def _pack_matrix(weight: jax.Array, precision: Precision, *, transposed: bool) -> PackedMatrix:
    if precision == "f32" and not transposed:
        return PackedMatrix(jnp.asarray(weight, jnp.float32))
    return _rounded(weight, precision=precision, transposed=transposed)


@jax.jit(static_argnames=("precision", "transposed"))
def _rounded(weight: jax.Array, *, precision: Precision, transposed: bool) -> PackedMatrix:
    if transposed:
        weight_FD = weight.T
    else:
        weight_FD = jnp.pad(weight, ((0, -weight.shape[0] % VOCABULARY_MULTIPLE), (0, 0)))
    if precision != "int8":
        return PackedMatrix(weight_FD.astype(jnp.bfloat16 if precision == "bf16" else jnp.float32))
    largest_F = jnp.max(jnp.abs(weight_FD), axis=1)
    scale_F = jnp.where(largest_F > 0, largest_F / 127, 1.0)
    return PackedMatrix(jnp.round(weight_FD / scale_F[:, None]).astype(jnp.int8), scale_F)


def rows(matrix: PackedMatrix, indices: jax.Array) -> jax.Array:
    """Looks up rows in float32: indices of any shape [...] to [..., D]; NaN outside the matrix."""
    if matrix.weight_FD.dtype != jnp.float32:
        # Or XLA would convert the whole table, before the decode loop.
        matrix, indices = jax.lax.optimization_barrier((matrix, indices))
    take = functools.partial(jnp.take, axis=0, mode="fill")
    if matrix.scale_F is None:
        return take(matrix.weight_FD, indices, fill_value=jnp.nan).astype(jnp.float32)
    levels = take(matrix.weight_FD, indices, fill_value=0).astype(jnp.float32)
    return levels * take(matrix.scale_F, indices, fill_value=jnp.nan)[..., None]


def project(x_BTD: jax.Array, matrix: PackedMatrix, dtype: DTypeLike) -> jax.Array:
    """The product of x [B, T, D] with a packed matrix, float32 [B, T, F].

    Args:
      x_BTD: activations.
      matrix: F x D.
      dtype: compute dtype of weights that are not int8, as for `precision.einsum`.
    """
    B, T, D = x_BTD.shape
    if jax.default_backend() == "cpu" and B * T == 1 and _lanes(matrix.weight_FD) is not None:
        return _matvec(x_BTD.reshape(D), matrix)[None, None]
    if matrix.weight_FD.dtype == jnp.bfloat16:
        dtype = jnp.bfloat16
    if matrix.scale_F is None:
        return einsum("BTD,FD->BTF", x_BTD, matrix.weight_FD, dtype)
    if jax.default_backend() == "cpu":
        y_BTF = _product_int8(x_BTD, matrix.weight_FD)
    else:
        y_BTF = einsum("BTD,FD->BTF", x_BTD, matrix.weight_FD, dtype)
    return y_BTF * matrix.scale_F[None, None, :]


def _product_int8(x_BTD: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """The product by 8-bit arithmetic, with activations of 15 bits.

    Processors multiply bytes fastest, but eight bits are too few for GPT-2's activations, some of
    which are a hundred times larger than the rest. So each row of x is written as
    scale * (high + low / 254) with bytes high and low, and both are multiplied in one product,
    whose sums of whole numbers are exact.
    """
    scale_BT1 = jnp.max(jnp.abs(x_BTD), axis=-1, keepdims=True).astype(jnp.float32) / 127
    scaled_BTD = x_BTD / jnp.where(scale_BT1 > 0, scale_BT1, 1.0)
    high_BTD = jnp.round(scaled_BTD)
    low_BTD = jnp.round((scaled_BTD - high_BTD) * 254)
    bytes_2BTD = jnp.stack([high_BTD, low_BTD]).astype(jnp.int8)
    sums_2BTF = jax.lax.dot_general(
        bytes_2BTD, weight_FD, (((3,), (1,)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    return (sums_2BTF[0] + sums_2BTF[1] / 254) * scale_BT1


def _matvec(x_D: jax.Array, matrix: PackedMatrix) -> jax.Array:
    """The product with one row, float32 [F], at the speed of memory on a CPU.

    XLA:CPU has a fast product for float32 only; for other types it computes one multiplication at
    a time. Written as below, a sum over slices of the inputs, it fuses conversion, multiplication
    and addition into one loop over whole vector registers.
    """
    weight_FD = matrix.weight_FD
    lanes = _lanes(weight_FD)
    assert lanes is not None
    x_D = x_D.astype(jnp.float32)
    if weight_FD.dtype == jnp.bfloat16:  # rounded, as the product of several rows rounds them
        x_D = jax.lax.reduce_precision(x_D, exponent_bits=8, mantissa_bits=7)
    # Tied to x, the matrix is not converted in full and once, before the decode loop.
    x_D, weight_FD = jax.lax.optimization_barrier((x_D, weight_FD))
    sums_FL = sum(
        weight_FD[:, start : start + lanes].astype(jnp.float32) * x_D[None, start : start + lanes]
        for start in range(0, x_D.shape[0], lanes)
    )
    # The sum over the lanes must not move into that loop: it would leave it one lane at a time.
    sums_FL = jax.lax.optimization_barrier(sums_FL)
    y_F = sums_FL @ jnp.ones(lanes)
    return y_F if matrix.scale_F is None else y_F * matrix.scale_F


def _lanes(weight_FD: jax.Array) -> int | None:
    """Width of the slices for `_matvec`; None where another product is as fast, or nothing fits.

    XLA converts the whole matrix apart when there are too many slices: more than 12 of bfloat16,
    some 30 of int8.
    """
    most = {jnp.dtype(jnp.bfloat16): 12, jnp.dtype(jnp.int8): 25}.get(weight_FD.dtype)
    inputs = weight_FD.shape[1]
    if most is None:
        return None
    widths = (width for width in range(32, inputs + 1, 32) if inputs % width == 0)
    return next((width for width in widths if inputs // width <= most), None)
