"""What storing the weights in fewer bits costs: perplexity, and how often another token leads.

Shapes: B windows, T positions, V vocabulary.
"""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, Params, apply
from gpt2_jax.packed import PackedParams, Precision, compute_dtype, pack

BATCH = 8


def rounding_cost(
    params: Params, config: GPT2Config, tokens: np.ndarray, limit: int
) -> dict[Precision, dict[str, Any]]:
    """Reads a text at every precision, in windows of the whole context.

    Args:
      params: the parameters as trained.
      config: the model's.
      tokens: the text.
      limit: tokens to predict, at most.

    Returns:
      For each precision "megabytes" of the weights, "tokens" predicted, "loss" (nats a token),
      "perplexity", and "agreement": the share of places where float32 has the same likeliest token.

    Raises:
      UserError: if the text is shorter than one window.
    """
    T = config.n_positions
    count = (min(len(tokens) - 1, limit) // T) // BATCH * BATCH
    if count < BATCH:
        raise UserError(
            f"the text has {len(tokens)} tokens, and {BATCH} windows of {T} need "
            f"{BATCH * T + 1}; give a longer text or a higher --tokens"
        )
    inputs_BT = tokens[: count * T].reshape(count, T).astype(np.int32)
    targets_BT = tokens[1 : count * T + 1].reshape(count, T).astype(np.int32)
    costs: dict[Precision, dict[str, Any]] = {}
    exact_BT = None
    for precision in get_args(Precision):
        packed = pack(params, precision, rows=BATCH)
        loss, likeliest_BT = _read(packed, config, inputs_BT, targets_BT)
        exact_BT = likeliest_BT if exact_BT is None else exact_BT
        costs[precision] = {
            "megabytes": packed.nbytes / 1e6,
            "tokens": targets_BT.size,
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "agreement": float(np.mean(likeliest_BT == exact_BT)),
        }
    return costs


def _read(
    packed: PackedParams, config: GPT2Config, inputs_BT: np.ndarray, targets_BT: np.ndarray
) -> tuple[float, np.ndarray]:
    """The mean loss, and the likeliest next token at every place."""
    model = GPT2(config, dtype=compute_dtype(packed.precision))
    parts = [
        _judge(packed, inputs_BT[start : start + BATCH], targets_BT[start : start + BATCH], model)
        for start in range(0, len(inputs_BT), BATCH)
    ]
    losses, likeliest = zip(*jax.device_get(parts), strict=True)
    return float(np.mean(losses, dtype=np.float64)), np.concatenate(likeliest)


@functools.partial(jax.jit, static_argnames="model")
def _judge(
    packed: PackedParams, inputs_BT: jax.Array, targets_BT: jax.Array, model: GPT2
) -> tuple[jax.Array, jax.Array]:
    logits_BTV = apply(model, packed, inputs_BT)
    logprob_BTV = jax.nn.log_softmax(logits_BTV)
    logprob_BT = jnp.take_along_axis(logprob_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return -jnp.mean(logprob_BT), jnp.argmax(logits_BTV, axis=-1)
