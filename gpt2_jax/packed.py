"""Weights packed for generation: laid out, and rounded if asked, as decoding reads them fastest.

A decoding step reads every weight once and does little with it, so it takes the size of the
weights over the bandwidth of the memory. Packing makes them small and puts them in the order in
which the platform's fastest product reads them:

    f32    4 bytes a weight, as trained
    bf16   2 bytes, rounded to 8 significant bits
    int8   1 byte, rounded to 255 levels, with one scale for each output

Only weights are rounded to int8, activations keep some 15 bits. Biases, layer norms and
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
from gpt2_jax.packed_int8 import product_int8
from gpt2_jax.packed_words import PackedWords, matvec, to_words, unpack, unpack_after
from gpt2_jax.precision import einsum

# XLA:CPU makes slow code for a number of rows without small factors, such as 50,257.
VOCABULARY_MULTIPLE = 64

Precision = Literal["f32", "bf16", "int8"]

_Order = Literal["words", "outputs", "inputs"]


def compute_dtype(precision: Precision) -> DTypeLike:
    """What activations and the cache are kept in, by the precision of the weights.

    16 bits save a GPU memory and time. A CPU has to convert them back and forth.
    """
    return jnp.bfloat16 if precision == "bf16" and jax.default_backend() != "cpu" else jnp.float32


class PackedMatrix(NamedTuple):
    """A weight matrix by its outputs: float32, bfloat16, or int8 with a scale for each output."""

    weight_FD: jax.Array
    scale_F: jax.Array | None = None


class PackedByInputs(NamedTuple):
    """A float32 table by its inputs, as kernels are: fastest for several rows on a CPU."""

    weight_DF: jax.Array


Packed = PackedMatrix | PackedWords | PackedByInputs


class PackedParams(NamedTuple):
    """A model's parameters, packed: what `pack` returns and `apply` takes in place of `Params`."""

    params: dict[str, Any]
    """what needs no packing, as it was"""
    packed: dict[str, Any]
    """a `Packed` for each of the other matrices, by the same names"""

    @property
    def precision(self) -> Precision:
        """Of the weights."""
        if not self.packed:
            return "f32"
        names = {"float32": "f32", "bfloat16": "bf16", "uint32": "bf16", "int8": "int8"}
        # In any form of a matrix, the weights come first.
        return names[jax.tree.leaves(self.packed)[0].dtype.name]  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Size of all arrays, in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def pack(params: dict[str, Any], precision: Precision = "f32", *, rows: int = 1) -> PackedParams:
    """Packs a model's parameters.

    Args:
      params: the parameter tree, which is left as it is. What needs no packing is shared with it.
      precision: of the packed weights.
      rows: how many rows will be continued at once. The results are the same for any other
        number, but several rows with weights packed for one, or one with those for several, may
        take many times as long.

    Returns:
      Parameters for `apply` and `generate`.

    Raises:
      UserError: if there is no such precision.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision={precision!r} must be one of {', '.join(get_args(Precision))}")
    on_cpu = jax.default_backend() == "cpu"
    if precision == "f32" and not on_cpu:
        return PackedParams(params, {})
    order: _Order = "outputs"
    if on_cpu and rows == 1 and precision != "int8":
        order = "words"
    elif precision == "f32":
        order = "inputs"
    return _pack_tree(params, precision, order)


def _pack_tree(params: dict[str, Any], precision: Precision, order: _Order) -> PackedParams:
    kept: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    # Position embeddings are only looked up; so are tokens where the head is another table.
    as_they_are = {"wpe"}
    if order == "inputs" and "lm_head" in params:
        as_they_are.add("wte")
    for name, child in params.items():
        if name == "embedding" or (name == "kernel" and order != "inputs"):
            packed[name] = _pack_matrix(child, precision, order, is_kernel=name == "kernel")
        elif isinstance(child, dict) and name not in as_they_are:
            inner = _pack_tree(child, precision, order)
            kept |= {name: inner.params} if inner.params else {}
            packed |= {name: inner.packed} if inner.packed else {}
        else:
            kept[name] = child
    return PackedParams(kept, packed)


@jax.jit(static_argnames=("precision", "order", "is_kernel"))
def _pack_matrix(
    weight: jax.Array, precision: Precision, order: _Order, *, is_kernel: bool
) -> Packed:
    weight = weight.astype(jnp.float32)
    if is_kernel:
        weight_FD = weight.T
    else:
        weight_FD = jnp.pad(weight, ((0, -weight.shape[0] % VOCABULARY_MULTIPLE), (0, 0)))
    if order == "inputs":
        return PackedByInputs(weight_FD.T)
    if precision == "int8":
        largest_F = jnp.max(jnp.abs(weight_FD), axis=1)
        scale_F = jnp.where(largest_F > 0, largest_F / 127, 1.0)
        # int8 has no such number, and the largest does not show it on a CPU.
        scale_F = jnp.where(jnp.isnan(weight_FD).any(axis=1), jnp.nan, scale_F)
        return PackedMatrix(jnp.round(weight_FD / scale_F[:, None]).astype(jnp.int8), scale_F)
    weight_FD = weight_FD.astype(jnp.bfloat16 if precision == "bf16" else jnp.float32)
    return to_words(weight_FD) if order == "words" else PackedMatrix(weight_FD)


def rows(table: Packed, indices: jax.Array, width: int) -> jax.Array:
    """Looks up rows in float32: indices of any shape [...] to [..., width]; NaN outside."""
    (stored, *_) = table
    if stored.dtype != jnp.float32:
        # Or XLA would convert the whole table, before the decode loop.
        stored, indices = jax.lax.optimization_barrier((stored, indices))
    take = functools.partial(jnp.take, indices=indices, axis=0, mode="fill", fill_value=jnp.nan)
    if isinstance(table, PackedByInputs):
        return jnp.moveaxis(take(stored, axis=1), 0, -1)
    if isinstance(table, PackedWords):
        return unpack(take(stored, fill_value=table.not_a_number), width).astype(jnp.float32)
    if table.scale_F is None:
        return take(stored).astype(jnp.float32)
    return take(stored, fill_value=0).astype(jnp.float32) * take(table.scale_F)[..., None]


def project(x_BTD: jax.Array, matrix: Packed, dtype: DTypeLike) -> jax.Array:
    """The product of x [B, T, D] with a packed matrix, float32 [B, T, F].

    Args:
      x_BTD: activations.
      matrix: of D inputs and F outputs, packed for one row or several.
      dtype: compute dtype of weights that are not rounded, as for `precision.einsum`.
    """
    B, T, D = x_BTD.shape
    on_cpu = jax.default_backend() == "cpu"
    if isinstance(matrix, PackedByInputs):
        return einsum("BTD,DF->BTF", x_BTD, matrix.weight_DF, dtype)
    if isinstance(matrix, PackedWords):
        if B * T == 1:
            return matvec(x_BTD.reshape(D), matrix)[None, None]
        matrix = PackedMatrix(unpack_after(x_BTD, matrix, D))
    if matrix.scale_F is not None:
        if on_cpu:
            y_BTF = product_int8(x_BTD.reshape(-1, D), matrix.weight_FD).reshape(B, T, -1)
        else:
            y_BTF = einsum("BTD,FD->BTF", x_BTD, matrix.weight_FD, dtype)
        return y_BTF * matrix.scale_F[None, None, :]
    rounded = matrix.weight_FD.dtype == jnp.bfloat16
    if not (rounded and on_cpu):
        dtype = jnp.bfloat16 if rounded else dtype
        return einsum("BTD,FD->BTF", x_BTD, matrix.weight_FD, dtype)
    # A single row, or the matrix on the right, and XLA:CPU would convert the matrix or turn it
    # round, once in full before the decode loop.
    twice_BTD = jnp.concatenate([x_BTD, x_BTD]) if B * T == 1 else x_BTD
    y_FBT = einsum("FD,BTD->FBT", matrix.weight_FD, twice_BTD, jnp.bfloat16)
    return jnp.moveaxis(y_FBT[:, :B], 0, 2)
