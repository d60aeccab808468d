"""Checkpoints: what was saved comes back bit for bit, and only into the model it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.model import param_shapes
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.settings import OptimizerSettings
from gpt2_jax.training.step import TrainState


@pytest.fixture
def state(tiny_params):
    """A state in mid-training: every array of the optimizer holds something else."""
    optimizer = make_optimizer(OptimizerSettings(), optax.constant_schedule(1e-3))
    rng = np.random.default_rng(0)
    opt_state = jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.integers(1, 1000, leaf.shape), leaf.dtype) / 7
            if leaf.dtype == jnp.float32
            else leaf + 17
        ),
        optimizer.init(tiny_params),
    )
    return TrainState(jnp.asarray(17, jnp.int32), tiny_params, opt_state)


@pytest.fixture
def run_dir(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    return tmp_path


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(array, other, strict=True)


def test_a_state_comes_back_bit_for_bit(run_dir, state):
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.latest_step == 17
        assert_same(checkpoints.restore(state), state)
        assert_same(checkpoints.restore(jax.eval_shape(lambda: state)), state)


def test_parameters_come_back_alone(run_dir, state, tiny_config):
    with Checkpoints(run_dir) as checkpoints:
        assert_same(checkpoints.restore_params(param_shapes(tiny_config)), state.params)


def test_the_latest_of_several_is_restored(run_dir, state):
    later = state._replace(
        step=jnp.asarray(100, jnp.int32), params=jax.tree.map(jnp.negative, state.params)
    )
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(later)
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.latest_step == 100
        assert_same(checkpoints.restore(state), later)


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path, state):
    mortal = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(mortal)
        for leaf in jax.tree.leaves(mortal):
            leaf.delete()
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(state), state)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path, tiny_config):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="holds no finished checkpoint"),
    ):
        checkpoints.restore_params(param_shapes(tiny_config))


def test_a_checkpoint_of_another_model_is_refused(run_dir, tiny_config):
    other = param_shapes(dataclasses.replace(tiny_config, n_layer=3))
    with (
        Checkpoints(run_dir) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/17 is of another model: its h_2/attn"),
    ):
        checkpoints.restore_params(other)
