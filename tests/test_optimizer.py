"""AdamW, clipping and the schedule against their formulas in plain Python and NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.model import param_shapes
from gpt2_jax.training.optimizer import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    plain_optimizer,
)
from gpt2_jax.training.settings import OptimizerSettings

SETTINGS = OptimizerSettings(
    learning_rate=6e-4,
    final_learning_rate=6e-5,
    warmup_steps=10,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)


def get_lr(step, peak, final, warmup_steps, max_steps):
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step > max_steps:
        return final
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return final + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - final)


def assert_schedule(settings, steps):
    peak, final = settings.learning_rate, settings.final_learning_rate
    schedule = learning_rate_schedule(settings, steps)
    actual = [float(schedule(step)) for step in range(steps)]
    expected = [get_lr(step, peak, final, settings.warmup_steps, steps) for step in range(steps)]
    # The schedule is computed in float32; half of 1 + cos loses digits where it nears zero,
    # but is added to the final rate there.
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 10, 24, 25])
def test_the_schedule_is_build_nanogpts(warmup_steps):
    assert_schedule(dataclasses.replace(SETTINGS, warmup_steps=warmup_steps), 25)


def test_a_run_shorter_than_its_warm_up_sees_the_warm_ups_beginning():
    assert_schedule(dataclasses.replace(SETTINGS, warmup_steps=100), 25)


@pytest.mark.parametrize("final", [0.0, 6e-4, 1e-3])
def test_the_final_rate_may_be_zero_the_peak_or_above(final):
    assert_schedule(dataclasses.replace(SETTINGS, final_learning_rate=final), 25)


def test_a_peak_of_zero_learns_nothing():
    schedule = learning_rate_schedule(dataclasses.replace(SETTINGS, learning_rate=0.0), 25)
    assert [float(schedule(step)) for step in range(25)] == [0.0] * 25


@pytest.mark.parametrize("tied", [True, False])
def test_decay_is_for_matrices_and_embeddings_only(tiny_config, tied):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
    mask = decay_mask(param_shapes(config))
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        assert decays == (path[-1].key in ("kernel", "embedding")), path


def random_params(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    return {
        name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
    }


def global_norm(grads):
    return math.sqrt(sum(np.sum(grad.astype(np.float64) ** 2) for grad in grads.values()))


def numpy_adamw(params, gradients, settings, learning_rates):
    """Loshchilov & Hutter's algorithm 2 behind clipping by the global norm, in float64."""
    params = {name: array.astype(np.float64) for name, array in params.items()}
    mean = {name: np.zeros_like(array) for name, array in params.items()}
    square = {name: np.zeros_like(array) for name, array in params.items()}
    for t, (grads, rate) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        scale = min(1.0, settings.clip_norm / global_norm(grads))
        for name, grad in grads.items():
            clipped = scale * grad.astype(np.float64)
            mean[name] += (1 - settings.beta1) * (clipped - mean[name])
            square[name] += (1 - settings.beta2) * (clipped**2 - square[name])
            step = mean[name] / (1 - settings.beta1**t)
            step /= np.sqrt(square[name] / (1 - settings.beta2**t)) + settings.epsilon
            if params[name].ndim >= 2:
                step += settings.weight_decay * params[name]
            params[name] -= rate * step
    return params


def test_steps_are_those_of_adamw_behind_clipping():
    """The second gradient is clipped and the others are not, so that clipping is seen."""
    settings = dataclasses.replace(SETTINGS, learning_rate=0.1, warmup_steps=2, clip_norm=2.0)
    schedule = learning_rate_schedule(settings, 3)
    optimizer = make_optimizer(settings, schedule)
    initial = random_params(0)
    gradients = [random_params(1, 0.1), random_params(2, 5.0), random_params(3, 0.2)]

    params = jax.tree.map(jnp.asarray, initial)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

    rates = [get_lr(step, 0.1, settings.final_learning_rate, 2, 3) for step in range(3)]
    expected = numpy_adamw(initial, gradients, settings, rates)
    for name, array in params.items():
        # Three steps of float32 arithmetic on values near 1.
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("norm", "norm_after"), [(1e6, 0.5), (0.6, 0.5), (0.4, 0.4), (0.0, 0.0)])
def test_the_gradient_that_counts_is_never_longer_than_the_clip_norm(norm, norm_after):
    settings = dataclasses.replace(SETTINGS, clip_norm=0.5)
    optimizer = make_optimizer(settings, optax.constant_schedule(0.1))
    params = random_params(0)
    grads = random_params(1)
    length = global_norm(grads)
    grads = {name: grad * np.float32(norm / length) for name, grad in grads.items()}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    # After one step the running mean is the clipped gradient times 1 - beta1.
    mean = optax.tree_utils.tree_get(state, "mu")
    clipped = {name: np.asarray(array) / (1 - settings.beta1) for name, array in mean.items()}
    np.testing.assert_allclose(global_norm(clipped), norm_after, rtol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(clipped[name] * norm, grad * norm_after, rtol=1e-5)


def test_the_fused_update_is_the_plain_one_state_and_all():
    """Clipped or not, and with gradients that are not finite in between."""
    settings = dataclasses.replace(SETTINGS, learning_rate=0.1, warmup_steps=2, clip_norm=2.0)
    schedule = learning_rate_schedule(settings, 9)
    spoilt = [random_params(9), random_params(10)]
    spoilt[0]["kernel"][1, 2] = np.nan
    spoilt[1]["bias"][0] = np.inf
    gradients = [random_params(1, 0.1), *spoilt, random_params(2, 5.0), random_params(3, 0.2)]

    fused, plain = (make(settings, schedule) for make in (make_optimizer, plain_optimizer))
    params = jax.tree.map(jnp.asarray, random_params(0))
    state = plain_state = fused.init(params)
    for grads in gradients:
        updates, state = jax.jit(fused.update)(grads, state, params)
        plain_updates, plain_state = jax.jit(plain.update)(grads, plain_state, params)
        actual, expected = (updates, state), (plain_updates, plain_state)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for ours, theirs in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            # A few roundings of float32; values are of order 1.
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
        params = optax.apply_updates(params, updates)
    assert state.total_notfinite == 2
    assert optax.tree.get(state, "total_notfinite") == 2
