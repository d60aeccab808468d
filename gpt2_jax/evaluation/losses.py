"""The loss of every token of a text: what perplexity averages, and where two models differ.

Windows are scored one by one, each from nothing: the first tokens of a window are predicted from
little context, and cost more than they would in the middle of a text.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config, check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, Params, apply


def token_losses(
    params: Params,
    config: GPT2Config,
    windows_NT: np.ndarray,
    *,
    dtype: DTypeLike = jnp.float32,
    batch_size: int = 8,
) -> np.ndarray:
    """The loss of each token given those before it in its window, and nothing else.

    Args:
      params: the model's parameters.
      config: the model they belong to.
      windows_NT: token ids [N, T + 1], T from 1 to `n_positions`. A window's first token is
        context alone; what stands after a token has no effect on its loss.
      dtype: compute dtype; the loss is computed in float32.
      batch_size: windows in every forward pass, whose logits take batch_size x T x vocab_size
        x 4 bytes. The last pass is filled up with windows from the front.

    Returns:
      -ln of the probability of tokens 1 to T, nats, float32 [N, T].

    Raises:
      UserError: if windows are too short or too long, or hold a token that the model lacks.
    """
    check_positive_int("batch_size", batch_size)
    windows_NT = np.asarray(windows_NT)
    _check_windows(windows_NT, config)
    N, T = windows_NT.shape[0], windows_NT.shape[1] - 1
    if not N:
        return np.zeros((0, T), np.float32)
    batch_size = min(batch_size, N)
    order = np.arange(-(-N // batch_size) * batch_size) % N
    # All are dispatched before the first is read, so the device never waits.
    results = [
        _losses(params, windows_NT[rows].astype(np.int32), config=config, dtype=jnp.dtype(dtype))
        for rows in order.reshape(-1, batch_size)
    ]
    return np.concatenate([np.asarray(loss_BT) for loss_BT in results])[:N]


def perplexity(losses: np.ndarray) -> float:
    """Computes exp(mean loss) of an array of any shape, nats; infinity if that is too large.

    The mean is taken in float64. Of no tokens it is NaN.
    """
    if not losses.size:
        return float("nan")
    with np.errstate(over="ignore"):
        return float(np.exp(losses.mean(dtype=np.float64)))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _losses(
    params: Params, tokens_BT: jax.Array, *, config: GPT2Config, dtype: DTypeLike
) -> jax.Array:
    """Nats, float32 [B, T], of tokens [B, T + 1]."""
    logits_BTV = apply(GPT2(config, dtype), params, tokens_BT[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])


def _check_windows(windows_NT: np.ndarray, config: GPT2Config) -> None:
    if windows_NT.ndim != 2 or not np.issubdtype(windows_NT.dtype, np.integer):
        raise UserError(
            f"windows of shape {windows_NT.shape} and dtype {windows_NT.dtype} are no token ids "
            f"[N, T + 1]; give whole numbers in rows of one length"
        )
    length = windows_NT.shape[1]
    if not 2 <= length <= config.n_positions + 1:
        raise UserError(
            f"a window of {length} tokens must have 2 to {config.n_positions + 1}, one more than "
            f"the context of the model; cut the text to fit"
        )
    wrong = windows_NT[(windows_NT < 0) | (windows_NT >= config.vocab_size)]
    if wrong.size:
        raise UserError(
            f"token {wrong[0]} is outside the model's vocabulary of {config.vocab_size}; "
            f"use the model's own tokenizer"
        )
