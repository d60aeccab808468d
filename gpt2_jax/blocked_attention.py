"""Causal attention by blocks of positions, for CPUs: the plain form's results, less work.

Queries of a block meet only the keys up to the block's end, so about half of the scores are never
computed; and none are kept for the backward pass, which computes them again (Dao et al., 2022,
"FlashAttention"). There they are needed by queries as well as by keys: computed a second time with
keys as rows they spare two products that sum over rows, which take CPUs several times as long.

Shapes as in `attention`: B batch, H heads, T queries, S keys, K head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.precision import einsum

BLOCK = 256
"""positions; a block's scores of all heads should fit the caches"""

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class _Queries(NamedTuple):
    """What the backward pass knows of each query."""

    q_BHTK: jax.Array
    dy_BHTK: jax.Array
    """gradient of the result"""
    log_sum_BHT: jax.Array
    """of the softmax: log of the sum of exp(scores)"""
    mean_BHT: jax.Array
    """of dP under P"""

    def part(self, start: int, end: int) -> "_Queries":
        """Those from `start` to `end`."""
        return _Queries(*(array[:, :, start:end] for array in self))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_attention(
    q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys up to each query, [B, H, T, K].

    Args:
      q_BHTK: queries.
      k_BHTK: keys.
      v_BHTK: values, what is read.
      dtype: compute dtype, and that of the result; see `gpt2_jax.precision`.
    """
    return _forward(q_BHTK, k_BHTK, v_BHTK, dtype)[0]


def _forward(
    q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, Residuals]:
    """The result; and with the arguments, what the backward pass needs of the softmax."""
    y, log_sums = [], []
    for start, end in _blocks(q_BHTK.shape[2]):
        scores_BHTS = _scores(q_BHTK[:, :, start:end], k_BHTK[:, :, :end], dtype)
        scores_BHTS = jnp.where(_visible(start, end, 0, end), scores_BHTS, -jnp.inf)
        top_BHT1 = jnp.max(scores_BHTS, axis=-1, keepdims=True)
        weights_BHTS = jnp.exp(scores_BHTS - top_BHT1)
        sum_BHT1 = jnp.sum(weights_BHTS, axis=-1, keepdims=True)
        mixed_BHTK = einsum("BHTS,BHSK->BHTK", weights_BHTS, v_BHTK[:, :, :end], dtype)
        y.append((mixed_BHTK / sum_BHT1).astype(dtype))
        log_sums.append((top_BHT1 + jnp.log(sum_BHT1))[..., 0])
    y_BHTK, log_sum_BHT = jnp.concatenate(y, axis=2), jnp.concatenate(log_sums, axis=2)
    return y_BHTK, (q_BHTK, k_BHTK, v_BHTK, y_BHTK, log_sum_BHT)


def _backward(
    dtype: DTypeLike, residuals: Residuals, dy_BHTK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v.

    With P = softmax(scores): dv = P^T dy; the scores' gradient is P (dP - mean of dP under P), of
    which dP = dy v^T, and that mean is y dy summed over K.
    """
    q_BHTK, k_BHTK, v_BHTK, y_BHTK, log_sum_BHT = residuals
    mean_BHT = jnp.sum(dy_BHTK.astype(jnp.float32) * y_BHTK.astype(jnp.float32), axis=-1)
    queries = _Queries(q_BHTK, dy_BHTK, log_sum_BHT, mean_BHT)
    T = q_BHTK.shape[2]
    dq, dk, dv = [], [], []
    for start, end in _blocks(T):
        k_BHSK, v_BHSK = k_BHTK[:, :, :end], v_BHTK[:, :, :end]
        visible_11TS = _visible(start, end, 0, end)
        dq.append(_query_gradient(queries.part(start, end), k_BHSK, v_BHSK, visible_11TS, dtype))
        k_BHSK, v_BHSK = k_BHTK[:, :, start:end], v_BHTK[:, :, start:end]
        visible_11TS = _visible(start, T, start, end)
        gradients = _key_gradients(queries.part(start, T), k_BHSK, v_BHSK, visible_11TS, dtype)
        dk.append(gradients[0])
        dv.append(gradients[1])
    dq_BHTK, dk_BHTK, dv_BHTK = (
        jnp.concatenate(parts, axis=2).astype(like.dtype)
        for parts, like in ((dq, q_BHTK), (dk, k_BHTK), (dv, v_BHTK))
    )
    return dq_BHTK, dk_BHTK, dv_BHTK


def _query_gradient(
    queries: _Queries,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    visible_11TS: jax.Array,
    dtype: DTypeLike,
) -> jax.Array:
    """Of a block of queries, with all keys that they see."""
    q_BHTK, dy_BHTK, log_sum_BHT, mean_BHT = queries
    weights_BHTS = jnp.exp(_scores(q_BHTK, k_BHSK, dtype) - log_sum_BHT[..., None])
    weights_BHTS = jnp.where(visible_11TS, weights_BHTS, 0.0)
    dp_BHTS = einsum("BHTK,BHSK->BHTS", dy_BHTK, v_BHSK, dtype)
    dscores_BHTS = weights_BHTS * (dp_BHTS - mean_BHT[..., None])
    return einsum("BHTS,BHSK->BHTK", dscores_BHTS, k_BHSK, dtype) * q_BHTK.shape[3] ** -0.5


def _key_gradients(
    queries: _Queries,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    visible_11TS: jax.Array,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Of a block of keys and their values, with all queries that see them; keys are rows here."""
    q_BHTK, dy_BHTK, log_sum_BHT, mean_BHT = queries
    weights_BHST = jnp.exp(_scores(k_BHSK, q_BHTK, dtype) - log_sum_BHT[:, :, None])
    weights_BHST = jnp.where(visible_11TS.swapaxes(-1, -2), weights_BHST, 0.0)
    dp_BHST = einsum("BHSK,BHTK->BHST", v_BHSK, dy_BHTK, dtype)
    dscores_BHST = weights_BHST * (dp_BHST - mean_BHT[:, :, None])
    dk_BHSK = einsum("BHST,BHTK->BHSK", dscores_BHST, q_BHTK, dtype) * q_BHTK.shape[3] ** -0.5
    return dk_BHSK, einsum("BHST,BHTK->BHSK", weights_BHST, dy_BHTK, dtype)


blocked_attention.defvjp(_forward, _backward)


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def _scores(x_BHTK: jax.Array, y_BHSK: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Products over sqrt(K): x y^T / sqrt(K), [B, H, T, S]."""
    scores_BHTS = einsum("BHTK,BHSK->BHTS", x_BHTK, y_BHSK, dtype)
    return scores_BHTS * x_BHTK.shape[3] ** -0.5


def _visible(start: int, end: int, first: int, last: int) -> jax.Array:
    """Whether queries start..end see keys first..last, bool [1, 1, T, S]."""
    query_T, key_S = jnp.arange(start, end), jnp.arange(first, last)
    return (key_S[None, :] <= query_T[:, None])[None, None]
