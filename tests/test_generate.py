"""Generation: the same text as by full forward passes, whatever the batch, bucket or cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.generation import decode
from gpt2_jax.generation.decode import generate, room
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.model import GPT2

RNG = np.random.default_rng(8)
PROMPTS = [RNG.integers(0, 97, length).tolist() for length in (4, 1, 17)]
WARM = Sampling(temperature=1.5, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def greedy(tiny_config, tiny_params):
    """Greedy text without any cache: every token from a full pass over all before it."""
    forward = jax.jit(GPT2(tiny_config).apply)

    def continue_prompt(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            # Padding at the end changes nothing before it.
            padded_1T = np.zeros((1, tiny_config.n_positions), np.int32)
            padded_1T[0, : len(tokens)] = tokens
            logits_1TV = forward({"params": tiny_params}, padded_1T)
            tokens.append(int(jnp.argmax(logits_1TV[0, len(tokens) - 1])))
        return tokens[len(prompt) :]

    return continue_prompt


def test_cached_decoding_gives_the_text_of_full_passes(tiny_config, tiny_params, greedy):
    texts = generate(tiny_params, tiny_config, PROMPTS, max_new_tokens=9)
    assert texts == [greedy(prompt, 9) for prompt in PROMPTS]


def test_every_row_stops_where_its_context_is_full(tiny_config, tiny_params, greedy):
    """A prompt that fills the context leaves room for one token: it needs no position."""
    prompts = [RNG.integers(0, 97, length).tolist() for length in (32, 31, 20)]
    texts = generate(tiny_params, tiny_config, prompts, max_new_tokens=8)
    assert [len(text) for text in texts] == [1, 2, 8]
    assert texts == [greedy(p, n) for p, n in zip(prompts, (1, 2, 8), strict=True)]
    assert [room(tiny_config, len(prompt)) for prompt in prompts] == [1, 2, 13]


def test_a_row_ends_with_the_end_of_text_token(tiny_config, tiny_params, greedy):
    free = [greedy(prompt, 9) for prompt in PROMPTS]
    end = next(token for token in free[1] if token not in free[0])
    config = dataclasses.replace(tiny_config, eos_token_id=end)
    texts = generate(tiny_params, config, PROMPTS, max_new_tokens=9)
    expected = [text[: text.index(end) + 1] if end in text else text for text in free]
    assert texts == expected
    assert texts[1][-1] == end
    assert len(texts[1]) < len(texts[0]) == 9


def test_the_seed_fixes_the_text_and_the_row_whatever_the_batch(tiny_config, tiny_params):
    def sample(prompts, seed, count=9):
        return generate(
            tiny_params, tiny_config, prompts, max_new_tokens=count, sampling=WARM, seed=seed
        )

    texts = sample(PROMPTS, seed=5)
    assert sample(PROMPTS, seed=5) == texts
    assert sample(PROMPTS, seed=6) != texts
    assert sample(PROMPTS, seed=5, count=4) == [text[:4] for text in texts]
    alone = sample(PROMPTS[:1], seed=5)
    assert alone == texts[:1]
    same = sample([PROMPTS[0]] * 3, seed=5)
    assert same[0] == texts[0]
    assert len({tuple(text) for text in same}) == 3


def test_every_step_draws_anew(tiny_config, tiny_params):
    """Without weights every token is equally likely, so a text that repeats itself is no draw."""
    nothing = jax.tree.map(jnp.zeros_like, tiny_params)
    for text in generate(nothing, tiny_config, PROMPTS, max_new_tokens=9, sampling=WARM):
        # Nine draws of 97 tokens hold fewer than six different ones once in ten thousand texts.
        assert len(set(text)) >= 6


def test_a_seed_beyond_32_bits_is_refused_rather_than_cut(tiny_config, tiny_params):
    with pytest.raises(UserError, match="seed"):
        generate(tiny_params, tiny_config, PROMPTS, max_new_tokens=9, sampling=WARM, seed=2**32)


def test_prompts_in_one_bucket_share_one_program(tiny_config, tiny_params):
    def programs(prompts, **options):
        generate(tiny_params, tiny_config, prompts, **{"max_new_tokens": 9, **options})
        return decode._generate._cache_size()

    before = programs(PROMPTS)
    assert programs([prompt[::-1] for prompt in PROMPTS]) == before
    assert programs([[1, 2, 3], [4] * 20, [5]]) == before
    assert programs(PROMPTS, max_new_tokens=3) == before
    assert programs(PROMPTS, seed=1) == before


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [(1, 1024, 32), (32, 1024, 32), (33, 1024, 64), (64, 1024, 64), (600, 1000, 1000), (5, 8, 8)],
)
def test_lengths_are_rounded_up_to_powers_of_two_within_the_context(length, limit, expected):
    assert decode._bucket(length, limit) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([0] * 33, "33 tokens, more than the context of 32"),
        ([3, 97], "token 97 is outside"),
        ([-1], "token -1 is outside"),
    ],
)
def test_bad_prompts_are_refused(tiny_config, tiny_params, prompt, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_params, tiny_config, [[1], prompt], max_new_tokens=2)


def test_there_must_be_something_to_generate(tiny_config, tiny_params):
    assert generate(tiny_params, tiny_config, [], max_new_tokens=2) == []
    with pytest.raises(UserError, match="max_new_tokens=0"):
        generate(tiny_params, tiny_config, [[1]], max_new_tokens=0)


def test_generation_in_bfloat16_stays_in_the_vocabulary(shallow_config, shallow_params):
    (text,) = generate(shallow_params, shallow_config, [[1]], max_new_tokens=32, dtype=jnp.bfloat16)
    assert len(text) == 32
    assert all(0 <= token < 97 for token in text)
