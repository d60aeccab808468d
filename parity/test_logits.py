"""The three models compute the same logits and the same loss."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from gpt2_jax.config import GPT2Config
from parity.checks import check_logits, check_loss, jax_logits, torch_logits
from parity.models import Models, random_models, random_tokens
from parity.outcomes import Check, Prove, relative_error
from parity.rounding import to_numpy

SMALL = GPT2Config(
    vocab_size=131, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1
)

VARIANTS = {
    "plain": {},
    "untied head": {"tie_word_embeddings": False},
    "one head": {"n_head": 1},
    "n_inner": {"n_inner": 51},
    "eps 1e-3": {"layer_norm_epsilon": 1e-3},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "padded vocabulary": {"pad_vocab_size_multiple": 64},
}


def test_logits_at_124m(gpt2_124m: Models, prove: Prove) -> None:
    prove(*check_logits(gpt2_124m, random_tokens(gpt2_124m.config, (1, 1024))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_at_124m(gpt2_124m: Models, dtype: str, prove: Prove) -> None:
    prove(*check_loss(gpt2_124m, random_tokens(gpt2_124m.config, (2, 129), seed=1), dtype))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_of_every_architecture(changes: dict, prove: Prove) -> None:
    models = random_models(dataclasses.replace(SMALL, **changes), seed=2)
    prove(*check_logits(models, random_tokens(models.config, (2, 40)), bound=2e-6))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 7)])
def test_logits_of_every_length(shape: tuple[int, int], prove: Prove) -> None:
    models = random_models(SMALL, seed=3)
    prove(*check_logits(models, random_tokens(SMALL, shape), bound=2e-6))


def test_reference_is_hugging_faces_twin(small: Models) -> None:
    logits = torch_logits(small, random_tokens(small.config, (2, 48)))
    # Same operations in the same order, so rounding differs at most in how products are summed;
    # the logits are of order 10, where one float32 ulp is 9.5e-7.
    np.testing.assert_allclose(logits["reference"], logits["Hugging Face"], rtol=0, atol=1e-5)


def test_bfloat16_is_nearer_to_float32_than_pytorchs(small: Models, prove: Prove) -> None:
    tokens_BT = random_tokens(small.config, (2, 48))
    exact_BTV = torch_logits(small, tokens_BT)["Hugging Face"]
    narrow = copy.deepcopy(small.huggingface).bfloat16()
    with torch.no_grad():
        theirs_BTV = to_numpy(narrow(torch.from_numpy(tokens_BT)).logits)
    ours_BTV = jax_logits(small, tokens_BT, "bfloat16")
    ours, theirs = (relative_error(logits, exact_BTV) for logits in (ours_BTV, theirs_BTV))
    shape, name = ours_BTV.shape, "logits, JAX - float32, as a share of PyTorch's own"
    prove(Check(name, ours / theirs, 1.0, shape, "bfloat16"))


def test_padding_of_the_vocabulary_never_shows() -> None:
    plain = random_models(SMALL, seed=4)
    padded = random_models(dataclasses.replace(SMALL, pad_vocab_size_multiple=64), seed=4)
    assert padded.params["wte"]["embedding"].shape == (192, 32)
    tokens_BT = random_tokens(SMALL, (2, 9))
    np.testing.assert_array_equal(jax_logits(padded, tokens_BT).shape, (2, 9, 131))
    np.testing.assert_allclose(
        jax_logits(padded, tokens_BT), jax_logits(plain, tokens_BT), rtol=0, atol=2e-6
    )
