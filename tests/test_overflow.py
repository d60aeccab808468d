"""Texts longer than the context: its last half is read again, and the text goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_passes import FullPasses, cut

from gpt2_jax.generation.decode import generate, stream
from gpt2_jax.generation.sampling import GREEDY, Sampling


def random_prompts(*lengths):
    return [np.random.default_rng(n).integers(0, 97, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def with_context(shallow_config, shallow_params):
    """The small model with another number of positions: (params, config)."""

    def change(n_positions, **changes):
        config = dataclasses.replace(shallow_config, n_positions=n_positions, **changes)
        table_TD = np.random.default_rng(3).normal(0, 0.5, (n_positions, config.n_embd))
        wpe = {"embedding": jnp.asarray(table_TD, jnp.float32)}
        return {**shallow_params, "wpe": wpe}, config

    return change


@pytest.mark.parametrize(
    ("n_positions", "lengths", "sampling"),
    [
        (8, (1, 5, 8), Sampling(temperature=0, repetition_penalty=1.3)),
        (7, (7, 6, 2), GREEDY),
        (2, (1, 2, 2), GREEDY),
        (1, (1, 1, 1), GREEDY),
    ],
)
def test_the_last_half_is_read_again(with_context, n_positions, lengths, sampling):
    """Rows whose contexts are full at different times, and some that end before that.

    The repetition penalty knows all of a text, not only what is in its context.
    """
    params, config = with_context(n_positions)
    reference = FullPasses(params, config)
    prompts, limits = random_prompts(*lengths), [40, 80, 3]
    texts = generate(
        params, config, prompts, max_new_tokens=limits, sampling=sampling, overflow="slide"
    )
    assert texts == [
        reference.greedy(prompt, limit, sampling.repetition_penalty)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]


def test_one_row_slides_too(with_context):
    params, config = with_context(8)
    [prompt] = random_prompts(5)
    [text] = generate(params, config, [prompt], max_new_tokens=40, overflow="slide")
    assert text == FullPasses(params, config).greedy(prompt, 40)


def test_a_text_ends_as_ever_while_it_slides(with_context):
    params, config = with_context(8)
    prompts = random_prompts(1, 5, 8)
    texts = [FullPasses(params, config).greedy(prompt, 40) for prompt in prompts]
    # A token that first comes when the context has been full before.
    end = max(texts[0], key=texts[0].index)
    assert texts[0].index(end) > 8
    config = dataclasses.replace(config, eos_token_id=end)
    new = list(stream(params, config, prompts, max_new_tokens=[40, 40, 20], overflow="slide"))
    limits = (40, 40, 20)
    expected = [cut(text[:limit], end) for text, limit in zip(texts, limits, strict=True)]
    assert [[n.token for n in new if n.row == row] for row in range(3)] == expected
    reasons = {n.row: n.finish_reason for n in new if n.finish_reason is not None}
    assert reasons == {
        row: "stop" if text[-1] == end else "length" for row, text in enumerate(expected)
    }
    assert reasons[0] == "stop"


def test_what_is_drawn_follows_from_the_half_that_was_read_again(with_context):
    params, config = with_context(8)
    reference = FullPasses(params, config)
    prompts = random_prompts(1, 5, 8)
    options = {"max_new_tokens": 40, "sampling": Sampling(1.5), "overflow": "slide"}
    new = list(stream(params, config, prompts, **options))
    for row, prompt in enumerate(prompts):
        tokens = [token for token in new if token.row == row]
        contexts = reference.contexts(prompt, [token.token for token in tokens])
        for token, context in zip(tokens, contexts, strict=True):
            expected = reference.logprobs(context)[token.token]
            assert token.logprob == pytest.approx(expected, rel=0, abs=1e-5)


def test_sliding_does_not_draw_the_same_again(with_context):
    """Without weights only the draws matter: they are those of a context without an end."""
    options = {"max_new_tokens": 40, "sampling": Sampling(1.5), "seed": 1}
    prompts = random_prompts(1, 5, 8)
    texts = []
    for n_positions, overflow in ((8, "slide"), (64, "stop")):
        params, config = with_context(n_positions)
        nothing = jax.tree.map(jnp.zeros_like, params)
        new = list(stream(nothing, config, prompts, **options, overflow=overflow))
        texts.append([[n.token for n in new if n.row == row] for row in range(3)])
    assert texts[0] == texts[1]
    # Forty draws of 97 tokens hold fewer than 20 different ones once in a hundred million texts.
    assert all(len(set(text)) >= 20 for text in texts[0])


def test_a_context_with_room_is_the_same_either_way(with_context):
    params, config = with_context(64)
    prompts = random_prompts(1, 5, 8)
    stop, slide = (
        generate(params, config, prompts, max_new_tokens=20, overflow=overflow)
        for overflow in ("stop", "slide")
    )
    assert stop == slide
