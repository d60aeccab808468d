"""Causal attention by blocks of queries, for CPUs: the plain form's results, less work.

Queries of a block meet only the keys up to the block's end, so about half of the scores are never
computed; and none are kept for the backward pass, which computes them again (Dao et al., 2022,
"FlashAttention").

Shapes: B batch, H heads, N = B H heads of all rows, T queries, S keys, K head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.precision import einsum

# Queries in a block, as was fastest: a block's scores of all heads should fit the caches.
FORWARD_BLOCK = 256
BACKWARD_BLOCK = 128

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


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
    # With an axis of their own for rows, XLA:CPU would make of 16-bit products float32 ones.
    q_NTK, k_NTK, v_NTK = (x.reshape(-1, *x.shape[2:]) for x in (q_BHTK, k_BHTK, v_BHTK))
    return _blocked_attention(q_NTK, k_NTK, v_NTK, dtype).reshape(q_BHTK.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_attention(
    q_NTK: jax.Array, k_NTK: jax.Array, v_NTK: jax.Array, dtype: DTypeLike
) -> jax.Array:
    return _forward(q_NTK, k_NTK, v_NTK, dtype)[0]


def _forward(
    q_NTK: jax.Array, k_NTK: jax.Array, v_NTK: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, Residuals]:
    """The result; and with the arguments, what the backward pass needs of the softmax."""
    y, log_sums = [], []
    for start, end in _blocks(q_NTK.shape[1], FORWARD_BLOCK):
        scores_NTS = _scores(q_NTK[:, start:end], k_NTK[:, :end], dtype)
        scores_NTS = jnp.where(_visible(start, end), scores_NTS, -jnp.inf)
        top_NT1 = jnp.max(scores_NTS, axis=-1, keepdims=True)
        weights_NTS = jnp.exp(scores_NTS - top_NT1)
        sum_NT1 = jnp.sum(weights_NTS, axis=-1, keepdims=True)
        mixed_NTK = einsum("NTS,NSK->NTK", weights_NTS, v_NTK[:, :end], dtype)
        y.append((mixed_NTK / sum_NT1).astype(dtype))
        log_sums.append((top_NT1 + jnp.log(sum_NT1))[..., 0])
    y_NTK, log_sum_NT = jnp.concatenate(y, axis=1), jnp.concatenate(log_sums, axis=1)
    return y_NTK, (q_NTK, k_NTK, v_NTK, y_NTK, log_sum_NT)


def _backward(
    dtype: DTypeLike, residuals: Residuals, dy_NTK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v.

    With P = softmax(scores): dv = P^T dy; the scores' gradient is P (dP - mean of dP under P), of
    which dP = dy v^T, and that mean is y dy summed over K. Keys and values sum over queries: their
    gradients are computed transposed, as dy^T P, so that the small factor is what is turned round.
    """
    q_NTK, k_NTK, v_NTK, y_NTK, log_sum_NT = residuals
    N, T, K = q_NTK.shape
    mean_NT = jnp.sum(dy_NTK.astype(jnp.float32) * y_NTK.astype(jnp.float32), axis=-1)
    q_NTK, k_NTK, v_NTK = (_after(x_NTK, dy_NTK) for x_NTK in (q_NTK, k_NTK, v_NTK))
    q_NKT, dy_NKT = q_NTK.swapaxes(1, 2), dy_NTK.swapaxes(1, 2)
    dq, dk_NKS, dv_NKS = [], jnp.zeros((N, K, T)), jnp.zeros((N, K, T))
    for start, end in _blocks(T, BACKWARD_BLOCK):
        scores_NTS = _scores(q_NTK[:, start:end], k_NTK[:, :end], dtype)
        weights_NTS = jnp.exp(scores_NTS - log_sum_NT[:, start:end, None])
        weights_NTS = jnp.where(_visible(start, end), weights_NTS, 0.0)
        dp_NTS = einsum("NTK,NSK->NTS", dy_NTK[:, start:end], v_NTK[:, :end], dtype)
        dscores_NTS = weights_NTS * (dp_NTS - mean_NT[:, start:end, None])
        dscores_NTS, weights_NTS = dscores_NTS.astype(dtype), weights_NTS.astype(dtype)
        dq.append(einsum("NTS,NSK->NTK", dscores_NTS, k_NTK[:, :end], dtype))
        add_dk = einsum("NKT,NTS->NKS", q_NKT[:, :, start:end], dscores_NTS, dtype)
        add_dv = einsum("NKT,NTS->NKS", dy_NKT[:, :, start:end], weights_NTS, dtype)
        dk_NKS = dk_NKS.at[:, :, :end].add(add_dk)
        dv_NKS = dv_NKS.at[:, :, :end].add(add_dv)
    scale = K**-0.5
    return (
        (jnp.concatenate(dq, axis=1) * scale).astype(q_NTK.dtype),
        (dk_NKS.swapaxes(1, 2) * scale).astype(k_NTK.dtype),
        dv_NKS.swapaxes(1, 2).astype(v_NTK.dtype),
    )


_blocked_attention.defvjp(_forward, _backward)


def _blocks(T: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _scores(q_NTK: jax.Array, k_NSK: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Products q k^T / sqrt(K) of a block's queries and keys, [N, T, S]."""
    return einsum("NTK,NSK->NTS", q_NTK, k_NSK, dtype) * q_NTK.shape[2] ** -0.5


def _after(x: jax.Array, awaited: jax.Array) -> jax.Array:
    """x, not to be used before `awaited` is there (an array of the same shape).

    Scores that are computed again need no gradient: left alone, XLA:CPU, which drops optimization
    barriers, makes those of many layers long before their turn and holds them all. What is added
    is 0, but no compiler sees that.
    """
    return x + jnp.minimum(jnp.abs(awaited), 0).astype(x.dtype)


def _visible(start: int, end: int) -> jax.Array:
    """Which keys up to `end` queries start..end see, bool [1, T, S]."""
    query_T, key_S = jnp.arange(start, end), jnp.arange(end)
    return (key_S[None, :] <= query_T[:, None])[None]
