"""The two layers that hold matrices: `Linear` and `Embedding`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.precision import einsum


class Linear(nn.Module):
    """y = x W + b, with W stored (in, out): Hugging Face's `Conv1D`, Flax's `Dense`."""

    features: int
    stddev: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, in] to [B, T, features] in the compute dtype."""
        shape = (x_BTD.shape[-1], self.features)
        kernel_DF = self.param("kernel", nn.initializers.normal(self.stddev), shape)
        bias_F = self.param("bias", nn.initializers.zeros, (self.features,))
        y_BTF = einsum("BTD,DF->BTF", x_BTD, kernel_DF, self.dtype)
        return (y_BTF + bias_F[None, None, :]).astype(self.dtype)


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
        self.embedding = self.param("embedding", self._initial_table)

    def _initial_table(self, key: jax.Array) -> jax.Array:
        table_VD = self.stddev * jax.random.normal(key, (self.rows, self.features))
        padding = (self.padded_rows or self.rows) - self.rows
        return jnp.pad(table_VD, ((0, padding), (0, 0)))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """Looks up rows: indices of any shape [...] to float32 [..., D]; NaN outside the table."""
        return jnp.take(self.embedding, indices, axis=0, mode="fill", fill_value=jnp.nan)

    def first_rows(self, count: int) -> jax.Array:
        """The first rows [count, D]: a slice, whose gradient is no scatter."""
        return self.embedding[:count]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scores every row against x [B, T, D]: float32 [B, T, rows], padding dropped."""
        return einsum("BTD,VD->BTV", x_BTD, self.embedding, self.dtype)[..., : self.rows]
