"""Every parameter's gradient of the training loss is PyTorch's."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from parity.gradients import check_gradients, jax_gradients
from parity.models import Models, random_models, random_tokens
from parity.outcomes import Prove
from parity.rounding import FLOOR

SMALL = GPT2Config(
    vocab_size=131, n_positions=40, n_embd=32, n_layer=2, n_head=4, eos_token_id=None
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_at_124m(gpt2_124m: Models, dtype: str, prove: Prove) -> None:
    tokens_BT = random_tokens(gpt2_124m.config, (2, 65), seed=1)
    checks = check_gradients(gpt2_124m, tokens_BT, jnp.dtype(dtype))
    prove(*checks)
    # Not more, by way of what rounding explains.
    assert [check.bound for check in checks] == [FLOOR[dtype]] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "n_inner": 51},
        {"n_head": 1, "layer_norm_epsilon": 1e-3, "activation_function": "gelu"},
        {"activation_function": "relu", "pad_vocab_size_multiple": 64},
        {"activation_function": "silu"},
        {"activation_function": "tanh"},
    ],
    ids=lambda changes: changes.get("activation_function", "gelu_new"),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_other_architectures(changes: dict, dtype: str, prove: Prove) -> None:
    models = random_models(dataclasses.replace(SMALL, **changes), seed=2)
    prove(*check_gradients(models, random_tokens(models.config, (2, 41)), jnp.dtype(dtype)))


def test_a_single_token_has_gradients_too(prove: Prove) -> None:
    models = random_models(SMALL, seed=3)
    prove(*check_gradients(models, random_tokens(SMALL, (1, 2))))


def test_what_is_not_used_has_no_gradient() -> None:
    """Positions past the text; with an untied head, tokens that are not in the text."""
    config = dataclasses.replace(SMALL, tie_word_embeddings=False)
    models = random_models(config, seed=4)
    tokens_BT = np.array([[5, 7, 11, 7]])
    gradients = jax_gradients(models.params, config, tokens_BT)
    positions_PD, tokens_VD = (gradients[f"transformer.{w}.weight"] for w in ("wpe", "wte"))
    assert positions_PD[:3].any(axis=1).all()
    assert not positions_PD[3:].any()
    assert np.flatnonzero(tokens_VD.any(axis=1)).tolist() == [5, 7, 11]
