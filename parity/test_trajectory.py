"""Whole training runs: the same losses step by step in JAX and in PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.training.settings import OptimizerSettings
from parity.models import Models, random_models
from parity.outcomes import Prove, bounded, bounded_each
from parity.trajectory import (
    Curve,
    batches_of,
    check_trajectory,
    llm_c_curves,
    plot_trajectory,
    run_settings,
    train_in_jax,
    train_in_torch,
)


@pytest.fixture(scope="module")
def beginner() -> Models:
    """A model as initialised, of the bytes of a text."""
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=128, n_layer=4, n_head=4, eos_token_id=None
    )
    return random_models(config, seed=0)


# Clipping sets in while the gradients are large, in the first half of the run.
OPTIMIZER = OptimizerSettings(
    learning_rate=3e-4, final_learning_rate=3e-5, warmup_steps=10, clip_norm=2.0
)


@pytest.fixture(scope="module")
def pytorch(beginner: Models) -> Curve:
    settings = run_settings(beginner, 100, optimizer=OPTIMIZER)
    return train_in_torch(beginner, settings, batches_of(settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_steps(beginner: Models, pytorch: Curve, dtype: str, prove: Prove) -> None:
    """With two passes a batch, clipping, weight decay, warm-up and cosine."""
    settings = run_settings(beginner, 100, dtype, OPTIMIZER)
    ours = train_in_jax(beginner, settings, batches_of(settings))
    prove(*check_trajectory(ours, pytorch, dtype=dtype))
    assert min(ours.norms) < OPTIMIZER.clip_norm < max(ours.norms), "clipping always or never"
    if dtype == "float32":
        largest = {
            name: float(np.abs(array - pytorch.parameters[name]).max())
            for name, array in ours.parameters.items()
        }
        allowed = dict.fromkeys(largest, 3e-5)  # a tenth of one step at the highest rate
        prove(bounded_each("training: last parameters", largest, ours.parameters, allowed))
    # It is training that is compared: from knowing nothing to knowing something.
    assert abs(ours.losses[0] - np.log(257)) < 0.1
    assert ours.losses[-1] < 0.6 * ours.losses[0]


def test_llm_cs_ten_steps_from_random_weights(beginner: Models, prove: Prove) -> None:
    text = batches_of(run_settings(beginner, 1))
    tokens = np.concatenate([text(step)[:, :-1].ravel() for step in range(2)])[:257]
    ours, theirs = llm_c_curves(beginner, tokens)
    prove(*check_trajectory(ours, theirs, name="llm.c's protocol"))
    assert ours.losses[-1] < 0.97 * ours.losses[0]


def test_llm_cs_ten_published_losses(real_gpt2: Models, shared: Path, prove: Prove) -> None:
    facts = json.loads((shared / "fixtures/gpt2-124m-facts.json").read_text())["llmc_training"]
    text = (shared / "data/tinyshakespeare.txt").read_text()
    tokens = tokenizer.encode(text[:4000])[:257]
    ours, theirs = llm_c_curves(real_gpt2, tokens)
    # llm.c's own tolerance for its C against PyTorch.
    prove(bounded("llm.c's published losses", facts["losses"], ours.losses, 1e-2))
    prove(*check_trajectory(ours, theirs, name="llm.c's protocol, OpenAI's weights"))


def test_a_run_that_parts_names_the_step(pytorch: Curve) -> None:
    losses = [*pytorch.losses]
    losses[41:] = [loss + 0.01 for loss in losses[41:]]
    check, norms = check_trajectory(Curve(losses, pytorch.norms, {}), pytorch)
    assert norms.passed
    assert not check.passed
    [detail] = check.details
    assert detail.startswith("they part at step 41: ")


def test_a_vocabulary_of_gpt2_learns_from_gpt2_tokens() -> None:
    models = random_models(GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1), seed=0)
    settings = run_settings(models, 1)
    tokens_BT = batches_of(settings)(0)
    assert tokens_BT.shape == (4, 9)
    assert " ".join(tokenizer.decode(tokens_BT[0]).split()).isprintable()


def test_the_plot_is_a_picture(pytorch: Curve, tmp_path: Path) -> None:
    plot_trajectory(pytorch, pytorch, tmp_path / "trajectory.png", "a $ title $")
    assert (tmp_path / "trajectory.png").read_bytes().startswith(b"\x89PNG")
