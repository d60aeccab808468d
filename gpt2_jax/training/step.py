"""One optimizer step as a pure function: (state, batch) -> (state, metrics).

Nothing here knows of files, devices or loops. The caller jits it once, donating the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.lora import init_lora
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.model import GPT2, AdaptedParams, Params, apply, head_table, init_params
from gpt2_jax.training.accumulation import accumulate
from gpt2_jax.training.loss import Head, head_loss, head_losses

Complete = Callable[[Params, Params | None], Params | AdaptedParams]
"""(what is trained, what is frozen) -> what the model computes with"""


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array
    """int32 scalar, optimizer steps done"""
    params: Params
    """what is trained: all parameters of the model, or an adapter"""
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """What a step reports, scalars; float32 unless another type is named."""

    loss: jax.Array
    """mean cross-entropy of the batch before the update, nats per token"""
    grad_norm: jax.Array
    """global norm of the gradient before clipping"""
    skipped: jax.Array
    """int32, steps so far whose gradient was not finite and that changed nothing"""
    skipped_in_a_row: jax.Array
    """int32, how many of them are the latest steps"""


def init_state(
    model: GPT2,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    params: Params | None = None,
    *,
    lora: LoraSettings | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      model: the model.
      optimizer: from `make_optimizer`.
      key: the run's key, as given to `train_step`.
      params: parameters to start from; None draws new ones.
      lora: what is trained is an adapter with these settings; None means all parameters.
    """
    if params is None:
        first_key = _init_key(key)
        if lora is None:
            params = init_params(model.config, first_key)
        else:
            params = init_lora(model.config, lora, first_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: TrainState,
    tokens_NBT: jax.Array,
    key: jax.Array,
    frozen: Params | None = None,
    *,
    model: GPT2,
    optimizer: optax.GradientTransformation,
    complete: Complete = lambda params, _: params,
    positions: int | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Applies one optimizer step.

    Args:
      state: from `init_state` or the step before.
      tokens_NBT: the global batch, int32 [N, B, T + 1], in N passes of B sequences; inputs and
        targets are its two shifts. The gradient is that of all N x B sequences, however they
        are arranged.
      key: the run's key; dropout draws from `fold_in(key, step)`, anew in each pass.
      frozen: parameters that stay as they are; no gradient is computed for them.
      model: the model, static under jit.
      optimizer: from `make_optimizer`, static under jit.
      complete: makes of `state.params` and `frozen` what the model computes with.
      positions: of each sequence whose logits are held at a time; None is all.

    Returns:
      The new state and this step's metrics.
    """
    passes = len(tokens_NBT)
    step_key = jax.random.fold_in(_dropout_key(key), state.step)

    def gradient(one_pass: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, Params], None]:
        tokens_BT, index = one_pass
        pass_key = jax.random.fold_in(step_key, index)

        def loss(params: Params) -> jax.Array:
            return batch_loss(
                complete(params, frozen), tokens_BT, pass_key, model=model, positions=positions
            )

        return jax.value_and_grad(loss)(state.params), None

    total, _ = accumulate(gradient, (tokens_NBT, jnp.arange(passes)))
    loss, grads = jax.tree.map(lambda value: value / passes, total)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Counted by `optax.apply_if_finite`, where the optimizer has it.
    skipped, in_a_row = (
        jnp.asarray(optax.tree.get(opt_state, name, 0), jnp.int32)
        for name in ("total_notfinite", "notfinite_count")
    )
    metrics = StepMetrics(loss, optax.tree.norm(grads), skipped, in_a_row)
    return TrainState(state.step + 1, params, opt_state), metrics


def batch_loss(
    params: Params | AdaptedParams,
    tokens_BT: jax.Array,
    key: jax.Array,
    *,
    model: GPT2,
    positions: int | None = None,
) -> jax.Array:
    """Mean loss over a batch int32 [B, T + 1], with dropout.

    The plain form: `cross_entropy(apply(model, params, tokens_BT[:, :-1]), tokens_BT[:, 1:])`, of
    which the mean.
    """
    x_BTD = _features(model, params, tokens_BT, deterministic=False, rngs={"dropout": key})
    head = Head(model.config.vocab_size, model.dtype, positions)
    return head_loss(x_BTD, head_table(params, model.config), tokens_BT[:, 1:], head)


def eval_step(
    params: Params | AdaptedParams,
    tokens_BT: jax.Array,
    *,
    model: GPT2,
    positions: int | None = None,
) -> jax.Array:
    """Mean loss of each row of int32 [B, T + 1], without dropout: float32 [B]."""
    x_BTD = _features(model, params, tokens_BT)
    head = Head(model.config.vocab_size, model.dtype, positions)
    losses_BT = head_losses(x_BTD, head_table(params, model.config), tokens_BT[:, 1:], head)
    return losses_BT.mean(axis=-1)


def _features(
    model: GPT2, params: Params | AdaptedParams, tokens_BT: jax.Array, **kwargs: Any
) -> jax.Array:
    """What the output head reads, [B, T, D]."""
    x_BTD, _ = apply(model, params, tokens_BT[:, :-1], method="features", **kwargs)
    return x_BTD


def _init_key(key: jax.Array) -> jax.Array:
    return jax.random.split(key)[0]


def _dropout_key(key: jax.Array) -> jax.Array:
    return jax.random.split(key)[1]
