"""Causal self-attention and its key/value cache.

Every position asks a question (query), offers a label (key) and carries a message (value).
A position reads the messages of the positions up to its own, weighted by how well their keys
answer its query; H heads do this side by side, each in a space of width K = D / H.
Attention is the only place in the model where positions talk to each other.

GPT-2 has it as Vaswani et al., 2017, section 3.2, describe it:

    attention(q, k, v) = softmax(q k^T / sqrt(K)) v        3.2.1, formula (1)
        q [T, K], k [S, K], v [S, K] -> scores [T, S] -> [T, K]
    H of them, put together by a matrix                    3.2.2
    scores of later positions are -inf before the softmax  3.2.3

If the entries of q and k are independent with variance 1, their product has variance K. Dividing by
sqrt(K) brings it back to 1; otherwise softmax would saturate and pass hardly any gradient.

Shapes: B batch, T sequence, S keys, D width, H heads, K head width, N = B H heads of all rows.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.blocked_attention import blocked_attention
from gpt2_jax.config import GPT2Config
from gpt2_jax.layers import Linear
from gpt2_jax.precision import einsum

Implementation = Literal["plain", "blocked", "cudnn"]


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B H, S, K] each; slots not yet written hold zeros.

    Rows and heads share an axis: with an axis of its own for a single row, XLA:CPU copies the
    cache several times a step.
    """

    k_NSK: jax.Array
    v_NSK: jax.Array


class KVCache(NamedTuple):
    """What generation remembers of the tokens before: one `LayerCache` a layer.

    A position's keys and values do not depend on what comes later. Kept, they make a new token cost
    one position of work instead of all of them again, for 2 L D numbers of memory.
    `length_B` counts the positions already written in each row, so rows may differ in length.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array


class Branches(NamedTuple):
    """Several texts in one row that begin alike: the beginning, then what each goes on with."""

    position_BT: jax.Array
    """each token's position in its own text"""
    branch_BT: jax.Array
    """0 at the beginning they share, then one number for each text"""


def empty_cache(config: GPT2Config, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """Returns a cache for `batch` rows of up to `slots` positions, nothing written yet."""
    shape = (batch * config.n_head, slots, config.head_width)
    layers = tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)
    )
    return KVCache(layers, jnp.zeros(batch, jnp.int32))


