"""Greedy continuations are Hugging Face's, token for token, with a cache and without."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from gpt2_jax import tokenizer
from gpt2_jax.config import SIZES
from gpt2_jax.generation.decode import generate
from gpt2_jax.model import GPT2, Params, apply
from parity.checks import LOGITS_BOUND, check_greedy, compare_tokens, huggingface_greedy
from parity.models import Models, random_models, random_tokens
from parity.outcomes import Prove


def random_prompts(models: Models, *lengths: int) -> list[list[int]]:
    return [random_tokens(models.config, (1, n), seed=n)[0].tolist() for n in lengths]


def without_cache(models: Models, prompt: Sequence[int], text: Sequence[int]) -> np.ndarray:
    """Logits before each token of a text, [T, V], from one pass over all of it.

    Where the likeliest tokens are the text, it is by induction what full passes for one token
    after another give.
    """
    model, tokens = GPT2(models.config), [*prompt, *text[:-1]]
    # Padding at the end changes nothing before it; two lengths need two programs.
    padded = models.config.n_positions if len(tokens) > 128 else 128
    padded_1T = np.pad(np.array([tokens], np.int32), ((0, 0), (0, padded - len(tokens))))
    x_1TD, _ = features(model, models.params, padded_1T)
    x_1TD = x_1TD[:, len(prompt) - 1 : len(tokens)]
    return np.asarray(apply(model, models.params, x_1TD, method="logits")[0])


@functools.partial(jax.jit, static_argnums=0)
def features(model: GPT2, params: Params, tokens_BT: jax.Array) -> Any:
    return apply(model, params, tokens_BT, method="features")


def assert_greedy(
    models: Models, prompts: list[list[int]], limits: Sequence[int], prove: Prove
) -> None:
    """Rows of one call against passes without a cache, and against Hugging Face row by row."""
    texts = generate(models.params, models.config, prompts, max_new_tokens=limits)
    assert [len(text) for text in texts] == list(limits)
    assert all(len(set(text)) > 5 for text in texts), "texts that show little"
    for prompt, text in zip(prompts, texts, strict=True):
        logits_TV = without_cache(models, prompt, text)
        likeliest = logits_TV.argmax(axis=-1).tolist()
        prove(compare_tokens("greedy tokens, with and without cache", text, likeliest))
        # Nearer than rounding, the first two would be equally right.
        second_T, first_T = np.sort(logits_TV, axis=-1)[:, -2:].T
        assert (first_T - second_T).min() > LOGITS_BOUND
        theirs = huggingface_greedy(models, prompt, len(text))
        prove(compare_tokens("greedy tokens, rows of a batch", text, theirs))


@pytest.mark.slow
def test_prompts_of_1_to_1000_tokens_at_124m_up_to_the_last_position(prove: Prove) -> None:
    """The longest prompt's last token is the 1,025th: made from 1,024, it needs no position."""
    # With a tied head, random weights would repeat the last token for ever.
    config = dataclasses.replace(SIZES["gpt2"], initializer_range=0.1, tie_word_embeddings=False)
    models = random_models(config, seed=0)
    assert_greedy(models, random_prompts(models, 1, 7, 100, 1000), [12, 12, 12, 25], prove)


@pytest.mark.slow
def test_texts_of_hundreds_of_tokens(small: Models, prove: Prove) -> None:
    """From the first position to the last, beside rows that end there as well or before."""
    models = random_models(dataclasses.replace(small.config, n_positions=512), seed=1)
    assert_greedy(models, random_prompts(models, 1, 500, 200), [512, 13, 40], prove)


@pytest.mark.slow
def test_fifty_tokens_at_124m(gpt2_124m: Models, prove: Prove) -> None:
    prompt = tokenizer.encode("Hello, my name is").tolist()
    check = check_greedy(gpt2_124m, prompt, 50)
    prove(check)
    assert check.figure == "50 of 50 equal"


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 48])
def test_prompts_of_any_length_up_to_the_end_of_the_context(
    small: Models, length: int, prove: Prove
) -> None:
    prompt = random_tokens(small.config, (1, length), seed=length)[0].tolist()
    prove(check_greedy(small, prompt, 50))


def test_both_stop_at_the_end_of_text(small: Models) -> None:
    """Each row by itself, while the others go on."""
    prompts = random_prompts(small, 4, 1, 9)
    texts = generate(small.params, small.config, prompts, max_new_tokens=20)
    assert len(set(texts[0])) > 5, "the model repeats itself, so this test would show little"
    # Declare a token from the middle of the text to be the end of text.
    end = texts[0][10]
    config = dataclasses.replace(small.config, eos_token_id=end)
    models = random_models(config, seed=1)
    ours = generate(models.params, config, prompts, max_new_tokens=20)
    assert ours == [huggingface_greedy(models, prompt, 20) for prompt in prompts]
    assert ours[0] == texts[0][: texts[0].index(end) + 1]
    assert max(map(len, ours)) == 20
