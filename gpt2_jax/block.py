"""One transformer block: attention, then an MLP, each a branch off the residual stream.

    x = x + attention(ln_1(x))    positions exchange what they know
    x = x + mlp(ln_2(x))          each position works on what it has        x: [B, T, D]

Vaswani et al., 2017 (section 3.1) normalised after the addition. GPT-2 normalises what a branch
reads, and once more after the last block ("pre-norm", section 2.3 of its paper). The stream runs
straight through: the gradient has a path from the loss to every layer with nothing but additions
on it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.attention import CausalSelfAttention, Implementation, LayerCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.layers import LayerNorm, Linear


@jax.custom_jvp
def gelu_new(x: jax.Array) -> jax.Array:
    """GPT-2's nonlinearity, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    The tanh approximation of Hendrycks & Gimpel, 2016; `jax.nn.gelu` is the plain form.

    Args:
      x: any shape and float dtype.

    Returns:
      float32, shaped as x; computed in float32.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True)


@gelu_new.defjvp
def _gelu_new_derivative(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # (1 + tanh(u))/2 is the logistic function of 2u, s, and GELU is x s. Written with tanh, XLA
    # would find what equals the forward pass and keep its float32 values for the backward pass.
    # With e = exp(-|2u|), s(1 - s) is e / (1 + e)^2: nothing cancels, nothing overflows.
    [x], [tangent] = primals, tangents
    y = x.astype(jnp.float32)
    scale = (8 / jnp.pi) ** 0.5
    doubled = y * (scale + scale * 0.044715 * y * y)
    e = jnp.exp(-jnp.abs(doubled))
    s = jnp.where(doubled > 0, 1, e) / (1 + e)
    slope = s + e / (1 + e) ** 2 * y * (scale + scale * 3 * 0.044715 * y * y)
    return gelu_new(x), slope * tangent.astype(jnp.float32)


# Named as Hugging Face names them, float32 whatever they are given.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # The backward pass is left x alone, in the dtype it has, not what was made of it on the way.
    "gelu_new": jax.checkpoint(gelu_new),
    "gelu_pytorch_tanh": jax.checkpoint(gelu_new),
    "gelu": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False),
    "relu": lambda x: jax.nn.relu(x.astype(jnp.float32)),
    "silu": lambda x: jax.nn.silu(x.astype(jnp.float32)),
    "tanh": lambda x: jnp.tanh(x.astype(jnp.float32)),
}


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between: each position thinks by itself.

    gelu(x W_1 + b_1) W_2 + b_2 with W_1 [D, F], W_2 [F, D] and, as a rule, F = 4 D: Vaswani et al.,
    2017, section 3.3, with GPT-1's GELU for the ReLU. Two thirds of a block's weights are here,
    8 D^2 of 12 D^2.
    """

    config: GPT2Config
    dtype: DTypeLike
    lora_dropout: float = 0.0

    def setup(self) -> None:
        """Declares the submodules."""
        config, dropout = self.config, self.lora_dropout
        stddev = config.initializer_range
        last_stddev = stddev / (2 * config.n_layer) ** 0.5
        self.c_fc = Linear(config.mlp_width, stddev, self.dtype, dropout)
        self.c_proj = Linear(config.n_embd, last_stddev, self.dtype, dropout)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def __call__(self, x_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps [B, T, D] to the branch's output [B, T, D]."""
        hidden_BTF = self.c_fc(x_BTD, deterministic=deterministic)
        hidden_BTF = ACTIVATIONS[self.config.activation_function](hidden_BTF)
        self.sow("intermediates", "activation", hidden_BTF)
        y_BTD = self.c_proj(hidden_BTF, deterministic=deterministic)
        return self.dropout(y_BTD, deterministic=deterministic)


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    config: GPT2Config
    dtype: DTypeLike
    implementation: Implementation | None = None
    lora_dropout: float = 0.0

    def setup(self) -> None:
        """Declares the submodules."""
        config, dtype, dropout = self.config, self.dtype, self.lora_dropout
        self.ln_1 = LayerNorm(config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, dtype, self.implementation, dropout)
        self.ln_2 = LayerNorm(config.layer_norm_epsilon)
        self.mlp = MLP(config, dtype, dropout)

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: LayerCache | None = None,
        start_B: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Arguments and results as for `CausalSelfAttention`."""
        branch_BTD, cache = self.attn(
            self.ln_1(x_BTD), cache, start_B, mask_BTS, deterministic=deterministic
        )
        x_BTD = x_BTD + branch_BTD
        self.sow("intermediates", "middle", x_BTD)
        x_BTD = x_BTD + self.mlp(self.ln_2(x_BTD), deterministic=deterministic)
        return x_BTD, cache
