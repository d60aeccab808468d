"""Greedy continuations are Hugging Face's, token for token."""

import dataclasses

import pytest

from gpt2_jax import tokenizer
from gpt2_jax.generation.decode import generate
from parity.checks import check_greedy, compare_tokens, huggingface_greedy
from parity.models import Models, random_models, random_tokens


def test_fifty_tokens_at_124m(gpt2_124m: Models) -> None:
    prompt = tokenizer.encode("Hello, my name is").tolist()
    check = check_greedy(gpt2_124m, prompt, 50)
    assert check.passed, check
    assert check.figure == "50 of 50 equal"


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 48])
def test_prompts_of_any_length_up_to_the_end_of_the_context(small: Models, length: int) -> None:
    prompt = random_tokens(small.config, (1, length), seed=length)[0].tolist()
    check = check_greedy(small, prompt, 50)
    assert check.passed, check


def test_prompts_of_different_lengths_in_one_call(small: Models) -> None:
    prompts = [random_tokens(small.config, (1, n), seed=n)[0].tolist() for n in (1, 5, 17, 40)]
    together = generate(small.params, small.config, prompts, max_new_tokens=12)
    for prompt, ours in zip(prompts, together, strict=True):
        assert compare_tokens("greedy", ours, huggingface_greedy(small, prompt, 12)).passed


def test_both_stop_at_the_end_of_text(small: Models) -> None:
    prompt = random_tokens(small.config, (1, 4), seed=9)[0].tolist()
    [text] = generate(small.params, small.config, [prompt], max_new_tokens=20)
    assert len(set(text)) > 5, "the model repeats itself, so this test would show little"
    # Declare a token from the middle of the text to be the end of text.
    end = text[10]
    config = dataclasses.replace(small.config, eos_token_id=end)
    models = random_models(config, seed=1)
    [ours] = generate(models.params, config, [prompt], max_new_tokens=20)
    assert ours == huggingface_greedy(models, prompt, 20)
    assert ours == text[: text.index(end) + 1]
