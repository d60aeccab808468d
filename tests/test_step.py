"""One training step as a pure function, and the loss it lowers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2
from gpt2_jax.training.loss import cross_entropy
from gpt2_jax.training.step import TrainState, eval_step, init_state, train_step

KEY = jax.random.key(3)
RATE = 0.03
TOKENS_BT = np.random.default_rng(6).integers(0, 97, (4, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def initial(shallow_config):
    """The state before the first step, with the simplest optimizer: p - RATE * gradient."""
    return jax.jit(functools.partial(init_state, GPT2(shallow_config), optax.sgd(RATE)))(KEY)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sgd_step(config, micro_batch_size, state, tokens_BT, key=KEY):
    tokens_NBT = tokens_BT.reshape(-1, micro_batch_size, tokens_BT.shape[1])
    return train_step(state, tokens_NBT, key, model=GPT2(config), optimizer=optax.sgd(RATE))


evaluate = jax.jit(eval_step, static_argnames="model")


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


def trees_equal(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_an_untrained_model_finds_every_token_equally_likely(shallow_config, initial):
    loss_B = evaluate(initial.params, TOKENS_BT, model=GPT2(shallow_config))
    assert loss_B.shape == (4,)
    # Logits of deviation 0.02 sqrt(32) = 0.11 add 0.006 on average, and scatter by 0.11 / sqrt(8)
    # over a row's 8 targets.
    np.testing.assert_allclose(loss_B, math.log(97), atol=0.15)
    assert abs(loss_B.mean() - math.log(97)) < 0.06


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    shallow_config, initial, micro_batch_size
):
    whole, whole_metrics = sgd_step(shallow_config, 4, initial, TOKENS_BT)
    state, metrics = sgd_step(shallow_config, micro_batch_size, initial, TOKENS_BT)
    # float32 sums in another order; parameters are below 1, the loss below 5.
    assert_trees_close(state.params, whole.params, rtol=0, atol=1e-6)
    assert_trees_close(metrics, whole_metrics, rtol=1e-6)
    assert state.step == whole.step == 1


def test_metrics_are_the_loss_before_the_update_and_the_gradients_norm(shallow_config, initial):
    state, metrics = sgd_step(shallow_config, 4, initial, TOKENS_BT)
    loss_B = evaluate(initial.params, TOKENS_BT, model=GPT2(shallow_config))
    np.testing.assert_allclose(metrics.loss, loss_B.mean(), rtol=1e-6)
    squares = jax.tree.map(
        lambda before, after: np.sum(np.square((before - after) / RATE)),
        initial.params,
        state.params,
    )
    # The update's digits are those left of parameters near 1 after subtracting: about 1e-7.
    np.testing.assert_allclose(
        metrics.grad_norm, math.sqrt(sum(jax.tree.leaves(squares))), rtol=1e-4
    )
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32


def test_repeated_steps_on_one_batch_lower_its_loss(shallow_config, initial):
    state, losses = initial, []
    for _ in range(8):
        state, metrics = sgd_step(shallow_config, 4, state, TOKENS_BT)
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3
    assert state.step == 8


def test_a_step_is_a_function_of_its_arguments_bit_for_bit(shallow_config, initial):
    first, again = (sgd_step(shallow_config, 2, initial, TOKENS_BT) for _ in range(2))
    assert trees_equal(first, again)


class Noise:
    """A model of nothing but dropout: its features show the key they were drawn with."""

    config = GPT2Config(vocab_size=97)
    dtype = jnp.float32

    @staticmethod
    def apply(variables, tokens_BT, *, method, deterministic, rngs):
        del variables
        assert method == "features"
        assert not deterministic
        return jax.random.normal(rngs["dropout"], (*tokens_BT.shape, 97)), None


def test_dropout_depends_on_the_key_the_step_and_the_pass():
    @functools.partial(jax.jit, static_argnums=0)
    def loss(rows, step, key):
        state = TrainState(step, {"wte": {"embedding": jnp.eye(97)}}, optax.EmptyState())
        _, metrics = train_step(
            state,
            jnp.repeat(TOKENS_BT[None, :1], rows, axis=0),
            key,
            model=Noise,
            optimizer=optax.identity(),
        )
        return metrics.loss

    first, again = (float(loss(1, 0, KEY)) for _ in range(2))
    assert first == again
    assert len({first, float(loss(1, 1, KEY)), float(loss(1, 0, jax.random.key(4)))}) == 3
    # Were the same noise drawn for both rows, their mean would be that of one.
    assert loss(2, 0, KEY) != first


def random_logits():
    return 5 * np.random.default_rng(0).normal(size=(2, 3, 11)).astype(np.float32)


TARGETS_BT = np.array([[0, 10, 4], [3, 3, 7]], np.int32)


def test_cross_entropy_is_the_negative_log_probability_of_the_target():
    logits_BTV = random_logits()
    shifted_BTV = logits_BTV.astype(np.float64) - logits_BTV.max(axis=-1, keepdims=True)
    log_probability_BTV = shifted_BTV - np.log(np.exp(shifted_BTV).sum(axis=-1, keepdims=True))
    expected_BT = -np.take_along_axis(log_probability_BTV, TARGETS_BT[..., None], axis=-1)[..., 0]
    # A difference of float32 numbers near 15.
    np.testing.assert_allclose(cross_entropy(logits_BTV, TARGETS_BT), expected_BT, atol=3e-6)


def test_cross_entropy_stays_finite_for_huge_logits():
    logits_BTV = 1e30 * random_logits()
    assert np.isfinite(cross_entropy(logits_BTV, TARGETS_BT)).all()


def test_the_losss_gradient_is_softmax_minus_one_hot_without_a_scatter():
    logits_BTV = random_logits()
    gradient = jax.grad(lambda logits_BTV: cross_entropy(logits_BTV, TARGETS_BT).sum())
    expected_BTV = jax.nn.softmax(logits_BTV) - jax.nn.one_hot(TARGETS_BT, 11)
    # Probabilities in float32.
    np.testing.assert_allclose(gradient(logits_BTV), expected_BTV, rtol=0, atol=3e-7)
    program = jax.jit(gradient).lower(logits_BTV)
    assert "stablehlo.subtract" in program.as_text()
    assert "stablehlo.scatter" not in program.as_text()
