"""The training objective: cross-entropy of the next token.

`cross_entropy` is the definition, from logits. A training step takes `head_loss`, which goes from
the model's features through the output head to the mean loss: of 50,257 logits for every token it
never holds more than those of a few positions, nor keeps any for the backward pass.

Shapes: B batch, T sequence, D width, V vocabulary, N chunks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gpt2_jax.precision import einsum
from gpt2_jax.training.accumulation import accumulate

# 16-bit matrix products of GPUs need aligned rows: 50,257 is odd. CPUs are as fast with it.
_ROWS_MULTIPLE = 128


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, in nats: float32 [B, T].

    -log softmax(logits)[target] = logsumexp(logits) - logits[target]. The target's logit is
    picked by comparison, not by index: the gradient of an index is a scatter into [B, T, V].
    """
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT


class Head(NamedTuple):
    """How features become losses."""

    vocab_size: int
    """rows of the table that are tokens; those after them are padding"""
    dtype: DTypeLike
    """compute dtype, see `gpt2_jax.precision`"""
    positions: int | None = None
    """of each sequence whose logits are held at a time; None is all"""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_loss(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, head: Head
) -> jax.Array:
    """Mean of `cross_entropy(x table^T, targets)`, float32 scalar, in nats per token.

    Its gradients are computed on the way: with a chunk's logits at hand, softmax(logits) minus
    the target's one-hot row takes their place, and goes straight into the gradients of x and
    table, by products in the compute dtype. So does Liger Kernel (Hsu et al., 2024).

    Args:
      x_BTD: the model's features.
      table_VD: the output head, one row for each token.
      targets_BT: the tokens to predict, int32.
      head: vocabulary, dtype and chunks.
    """
    return head_losses(x_BTD, table_VD, targets_BT, head).mean()


def head_losses(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, head: Head
) -> jax.Array:
    """`cross_entropy(x table^T, targets)`, float32 [B, T]; arguments as for `head_loss`."""
    table_VD = _for_products(table_VD, head)

    def chunk_losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BTD, targets_BT = chunk
        return cross_entropy(_logits(x_BTD, table_VD, head), targets_BT)

    losses_NBT = jax.lax.map(chunk_losses, _chunks(x_BTD, targets_BT, head))
    return _joined(losses_NBT, targets_BT.shape[1])


def _forward(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, head: Head
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The mean loss, and its gradients by x and table."""
    padded_VD = _for_products(table_VD, head)

    def gradients(
        chunk: tuple[jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        x_BTD, targets = chunk
        losses_BT, dlogits_BTV = _softmax_gradient(_logits(x_BTD, padded_VD, head), targets)
        # What fills up the last chunk has no target, and no part in the mean.
        share_BT = jnp.where(targets < 0, 0, 1 / targets_BT.size)
        dlogits_BTV = (dlogits_BTV * share_BT[..., None]).astype(head.dtype)
        gradient_BTD = einsum("BTV,VD->BTD", dlogits_BTV, padded_VD, head.dtype)
        gradient_VD = einsum("BTV,BTD->VD", dlogits_BTV, x_BTD, head.dtype)
        return (jnp.sum(losses_BT * share_BT), gradient_VD), gradient_BTD

    chunks = _chunks(x_BTD, targets_BT, head)
    (loss, gradient_VD), gradient_NBTD = accumulate(gradients, chunks)
    gradient_BTD = _joined(gradient_NBTD, targets_BT.shape[1])
    return loss, (gradient_BTD, gradient_VD[: len(table_VD)])


def _backward(
    _head: Head, gradients: tuple[jax.Array, jax.Array], dloss: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    gradient_BTD, gradient_VD = gradients
    return dloss * gradient_BTD, dloss * gradient_VD, None


head_loss.defvjp(_forward, _backward)


def _for_products(table_VD: jax.Array, head: Head) -> jax.Array:
    """The table in the compute dtype, once; for a GPU, such a copy has a good number of rows."""
    rounded_VD = table_VD.astype(head.dtype)
    if rounded_VD is table_VD or jax.default_backend() == "cpu":
        return rounded_VD
    return jnp.pad(rounded_VD, ((0, -len(table_VD) % _ROWS_MULTIPLE), (0, 0)))


def _softmax_gradient(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` and its gradient by the logits, from one exp of each."""
    top_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    weights_BTV = jnp.exp(logits_BTV - top_BT1)
    sum_BT1 = jnp.sum(weights_BTV, axis=-1, keepdims=True)
    # Nothing is derived from this index, so that no gradient of it is a scatter.
    target_logit_BT1 = jnp.take_along_axis(logits_BTV, jnp.maximum(targets_BT, 0)[..., None], -1)
    losses_BT = (top_BT1 + jnp.log(sum_BT1) - target_logit_BT1)[..., 0]
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
    return losses_BT, weights_BTV / sum_BT1 - is_target_BTV


def _logits(x_BTD: jax.Array, table_VD: jax.Array, head: Head) -> jax.Array:
    """float32 [B, T, V]; those of padding are -inf."""
    logits_BTV = einsum("BTD,VD->BTV", x_BTD, table_VD, head.dtype)
    if len(table_VD) == head.vocab_size:
        return logits_BTV
    is_token_V = jnp.arange(len(table_VD)) < head.vocab_size
    return jnp.where(is_token_V[None, None, :], logits_BTV, -jnp.inf)


def _chunks(x_BTD: jax.Array, targets_BT: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    """Features and targets by chunks of positions: [N, B, T, D] and [N, B, T].

    Sequences are not parted: devices among which a batch is split have each a share of all chunks.
    """
    B, T, D = x_BTD.shape
    count = -(-T // min(T, head.positions or T))
    length = -(-T // count)
    filling = (0, count * length - T)
    x_BTD = jnp.pad(x_BTD, ((0, 0), filling, (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), filling), constant_values=-1)
    return (
        jnp.moveaxis(x_BTD.reshape(B, count, length, D), 1, 0),
        jnp.moveaxis(targets_BT.reshape(B, count, length), 1, 0),
    )


def _joined(chunks_NBT: jax.Array, T: int) -> jax.Array:
    """Undoes `_chunks`: [N, B, T, ...] to [B, T, ...]."""
    x_BNT = jnp.moveaxis(chunks_NBT, 0, 1)
    return x_BNT.reshape(x_BNT.shape[0], -1, *x_BNT.shape[3:])[:, :T]
