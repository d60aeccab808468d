"""Generation: the same text as by full forward passes, whatever the batch, bucket or cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_passes import FullPasses

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.generation.decode import generate, room, stream
from gpt2_jax.generation.engine import CAPACITY
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.model import Params, param_shapes
from gpt2_jax.packed import pack

WARM = Sampling(temperature=1.5)


def random_prompts(*lengths):
    rng = np.random.default_rng(lengths)
    return [rng.integers(0, 97, length).tolist() for length in lengths]


PROMPTS = random_prompts(4, 1, 17)


@pytest.fixture(scope="module")
def long_config(shallow_config) -> GPT2Config:
    """A context of three times what one call of the decode loop makes."""
    return dataclasses.replace(
        shallow_config, n_positions=3 * CAPACITY, vocab_size=512, tie_word_embeddings=False
    )


@pytest.fixture(scope="module")
def long_params(long_config) -> Params:
    params = drawn(long_config, 0.2)
    # Positions that count as much as tokens keep greedy texts from repeating themselves.
    return {**params, "wpe": jax.tree.map(lambda table_TD: 3 * table_TD, params["wpe"])}


def drawn(config: GPT2Config, stddev: float) -> Params:
    rng = np.random.default_rng(2)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, stddev, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))


def collect(tokens):
    """The rows of a stream: {row: (tokens, finish reason)}."""
    texts, reasons = {}, {}
    for new in tokens:
        assert new.row not in reasons, "a token after the last one"
        texts.setdefault(new.row, []).append(new.token)
        if new.finish_reason is not None:
            reasons[new.row] = new.finish_reason
    assert texts.keys() == reasons.keys()
    return {row: (text, reasons[row]) for row, text in texts.items()}


def test_cached_decoding_gives_the_text_of_full_passes(tiny_config, tiny_params):
    reference = FullPasses(tiny_params, tiny_config)
    texts = generate(tiny_params, tiny_config, PROMPTS, max_new_tokens=9)
    assert texts == [reference.greedy(prompt, 9) for prompt in PROMPTS]


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_one_row_gives_the_text_of_full_passes_too(shallow_config, shallow_params, precision):
    """A single row takes matrix products of its own; full passes have many rows."""
    packed = pack(shallow_params, precision)
    [text] = generate(packed, shallow_config, [PROMPTS[0]], max_new_tokens=29)
    assert text == FullPasses(packed, shallow_config).greedy(PROMPTS[0], 29)


def test_every_row_stops_where_its_context_is_full(tiny_config, tiny_params):
    """A prompt that fills the context leaves room for one token: it needs no position."""
    reference = FullPasses(tiny_params, tiny_config)
    prompts = random_prompts(32, 31, 20)
    texts = generate(tiny_params, tiny_config, prompts, max_new_tokens=8)
    assert [len(text) for text in texts] == [1, 2, 8]
    assert texts == [reference.greedy(p, n) for p, n in zip(prompts, (1, 2, 8), strict=True)]
    assert [room(tiny_config, len(prompt)) for prompt in prompts] == [1, 2, 13]


def test_rows_end_at_their_own_limits_within_and_between_calls_of_the_loop(
    long_config, long_params
):
    """The prompts make one token, each call of the loop CAPACITY more."""
    limits = [1, CAPACITY, CAPACITY + 1, CAPACITY + 2, 90, 2 * CAPACITY + 1, 2 * CAPACITY + 2, 150]
    prompts = random_prompts(7, 1, 3, 16, 5, 40, 2, 9)
    expected = [
        FullPasses(long_params, long_config).greedy(prompt, limit)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert all(len(set(text)) > 20 for text in expected[1:]), "texts that show little"
    assert generate(long_params, long_config, prompts, max_new_tokens=limits) == expected
    streamed = collect(stream(long_params, long_config, prompts, max_new_tokens=limits))
    assert streamed == {row: (text, "length") for row, text in enumerate(expected)}


def test_why_a_row_ended(long_config, long_params):
    """In every combination, however far into the text."""
    [start] = random_prompts(8)
    text = FullPasses(long_params, long_config).greedy(start, room(long_config, 8))
    # A token that first occurs far into the text, in a context that is full there.
    count = max(text.index(token) for token in text) + 1
    assert count > CAPACITY + 10
    text, end = text[:count], text[count - 1]
    config = dataclasses.replace(long_config, n_positions=8 + count - 1, eos_token_id=end)
    positions_TD = long_params["wpe"]["embedding"][: config.n_positions]
    params = {**long_params, "wpe": {"embedding": positions_TD}}
    # A text without that token.
    for seed in range(9):
        [_, other] = random_prompts(seed, config.n_positions - 20)
        free = FullPasses(params, config).greedy(other, 21)
        if end not in free:
            break
    assert end not in free
    # Greedy text goes on where its own beginning ends.
    near, last = start + text[:-6], start + text[:-1]
    cases = [
        (start, count, text, "stop"),  # ended, limited and full at once
        (start, count - 1, text[:-1], "length"),
        (start, 2 * count, text, "stop"),  # ended and full
        (near, 7, text[-6:], "stop"),
        (near, 5, text[-6:-1], "length"),
        (last, 1, text[-1:], "stop"),  # the first token already
        (other, 21, free, "length"),  # limited and full
        (other, 22, free, "context"),
    ]
    prompts, limits = [case[0] for case in cases], [case[1] for case in cases]
    ended = collect(stream(params, config, prompts, max_new_tokens=limits))
    assert ended == {row: case[2:] for row, case in enumerate(cases)}
    texts = generate(params, config, prompts, max_new_tokens=limits)
    assert texts == [case[2] for case in cases]


def test_padding_is_never_seen(long_config, long_params):
    """Prompts are padded with token 0: its vector matters only where it is really there."""
    table_VD = long_params["wte"]["embedding"]
    strange = {**long_params, "wte": {"embedding": table_VD.at[0].set(1e3 * table_VD[1])}}
    prompts = [[1, *prompt] for prompt in PROMPTS]
    texts = generate(long_params, long_config, prompts, max_new_tokens=9)
    assert not any(0 in tokens for tokens in prompts + texts)
    assert generate(strange, long_config, prompts, max_new_tokens=9) == texts
    prompts[1] = [0]
    zeros = generate(long_params, long_config, prompts, max_new_tokens=9)
    changed = generate(strange, long_config, prompts, max_new_tokens=9)
    assert [a == b for a, b in zip(zeros, changed, strict=True)] == [True, False, True]


@pytest.mark.slow
def test_the_seed_fixes_the_text_whatever_the_batch(long_config, long_params):
    def sample(prompts, seed=5, count=9):
        return generate(
            long_params, long_config, prompts, max_new_tokens=count, sampling=WARM, seed=seed
        )

    texts = sample(PROMPTS)
    assert sample(PROMPTS) == texts
    assert sample(PROMPTS, seed=6) != texts
    assert sample(PROMPTS[::-1]) == texts[::-1]
    assert sample(PROMPTS, count=[4, 9, 100])[:2] == [texts[0][:4], texts[1]]
    assert sample(PROMPTS, count=[4, 9, 100])[2][:9] == texts[2]
    # Other rows, in buckets of other lengths; and none at all.
    longer, short = random_prompts(100, 2)
    assert sample([longer, PROMPTS[1], short])[1] == texts[1]
    assert sample([PROMPTS[2]]) == texts[2:]


def test_copies_of_a_prompt_draw_differently_and_in_order(long_config, long_params):
    def sample(prompts):
        return generate(long_params, long_config, prompts, max_new_tokens=9, sampling=WARM, seed=5)

    one, other, _ = PROMPTS
    copies = sample([one, one, one])
    assert len(set(map(tuple, copies))) == 3
    assert sample([one, other, one]) == [copies[0], sample(PROMPTS)[1], copies[1]]
    assert sample([other, one, other])[1] == copies[0]


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_packed_parameters_have_their_precision(tiny_config, tiny_params, precision):
    packed = pack(tiny_params, precision)
    for other in {"f32", "bf16", "int8"} - {precision}:
        with pytest.raises(UserError, match=f"precision='{other}' does not fit .* {precision}"):
            generate(packed, tiny_config, PROMPTS, max_new_tokens=9, precision=other)


def test_parameters_may_be_packed_beforehand(long_config, long_params):
    options = {"max_new_tokens": 90, "precision": "int8"}
    texts = generate(long_params, long_config, PROMPTS, **options)
    packed = pack(long_params, "int8")
    assert generate(packed, long_config, PROMPTS, **options) == texts
    assert generate(packed, long_config, PROMPTS, max_new_tokens=90) == texts
    assert texts != generate(long_params, long_config, PROMPTS, max_new_tokens=90)


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_a_vocabulary_of_three_tokens_and_no_end_of_text(precision):
    """As the nano-sort model has it: an odd context, an untied head, widths of no round number."""
    config = GPT2Config(
        vocab_size=3,
        n_positions=11,
        n_embd=12,
        n_layer=1,
        n_head=3,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    packed = pack(drawn(config, 0.5), precision)
    prompts = [[0, 2, 1, 0, 1, 2], [1], [2] * 11]
    texts = generate(packed, config, prompts, max_new_tokens=6)
    reference = FullPasses(packed, config)
    counts = (6, 6, 1)
    assert texts == [reference.greedy(p, n) for p, n in zip(prompts, counts, strict=True)]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": [3, 0, 3]}, "max_new_tokens=0"),
        ({"max_new_tokens": [3, 2.5, 3]}, "max_new_tokens=2.5"),
        ({"max_new_tokens": [3, 3]}, "max_new_tokens has 2 limits for 3 prompts"),
        ({"max_new_tokens": []}, "max_new_tokens has 0 limits for 3 prompts"),
        # Beyond 32 bits a seed would be cut, and give the text of another.
        ({"seed": 2**32}, "seed=4294967296 must be in"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"overflow": "wrap"}, "overflow='wrap' must be one of stop, slide"),
        ({"precision": "fp16"}, "precision='fp16' must be one of f32, bf16, int8"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tiny_config, tiny_params, options, message):
    """By `stream` too, although it makes its first token only when asked."""
    for function in (generate, stream):
        with pytest.raises(UserError, match=message):
            function(tiny_params, tiny_config, PROMPTS, **{"max_new_tokens": 9, **options})


@pytest.mark.parametrize("alternatives", [-1, 98])
def test_alternatives_are_tokens_of_the_vocabulary(tiny_config, tiny_params, alternatives):
    with pytest.raises(UserError, match=f"alternatives={alternatives} must be between 0 and 97"):
        stream(tiny_params, tiny_config, PROMPTS, max_new_tokens=9, alternatives=alternatives)


def test_no_prompts_give_no_texts(tiny_config, tiny_params):
    assert generate(tiny_params, tiny_config, [], max_new_tokens=2) == []
    assert generate(tiny_params, tiny_config, [], max_new_tokens=[]) == []
    assert list(stream(tiny_params, tiny_config, [], max_new_tokens=2)) == []


def test_prompts_and_limits_may_be_arrays(tiny_config, tiny_params):
    prompts_BT = np.array(random_prompts(5, 5, 5))
    expected = generate(tiny_params, tiny_config, prompts_BT.tolist(), max_new_tokens=[4, 5, 6])
    for array in (prompts_BT, jnp.asarray(prompts_BT)):
        assert generate(tiny_params, tiny_config, array, max_new_tokens=[4, 5, 6]) == expected
    assert all(type(token) is int for text in expected for token in text)


def test_the_largest_seed_is_a_seed(long_config, long_params):
    def sample(seed):
        return generate(
            long_params, long_config, PROMPTS, max_new_tokens=9, sampling=WARM, seed=seed
        )

    assert len({str(sample(seed)) for seed in (0, 2**31, 2**32 - 1)}) == 3
