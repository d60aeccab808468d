"""The stream of new tokens: the text of `generate`, with what the model thought of it."""

import itertools

import numpy as np
import pytest
from full_passes import FullPasses

from gpt2_jax.generation.decode import generate, stream
from gpt2_jax.generation.sampling import Sampling

PROMPTS = [np.random.default_rng(8).integers(0, 97, n).tolist() for n in (4, 1, 17)]
WARM = Sampling(temperature=1.5)
LIMITS = [5, 12, 9]


def texts_of(tokens, rows=3):
    texts = [[] for _ in range(rows)]
    for new in tokens:
        texts[new.row].append(new.token)
    return texts


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": LIMITS},
        {
            "max_new_tokens": [30, 60, 50],
            "sampling": Sampling(1.5, top_k=40, repetition_penalty=1.2),
            "seed": 4,
            "precision": "int8",
            "overflow": "slide",
        },
    ],
    ids=["greedy", "other options"],
)
def test_a_stream_gives_the_texts_of_generate(shallow_config, shallow_params, options):
    expected = generate(shallow_params, shallow_config, PROMPTS, **options)
    assert list(map(len, expected)) == options["max_new_tokens"]
    streamed = stream(shallow_params, shallow_config, PROMPTS, **options, alternatives=3)
    assert texts_of(streamed) == expected


def test_tokens_come_in_the_order_they_are_made(shallow_config, shallow_params):
    new = list(stream(shallow_params, shallow_config, PROMPTS, max_new_tokens=LIMITS))
    turns = itertools.product(range(max(LIMITS)), range(3))
    assert [token.row for token in new] == [row for turn, row in turns if turn < LIMITS[row]]
    assert all(token.alternatives == [] and token.logprob <= 0 for token in new)
    ends = {token.row: index for index, token in enumerate(new)}
    assert [token.finish_reason for token in new] == [
        "length" if index in ends.values() else None for index in range(len(new))
    ]


@pytest.mark.parametrize("alternatives", [3, 97])
def test_probabilities_are_the_models_own(shallow_config, shallow_params, alternatives):
    """Whatever the sampling rules made of them, with the likeliest tokens first."""
    reference = FullPasses(shallow_params, shallow_config)
    new = list(
        stream(
            shallow_params,
            shallow_config,
            PROMPTS,
            max_new_tokens=LIMITS,
            sampling=Sampling(temperature=0, repetition_penalty=2.0),
            alternatives=alternatives,
        )
    )
    assert any(token.alternatives[0][0] != token.token for token in new), "no rule was felt"
    for row, prompt in enumerate(PROMPTS):
        tokens = [token for token in new if token.row == row]
        contexts = reference.contexts(prompt, [token.token for token in tokens])
        for token, context in zip(tokens, contexts, strict=True):
            logprob_V = reference.logprobs(context)
            # Logits of either side are near 3 and off by some 1e-6.
            assert token.logprob == pytest.approx(logprob_V[token.token], rel=0, abs=1e-5)
            ids = [likely for likely, _ in token.alternatives]
            assert ids == np.argsort(-logprob_V, kind="stable")[:alternatives].tolist()
            logprobs = [logprob for _, logprob in token.alternatives]
            np.testing.assert_allclose(logprobs, logprob_V[ids], rtol=0, atol=1e-5)


def test_a_greedy_token_is_its_own_likeliest_alternative(shallow_config, shallow_params):
    for new in stream(shallow_params, shallow_config, PROMPTS, max_new_tokens=9, alternatives=3):
        assert new.alternatives[0] == (new.token, new.logprob)


def test_a_stream_may_be_left_and_another_begun(shallow_config, shallow_params):
    """The state that the device works on belongs to one stream alone."""

    def start(prompts):
        return stream(shallow_params, shallow_config, prompts, max_new_tokens=12)

    expected = texts_of(start(PROMPTS))
    for count in (1, 2, 4, 11):
        left = start(PROMPTS)
        assert len(list(itertools.islice(left, count))) == count
        left.close()
        assert texts_of(start(PROMPTS)) == expected


def test_streams_that_take_turns_do_not_disturb_each_other(shallow_config, shallow_params):
    def start(prompts, seed):
        return stream(
            shallow_params,
            shallow_config,
            prompts,
            max_new_tokens=12,
            sampling=WARM,
            seed=seed,
            alternatives=3,
        )

    several = [(PROMPTS, 0), (PROMPTS[::-1], 0), (PROMPTS, 1)]
    alone = [list(start(*arguments)) for arguments in several]
    assert alone[0] != alone[2]
    in_turn = zip(*(start(*arguments) for arguments in several), strict=True)
    assert [list(tokens) for tokens in zip(*in_turn, strict=True)] == alone
