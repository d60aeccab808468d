"""One optimizer step as a pure function: (state, batch) -> (state, metrics).

Nothing here knows of files, devices or loops. The caller jits it once, donating the state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model import GPT2, Params, apply, init_params
from gpt2_jax.training.loss import cross_entropy


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array
    """int32 scalar, optimizer steps done"""
    params: Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """What a step reports, float32 scalars."""

    loss: jax.Array
    """mean cross-entropy of the batch before the update, nats per token"""
    grad_norm: jax.Array
    """global norm of the gradient before clipping"""


def init_state(model: GPT2, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step; `key` is the run's key, as given to `train_step`."""
    params = init_params(model.config, _init_key(key))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: TrainState,
    tokens_BT: jax.Array,
    key: jax.Array,
    *,
    model: GPT2,
    optimizer: optax.GradientTransformation,
    micro_batch_size: int,
) -> tuple[TrainState, StepMetrics]:
    """Applies one optimizer step.

    Args:
      state: from `init_state` or the step before.
      tokens_BT: the global batch, int32 [B, T + 1]; inputs and targets are its two shifts.
      key: the run's key; dropout draws from `fold_in(key, step)`.
      model: the model, static under jit.
      optimizer: from `make_optimizer`, static under jit.
      micro_batch_size: rows in one forward and backward pass; divides B. The gradient is that
        of the whole batch whatever it is.

    Returns:
      The new state and this step's metrics.
    """
    micro_batches = tokens_BT.shape[0] // micro_batch_size
    tokens_NMT = tokens_BT.reshape(micro_batches, micro_batch_size, tokens_BT.shape[1])
    step_key = jax.random.fold_in(_dropout_key(key), state.step)

    def accumulate(total, micro):  # type: ignore[no-untyped-def]
        tokens_MT, index = micro
        micro_key = jax.random.fold_in(step_key, index)
        result = jax.value_and_grad(batch_loss)(state.params, tokens_MT, micro_key, model=model)
        return jax.tree.map(jnp.add, total, result), None

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params)
    total, _ = jax.lax.scan(accumulate, zero, (tokens_NMT, jnp.arange(micro_batches)))
    loss, grads = jax.tree.map(lambda value: value / micro_batches, total)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, optax.tree.norm(grads))
    return TrainState(state.step + 1, params, opt_state), metrics


def batch_loss(params: Params, tokens_BT: jax.Array, key: jax.Array, *, model: GPT2) -> jax.Array:
    """Mean loss over a batch int32 [B, T + 1], with dropout."""
    logits_BTV = apply(model, params, tokens_BT[:, :-1], deterministic=False, rngs={"dropout": key})
    return cross_entropy(logits_BTV, tokens_BT[:, 1:]).mean()


def eval_step(params: Params, tokens_BT: jax.Array, *, model: GPT2) -> jax.Array:
    """Mean loss of each row of int32 [B, T + 1], without dropout: float32 [B]."""
    logits_BTV = apply(model, params, tokens_BT[:, :-1])
    return cross_entropy(logits_BTV, tokens_BT[:, 1:]).mean(axis=-1)


def _init_key(key: jax.Array) -> jax.Array:
    return jax.random.split(key)[0]


def _dropout_key(key: jax.Array) -> jax.Array:
    return jax.random.split(key)[1]
