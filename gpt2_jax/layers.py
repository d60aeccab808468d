"""The layers that hold parameters: `Linear`, `LayerNorm` and `Embedding`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.packed import Packed, PackedMatrix, project, rows
from gpt2_jax.precision import einsum


class Linear(nn.Module):
    """y = x W + b, with W stored (in, out): Hugging Face's `Conv1D`, Flax's `Dense`.

    An adapter in the collection "lora" adds x A B, see `gpt2_jax.lora`.
    """

    features: int
    stddev: float
    dtype: DTypeLike
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps [B, T, in] to [B, T, features] in the compute dtype.

        Unless `deterministic`, A sees x through dropout (rng "dropout").
        """
        if self.has_variable("packed", "kernel"):
            y_BTF = project(x_BTD, self.get_variable("packed", "kernel"), self.dtype)
        else:
            shape = (x_BTD.shape[-1], self.features)
            kernel_DF = self.param("kernel", nn.initializers.normal(self.stddev), shape)
            y_BTF = einsum("BTD,DF->BTF", x_BTD, kernel_DF, self.dtype)
        if self.has_variable("lora", "lora_a"):
            a_DR: jax.Array = self.get_variable("lora", "lora_a")
            b_RF: jax.Array = self.get_variable("lora", "lora_b")
            x_BTD = nn.Dropout(self.lora_dropout)(x_BTD, deterministic=deterministic)
            narrow_BTR = einsum("BTD,DR->BTR", x_BTD, a_DR, self.dtype)
            y_BTF = y_BTF + einsum("BTR,RF->BTF", narrow_BTR, b_RF, self.dtype)
        bias_F = self.param("bias", nn.initializers.zeros, (self.features,))
        return (y_BTF + bias_F[None, None, :]).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the width (Ba et al., 2016).

    Computed in float32 by this very formula, deviations first: rounding then goes as in
    PyTorch, and a mean far from zero costs no precision.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalises every position: float32 [B, T, D] to float32 [B, T, D]."""
        scale_D = self.param("scale", nn.initializers.ones, x_BTD.shape[-1:])
        bias_D = self.param("bias", nn.initializers.zeros, x_BTD.shape[-1:])
        deviation_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
        variance_BT1 = jnp.mean(jnp.square(deviation_BTD), axis=-1, keepdims=True)
        y_BTD = deviation_BTD / jnp.sqrt(variance_BT1 + self.epsilon)
        return y_BTD * scale_D[None, None, :] + bias_D[None, None, :]


class Embedding(nn.Module):
    """A table with one row for each token (or position), read by index or as an output head.

    Rows past `rows` pad the table to `padded_rows`: they start at zero, get no gradient and
    are never returned.
    """

    rows: int
    features: int
    stddev: float
    dtype: DTypeLike
    padded_rows: int | None = None

    def setup(self) -> None:
        """Declares the table."""
        if not self.has_variable("packed", "embedding"):
            self.embedding = self.param("embedding", self._initial_table)

    @property
    def table(self) -> Packed:
        """The table, packed or not."""
        if self.has_variable("packed", "embedding"):
            return self.get_variable("packed", "embedding")
        return PackedMatrix(self.embedding)

    def _initial_table(self, key: jax.Array) -> jax.Array:
        table_VD = self.stddev * jax.random.normal(key, (self.rows, self.features))
        padding = (self.padded_rows or self.rows) - self.rows
        return jnp.pad(table_VD, ((0, padding), (0, 0)))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """Looks up rows: indices of any shape [...] to float32 [..., D]; NaN outside the table."""
        inside = (indices >= 0) & (indices < self.rows)
        # Neither the padding nor, counted from the end, the last rows may answer.
        indices = jnp.where(inside, indices.astype(jnp.int32), jnp.iinfo(jnp.int32).max)
        return rows(self.table, indices, self.features)

    def first_rows(self, count: int) -> jax.Array:
        """The first rows [count, D]: a slice, whose gradient is no scatter."""
        return self.embedding[:count]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scores every row against x [B, T, D]: float32 [B, T, rows], padding dropped."""
        return project(x_BTD, self.table, self.dtype)[..., : self.rows]