def choose_implementation(platform: str, dtype: DTypeLike, head_width: int) -> Implementation:
    """Picks the attention to use.

    On a CPU that is `blocked_attention`; for 16 bits on a GPU cuDNN's flash attention, if the head
    width is a multiple of 8 up to 128; else the plain form.
    """
    sixteen_bit = jnp.dtype(dtype).itemsize == 2
    fits_cudnn = head_width % 8 == 0 and head_width <= 128
    if platform == "gpu" and sixteen_bit and fits_cudnn:
        return "cudnn"
    return "blocked" if platform == "cpu" else "plain"


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which position t sees positions 0..t.

    One matrix [D, 3D] makes q, k and v of all heads; another, [D, D], mixes what the heads have
    read. The matrices take 8 B T D^2 operations, scores and sums 4 B T^2 D, which is more once T
    is above 2 D.
    """

    config: GPT2Config
    dtype: DTypeLike
    implementation: Implementation | None = None
    lora_dropout: float = 0.0

    def setup(self) -> None:
        """Declares the submodules."""
        config, dropout = self.config, self.lora_dropout
        stddev = config.initializer_range
        # Each block adds two branches to the residual stream. With their last matrices divided by
        # the square root of their number, 2L, the sum's variance does not grow with depth (GPT-2
        # paper, section 2.3).
        last_stddev = stddev / (2 * config.n_layer) ** 0.5
        self.c_attn = Linear(3 * config.n_embd, stddev, self.dtype, dropout)
        self.c_proj = Linear(config.n_embd, last_stddev, self.dtype, dropout)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: LayerCache | None = None,
        start_B: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Mixes positions.

        Args:
          x_BTD: normalised residual stream.
          cache: earlier keys and values; None attends within x alone.
          start_B: position of x's first token in each row; needed with a cache.
          mask_BTS: without a cache, which keys each query sees; None is those up to its own.
          deterministic: False applies dropout (rng "dropout").

        Returns:
          The branch's output [B, T, D] and the cache with x's keys and values written.
        """
        B, T, D = x_BTD.shape
        heads = (B, T, self.config.n_head, self.config.head_width)
        # Heads before positions: each head's product is then one contiguous matrix product.
        qkv_BTF = self.c_attn(x_BTD, deterministic=deterministic)
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.reshape(heads).swapaxes(1, 2) for part_BTD in jnp.split(qkv_BTF, 3, axis=-1)
        )
        # Sown values are kept only when a caller asks for "intermediates", as parity/ does; scores
        # and probabilities are there with implementation="plain".
        for name, part_BHTK in (("q", q_BHTK), ("k", k_BHTK), ("v", v_BHTK)):
            self.sow("intermediates", name, part_BHTK)
        if cache is not None:
            assert start_B is not None
            cache = LayerCache(
                _write(cache.k_NSK, k_BHTK, start_B), _write(cache.v_NSK, v_BHTK, start_B)
            )
            q_NTK = q_BHTK.reshape(-1, *q_BHTK.shape[2:])
            mask_BTS = visible(start_B, T, cache.k_NSK.shape[1])
            mask_NTS = jnp.repeat(mask_BTS, self.config.n_head, axis=0)
            y_BHTK = self._plain("N", q_NTK, *cache, mask_NTS, deterministic).reshape(q_BHTK.shape)
        else:
            y_BHTK = self._attend(q_BHTK, k_BHTK, v_BHTK, mask_BTS, deterministic)
        y_BTD = y_BHTK.swapaxes(1, 2).reshape(B, T, D)
        self.sow("intermediates", "mixed", y_BTD)
        y_BTD = self.c_proj(y_BTD, deterministic=deterministic)
        return self.resid_dropout(y_BTD, deterministic=deterministic), cache

    def _attend(
        self,
        q_BHTK: jax.Array,
        k_BHTK: jax.Array,
        v_BHTK: jax.Array,
        mask_BTS: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Attention within x, by the implementation that was chosen: [B, H, T, K].

        A mask takes the plain form, as does dropout of probabilities, which it alone has.
        """
        if mask_BTS is not None:
            return self._plain("BH", q_BHTK, k_BHTK, v_BHTK, mask_BTS[:, None], deterministic)
        implementation = self.implementation or choose_implementation(
            jax.default_backend(), self.dtype, self.config.head_width
        )
        if implementation == "plain" or (self.config.attn_pdrop > 0 and not deterministic):
            T = q_BHTK.shape[2]
            mask_11TS = visible(jnp.zeros(1, jnp.int32), T, T)[:, None]
            return self._plain("BH", q_BHTK, k_BHTK, v_BHTK, mask_11TS, deterministic)
        if implementation == "cudnn":
            return _cudnn(q_BHTK, k_BHTK, v_BHTK)
        return blocked_attention(q_BHTK, k_BHTK, v_BHTK, self.dtype)

    def _plain(
        self,
        heads: str,
        q_hTK: jax.Array,
        k_hSK: jax.Array,
        v_hSK: jax.Array,
        mask_hTS: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """softmax(q k^T / sqrt(K)) v over the keys in the mask, for every head: [h, T, K].

        The heads h are those of every row, on two axes "BH" or one "N".
        """
        scores_hTS = einsum(f"{heads}TK,{heads}SK->{heads}TS", q_hTK, k_hSK, self.dtype)
        scores_hTS *= self.config.head_width**-0.5
        scores_hTS = jnp.where(mask_hTS, scores_hTS, -jnp.inf)
        self.sow("intermediates", "scores", scores_hTS)
        att_hTS = jax.nn.softmax(scores_hTS, axis=-1)
        self.sow("intermediates", "probabilities", att_hTS)
        att_hTS = self.attn_dropout(att_hTS, deterministic=deterministic)
        y_hTK = einsum(f"{heads}TS,{heads}SK->{heads}TK", att_hTS, v_hSK, self.dtype)
        return y_hTK.astype(self.dtype)


def visible(start_B: jax.Array, T: int, S: int) -> jax.Array:
    """Which of S keys each of T queries sees, bool [B, T, S]: those at or before its position."""
    query_position_BT = start_B[:, None] + jnp.arange(T)[None, :]
    return jnp.arange(S)[None, None, :] <= query_position_BT[:, :, None]


def visible_in_branches(branch_BT: jax.Array) -> jax.Array:
    """Which keys each query of `Branches` sees, bool [B, T, T].

    Those at or before its place that are of its own branch, or of the beginning.
    """
    place_T = jnp.arange(branch_BT.shape[1])
    before_1TT = (place_T[None, :] <= place_T[:, None])[None]
    key_B1T, query_BT1 = branch_BT[:, None, :], branch_BT[:, :, None]
    return before_1TT & ((key_B1T == 0) | (key_B1T == query_BT1))


def _cudnn(q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array) -> jax.Array:
    """The same by cuDNN's flash attention, which never holds the [T, T] scores in memory."""
    q_BTHK, k_BTHK, v_BTHK = (x_BHTK.swapaxes(1, 2) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
    y_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn"
    )
    return y_BTHK.swapaxes(1, 2)


def _write(cache_NSK: jax.Array, new_BHTK: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes T new positions into the slots from `start` on, each row at its own place."""

    def write_row(cache_HSK: jax.Array, new_HTK: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache_HSK, new_HTK, (0, start, 0))

    cache_BHSK = cache_NSK.reshape(*new_BHTK.shape[:2], *cache_NSK.shape[1:])
    return jax.vmap(write_row)(cache_BHSK, new_BHTK, start_B).reshape(cache_NSK.shape)
