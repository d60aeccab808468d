"""AdamW, gradient clipping and the learning-rate schedule, all from Optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model import Params
from gpt2_jax.training.settings import OptimizerSettings

_NEVER = 2**31 - 1


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
    """`plain_optimizer`, state and results, in one pass over memory instead of several.

    Optax's parts hand each other whole trees, and a branch stands between moments and parameters:
    compilers write most of those trees to memory. Here every value of the update is a formula of
    its parameter, gradient and moments, which they fuse. Finite is a gradient of finite norm.
    """
    init = plain_optimizer(settings, schedule).init
    return optax.GradientTransformation(init, functools.partial(_update, settings, schedule))


def plain_optimizer(
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


def _update(
    settings: OptimizerSettings,
    schedule: optax.Schedule,
    grads: Params,
    state: optax.ApplyIfFiniteState,
    params: Params,
) -> tuple[Params, optax.ApplyIfFiniteState]:
    """What to add to the parameters, and the next state, whose form is `plain_optimizer`'s."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    clip = jnp.where(norm < settings.clip_norm, 1.0, settings.clip_norm / norm)
    done = optax.tree.get(state, "count", filtering=_is_adams)
    correction1, correction2 = (1 - beta ** (done + 1) for beta in (settings.beta1, settings.beta2))
    rate = schedule(done)

    # What is kept is chosen before it is read again: read from before the choice, an old moment
    # would have to outlive the new one, in a copy.
    def moment(old: jax.Array, value: jax.Array, beta: float) -> jax.Array:
        return jnp.where(finite, beta * old + (1 - beta) * value, old)

    def change(param: jax.Array, mu: jax.Array, nu: jax.Array, decays: bool) -> jax.Array:
        step = mu / correction1 / (jnp.sqrt(nu / correction2) + settings.epsilon)
        step += settings.weight_decay * param if decays else 0.0
        return jnp.where(finite, -rate * step, 0.0)

    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    mu = jax.tree.map(lambda old, g: moment(old, clip * g, settings.beta1), mu, grads)
    nu = jax.tree.map(lambda old, g: moment(old, jnp.square(clip * g), settings.beta2), nu, grads)
    updates = jax.tree.map(change, params, mu, nu, decay_mask(params))
    inner = optax.tree.set(state.inner_state, mu=mu, nu=nu, count=done + finite)
    failed = 1 - finite.astype(jnp.int32)
    return updates, optax.ApplyIfFiniteState(
        notfinite_count=failed * (state.notfinite_count + 1),
        last_finite=finite,
        total_notfinite=state.total_notfinite + failed,
        inner_state=inner,
    )


def _is_adams(path: Any, _: Any) -> bool:
    """Of a state's counts the moments'; the schedule's is always the same."""
    return getattr(path[-1], "tuple_name", "") == "ScaleByAdamState"
