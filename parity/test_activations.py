"""Every activation on the way to the logits is PyTorch's, in float32 and in bfloat16."""

import dataclasses

import jax.numpy as jnp
import pytest

from gpt2_jax.config import GPT2Config
from parity.activations import SITES, check_activations
from parity.models import Models, random_models, random_tokens
from parity.outcomes import Prove
from parity.rounding import FLOOR

TINY = GPT2Config(
    vocab_size=97, n_positions=16, n_embd=36, n_layer=2, n_head=3, eos_token_id=None
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_at_124m(gpt2_124m: Models, dtype: str, prove: Prove) -> None:
    tokens_BT = random_tokens(gpt2_124m.config, (2, 64))
    checks, _ = check_activations(gpt2_124m, tokens_BT, jnp.dtype(dtype))
    prove(*checks)
    assert [check.bound for check in checks] == [FLOOR[dtype]] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "n_inner": 50, "n_head": 1},
        {"layer_norm_epsilon": 1e-3, "activation_function": "gelu"},
        {"activation_function": "relu", "pad_vocab_size_multiple": 64},
    ],
    ids=["one head", "gelu", "relu"],
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 16)], ids=["T=1", "T=n_positions"])
def test_activations_of_other_architectures(
    changes: dict, shape: tuple[int, int], prove: Prove
) -> None:
    models = random_models(dataclasses.replace(TINY, **changes), seed=5)
    checks, differences = check_activations(models, random_tokens(models.config, shape))
    prove(*checks)
    blocks = [f"h_{layer}.{site}" for layer in range(2) for site in SITES]
    for found in differences.values():
        assert [difference.place for difference in found] == [
            "embedding",
            *blocks,
            "ln_f",
            "logits",
        ]


def test_weights_that_amplify_rounding_are_held_to_what_pytorch_reaches(prove: Prove) -> None:
    config = dataclasses.replace(TINY, n_layer=6, n_embd=96, initializer_range=1.0)
    models = random_models(config, seed=6)
    checks, _ = check_activations(models, random_tokens(config, (4, 16)))
    prove(*checks)
    assert all(check.largest > FLOOR["float32"] for check in checks), "weights too small for this"


def test_comparing_leaves_the_models_as_they_were(small: Models) -> None:
    before = {name: array.clone() for name, array in small.huggingface.state_dict().items()}
    usual = small.huggingface.config._attn_implementation
    check_activations(small, random_tokens(small.config, (1, 8)), jnp.bfloat16)
    after = small.huggingface.state_dict()
    assert all(after[name].equal(array) for name, array in before.items())
    assert small.huggingface.config._attn_implementation == usual
    hooks = [
        hook
        for model in (small.huggingface, small.reference)
        for module in model.modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]
    assert not hooks
