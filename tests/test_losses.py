"""Losses of single tokens: equal to the formula, whatever the batches."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.losses import perplexity, token_losses
from gpt2_jax.model import GPT2, apply


@pytest.fixture(scope="module", name="windows_NT")
def make_windows(shallow_config) -> np.ndarray:
    return np.random.default_rng(1).integers(0, shallow_config.vocab_size, (5, 9)).astype(np.uint16)


@pytest.fixture(scope="module", name="losses_NT")
def score_windows(shallow_config, shallow_params, windows_NT) -> np.ndarray:
    return token_losses(shallow_params, shallow_config, windows_NT)


def test_each_loss_is_minus_the_log_of_the_softmax(
    shallow_config, shallow_params, windows_NT, losses_NT
):
    inputs_NT = jnp.asarray(windows_NT[:, :-1], jnp.int32)
    logits_NTV = np.asarray(apply(GPT2(shallow_config), shallow_params, inputs_NT), np.float64)
    log_sum_NT = np.log(np.exp(logits_NTV).sum(axis=-1))
    targets_NT1 = windows_NT[:, 1:, None].astype(int)
    expected_NT = log_sum_NT - np.take_along_axis(logits_NTV, targets_NT1, axis=-1)[..., 0]
    assert losses_NT.dtype == np.float32
    np.testing.assert_allclose(losses_NT, expected_NT, rtol=1e-5, atol=1e-5)  # float32's logits


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_does_not_matter(
    shallow_config, shallow_params, windows_NT, losses_NT, batch_size
):
    found_NT = token_losses(shallow_params, shallow_config, windows_NT, batch_size=batch_size)
    np.testing.assert_allclose(found_NT, losses_NT, rtol=1e-5, atol=1e-5)


def test_a_second_call_gives_the_very_same(shallow_config, shallow_params, windows_NT, losses_NT):
    again_NT = token_losses(shallow_params, shallow_config, windows_NT)
    assert np.array_equal(again_NT, losses_NT)


def test_what_comes_later_has_no_effect(shallow_config, shallow_params, windows_NT, losses_NT):
    changed_NT = windows_NT.copy()
    changed_NT[:, 5:] = 0
    found_NT = token_losses(shallow_params, shallow_config, changed_NT)
    np.testing.assert_array_equal(found_NT[:, :4], losses_NT[:, :4])


def test_a_window_of_one_prediction(shallow_config, shallow_params, windows_NT, losses_NT):
    found_N1 = token_losses(shallow_params, shallow_config, windows_NT[:, :2])
    assert found_N1.shape == (5, 1)
    np.testing.assert_allclose(found_N1[:, 0], losses_NT[:, 0], rtol=1e-5, atol=1e-5)


def test_windows_fill_the_context_and_there_may_be_none(shallow_config, shallow_params):
    full_1T = np.zeros((1, shallow_config.n_positions + 1), int)
    assert token_losses(shallow_params, shallow_config, full_1T).shape == (1, 32)
    assert token_losses(shallow_params, shallow_config, full_1T[:0]).shape == (0, 32)


@pytest.mark.parametrize(
    ("windows", "rule"),
    [
        ([[0, 97]], "token 97 is outside the model's vocabulary of 97"),
        ([[0, -1]], "token -1 is outside"),
        ([[0]], "a window of 1 tokens must have 2 to 33"),
        ([[0] * 34], "a window of 34 tokens must have 2 to 33"),
        ([0, 1], "are no token ids"),
        ([[0.0, 1.0]], "are no token ids"),
    ],
)
def test_wrong_windows_are_refused(shallow_config, shallow_params, windows, rule):
    with pytest.raises(UserError, match=rule):
        token_losses(shallow_params, shallow_config, np.array(windows))


def test_perplexity():
    assert perplexity(np.full((2, 3), math.log(7), np.float32)) == pytest.approx(7, rel=1e-6)
    assert perplexity(np.array([[0.0, 2.0]], np.float32)) == pytest.approx(math.e)
    assert perplexity(np.array([1000.0])) == math.inf
    assert math.isnan(perplexity(np.zeros(0)))
