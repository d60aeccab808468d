"""The training objective: cross-entropy of the next token."""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, in nats: float32 [B, T].

    -log softmax(logits)[target] = logsumexp(logits) - logits[target]. The target's logit is
    picked by comparison, not by index: the gradient of an index is a scatter into [B, T, V].
    """
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT
