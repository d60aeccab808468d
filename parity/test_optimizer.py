"""Optimizer steps are those of `torch.optim.AdamW`, with clipping, decay mask and schedule."""

import dataclasses

import numpy as np
import pytest
import torch

from gpt2_jax.config import SIZES
from gpt2_jax.training.settings import OptimizerSettings
from parity.adamw import check_optimizer, random_gradients
from parity.gradients import torch_gradients
from parity.models import Models, random_models, random_tokens
from parity.outcomes import Prove

SETTINGS = OptimizerSettings(warmup_steps=2)


def test_a_step_at_full_width(prove: Prove) -> None:
    """The first step of a run without warm-up has the full learning rate."""
    models = random_models(
        dataclasses.replace(SIZES["gpt2"], n_layer=1, vocab_size=5003, eos_token_id=None), seed=0
    )
    settings = dataclasses.replace(SETTINGS, warmup_steps=0)
    prove(*check_optimizer(models, random_gradients(models, 1), settings))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 1e3},
        {"beta1": 0.8, "beta2": 0.999, "epsilon": 1e-5},
        {"weight_decay": 0.0},
    ],
    ids=["usual", "not clipped", "betas", "no decay"],
)
def test_steps_through_warm_up_and_cosine(small: Models, changes: dict, prove: Prove) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)
    prove(*check_optimizer(small, random_gradients(small, 5), settings, steps=5))


def test_steps_by_the_gradients_of_the_loss(small: Models, prove: Prove) -> None:
    gradients = [
        torch_gradients(small.reference, random_tokens(small.config, (2, 17), seed=seed))
        for seed in range(2)
    ]
    prove(*check_optimizer(small, gradients, SETTINGS))


def test_gradients_of_zero_move_nothing_but_what_decays(small: Models, prove: Prove) -> None:
    zero = {
        name: np.zeros(parameter.shape, np.float32)
        for name, parameter in small.reference.named_parameters()
    }
    prove(*check_optimizer(small, [zero, zero], SETTINGS))


def test_comparing_leaves_the_models_as_they_were(small: Models) -> None:
    before = {name: array.clone() for name, array in small.reference.state_dict().items()}
    check_optimizer(small, random_gradients(small, 1), SETTINGS)
    assert all(
        torch.equal(array, before[name]) for name, array in small.reference.state_dict().items()
    )
