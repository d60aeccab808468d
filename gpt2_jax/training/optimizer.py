"""AdamW, gradient clipping and the learning-rate schedule, all from Optax."""

import jax
import optax

from gpt2_jax.model import Params
from gpt2_jax.training.settings import OptimizerSettings

_NEVER = 2**31 - 1  # int32: the wrapper would apply the gradient after that many


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Linear warm-up, then half a cosine: build-nanogpt's `get_lr`.

    Step i of the warm-up has (i + 1) / warmup_steps of the peak, so that step 0 already
    learns; the cosine starts at the peak and would reach the final rate at step `steps`. A run
    shorter than its warm-up sees only the beginning of it.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    decay = optax.cosine_decay_schedule(
        peak, max(steps - warmup, 1), alpha=settings.final_learning_rate / peak if peak else 0.0
    )
    if warmup == 0:
        return decay
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, decay], [warmup])


def decay_mask(params: Params) -> Params:
    """True for what weight decay applies to: matrices and embeddings, not biases and norms."""
    return jax.tree.map(lambda array: array.ndim >= 2, params)


def make_optimizer(
    settings: OptimizerSettings, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clips the global norm, then AdamW with decoupled weight decay (Loshchilov & Hutter, 2019).

    A gradient that is not finite changes neither parameters nor moments nor schedule; the state
    counts such steps ("total_notfinite", "notfinite_count"), and whoever runs the steps decides
    when there were too many.
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule,
            b1=settings.beta1,
            b2=settings.beta2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        ),
    )
    return optax.apply_if_finite(adamw, max_consecutive_errors=_NEVER)
