"""The loss of what may follow a context is that of one text at a time, however rows are made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.evaluation import continuations
from gpt2_jax.evaluation.continuations import make_scorer
from gpt2_jax.evaluation.rows import MOST_CONTINUATIONS, Question, make_batches, row_length
from gpt2_jax.lora import adapt, init_lora, merge
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.model import GPT2, apply

VOCABULARY = 97


def draw(*sizes: tuple[int, ...], seed: int = 0) -> list[Question]:
    """Questions of random tokens: the length of the context, then those of the continuations."""
    rng = np.random.default_rng(seed)
    tokens = functools.partial(rng.integers, 0, VOCABULARY)
    return [
        Question(tokens(size=first), tuple(tokens(size=size) for size in rest))
        for first, *rest in sizes
    ]


forward = jax.jit(apply, static_argnums=0)


def plain(model, params, text, count):
    """Losses of the last `count` tokens of a text, and whether each was the likeliest."""
    text = np.asarray(text)[-(model.config.n_positions + 1) :]
    count = min(count, len(text) - 1)
    inputs_1T = np.zeros((1, model.config.n_positions), int)
    inputs_1T[0, : len(text) - 1] = text[:-1]
    logits_1TV = np.asarray(forward(model, params, inputs_1T), np.float64)
    logits_TV = logits_1TV[0, len(text) - 1 - count : len(text) - 1]
    top_T = logits_TV.max(axis=-1)
    log_sum_T = top_T + np.log(np.exp(logits_TV - top_T[:, None]).sum(axis=-1))
    losses_T = log_sum_T - logits_TV[np.arange(count), text[-count:]]
    return losses_T, bool((logits_TV.argmax(axis=-1) == text[-count:]).all())


def check(model, params, questions, found):
    assert [len(question.continuations) for question in questions] == list(map(len, found))
    for (context, endings), results in zip(questions, found, strict=True):
        for ending, result in zip(endings, results, strict=True):
            text = np.concatenate([context, ending])
            losses_E, greedy = plain(model, params, text, len(ending))
            # float32 losses near 5, in another order of summing.
            np.testing.assert_allclose(result.losses_E, losses_E, atol=2e-5)
            assert result.losses_E.dtype == np.float32
            assert result.greedy == greedy
            assert result.cut == (len(text) > model.config.n_positions + 1)


@pytest.fixture(scope="module")
def model(shallow_config):
    return GPT2(shallow_config)


# n_positions is 32. Shared rows longer than that, texts that just fit and that do not, endings
# longer than the model, one ending alone, of one token, many of them.
QUESTIONS = draw(
    (5, 3, 4, 1, 9),
    (1, 1, 1, 1, 1),
    (20, 12, 13, 11, 13),
    (20, 12, 14, 3, 13),
    (40, 3, 2),
    (2, 33, 40, 5),
    (7, 8),
    (32, 1),
    (33, 1),
    (1, 32),
    (3, *[2] * (MOST_CONTINUATIONS + 3)),
)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_losses_are_those_of_one_text_at_a_time(model, shallow_params, batch_size):
    scorer = make_scorer(model, batch_size)
    check(model, shallow_params, QUESTIONS, scorer(shallow_params, QUESTIONS))


def test_greedy_continuations_are_told(model, shallow_params):
    """What the model itself would say, and the same with another last token."""
    text = draw((4,))[0].context.tolist()
    for _ in range(5):
        text.append(int(forward(model, shallow_params, np.array([text]))[0, -1].argmax()))
    own = np.array(text[4:])
    other = own.copy()
    other[-1] = (other[-1] + 1) % VOCABULARY
    questions = [Question(np.array(text[:4]), (own, other, own[:1]))]
    [found] = make_scorer(model, 2)(shallow_params, questions)
    assert [result.greedy for result in found] == [True, False, True]


def test_continuations_do_not_see_each_other(model, shallow_params):
    first, second = draw((6, 5, 7, 4), (6, 5, 7, 4))
    changed = Question(
        first.context, (second.continuations[0], *first.continuations[1:2], first.continuations[2])
    )
    scorer = make_scorer(model, 1)
    [one], [other] = scorer(shallow_params, [first]), scorer(shallow_params, [changed])
    assert (one[0].losses_E != other[0].losses_E).all()
    for before, after in zip(one[1:], other[1:], strict=True):
        np.testing.assert_array_equal(before.losses_E, after.losses_E)


def test_rows_may_be_split_over_devices(model, shallow_params):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    scorer = make_scorer(
        model, 2 * jax.device_count(), lambda array: jax.device_put(array, rows), whole
    )
    found = scorer(jax.device_put(shallow_params, whole), QUESTIONS)
    check(model, shallow_params, QUESTIONS, found)


def test_an_adapter_counts(model, shallow_config, shallow_params):
    lora = LoraSettings(("attn.c_attn", "mlp.c_proj"), 2, 4.0)
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.1, init_lora(shallow_config, lora, jax.random.key(0))
    )
    found = make_scorer(model, 4)(adapt(shallow_params, adapter, lora), QUESTIONS[:3])
    check(model, merge(shallow_params, adapter, lora), QUESTIONS[:3], found)


def test_bfloat16_is_that_of_the_model(shallow_config, shallow_params):
    """Kernels and head are rounded beforehand, which changes nothing."""
    model = GPT2(shallow_config, dtype=jnp.bfloat16)
    found = make_scorer(model, 2)(shallow_params, QUESTIONS[:3])
    exact = make_scorer(GPT2(shallow_config), 2)(shallow_params, QUESTIONS[:3])
    for question, results, others in zip(QUESTIONS[:3], found, exact, strict=True):
        for ending, result, other in zip(question.continuations, results, others, strict=True):
            text = np.concatenate([question.context, ending])
            losses_E, _ = plain(model, shallow_params, text, len(ending))
            # The attention's sums go another way, and are rounded to 8 bits.
            np.testing.assert_allclose(result.losses_E, losses_E, atol=0.05)
            assert (result.losses_E != other.losses_E).any()


def test_nothing_compiles_again_and_lengths_are_few(model, shallow_params, monkeypatch):
    traces = []
    original = continuations._losses

    def traced(*args, **kwargs):
        traces.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(continuations, "_losses", traced)
    continuations._compiled.cache_clear()
    scorer = make_scorer(model, 2)
    questions = draw((5, 3, 4, 1, 9), (6, 3, 3, 3, 3), (9, 4), (8, 8), (15, 14, 14, 14, 14))
    scorer(shallow_params, questions)
    # Rows of several texts, padded to 16, 32 and 80 tokens, and single ones of 16.
    assert len(traces) == 3
    make_scorer(model, 2)(jax.tree.map(lambda leaf: 2 * leaf, shallow_params), questions[::-1])
    assert len(traces) == 3


def test_parts_of_the_work_make_no_difference_and_all_is_reported(
    model, shallow_params, monkeypatch
):
    scorer = make_scorer(model, 2)
    whole = scorer(shallow_params, QUESTIONS)
    for together in (1, 4, 100):
        monkeypatch.setattr(continuations, "_TOGETHER", together)
        told = []
        found = scorer(shallow_params, QUESTIONS, lambda *now, told=told: told.append(now))
        done, totals = zip(*told, strict=True)
        assert done[-1] == totals[0] == sum(len(one.losses_E) for some in whole for one in some)
        assert len(set(totals)) == 1
        assert list(done) == sorted(done)
        for results, expected in zip(found, whole, strict=True):
            for one, other in zip(results, expected, strict=True):
                np.testing.assert_allclose(one.losses_E, other.losses_E, atol=2e-5)


def test_answers_of_one_token_share_a_context_of_any_length():
    """As a task of many examples asks for them; such a row reads as one text."""
    [batch] = make_batches(draw((700, 1, 1, 1, 1), (600, 5, 1)), 1024, 2)
    assert [len(row.tokens) for row in batch.rows] == [700, 604]
    assert batch.branch_BT is None


sizes = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 50), min_size=1, max_size=40)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=50)
@given(sizes, st.integers(20, 80), st.integers(1, 5))
def test_rows_hold_every_text_once_and_whole(sizes, n_positions, batch_size):
    """Read back by position and branch, each span is its context and continuation."""
    questions = draw(*((first, *rest) for first, rest in sizes))
    seen = []
    for batch in make_batches(questions, n_positions, batch_size):
        assert batch.tokens_BT.shape[0] == batch_size
        assert batch.place_BM.shape == batch.target_BM.shape
        for index, row in enumerate(batch.rows):
            length = len(row.tokens)
            assert row.position.max() < n_positions
            np.testing.assert_array_equal(batch.tokens_BT[index, :length], row.tokens)
            assert not batch.tokens_BT[index, length:].any()
            for branch, span in enumerate(row.spans, start=1):
                seen.append((span.question, span.continuation))
                context, endings = questions[span.question]
                text = np.concatenate([context, endings[span.continuation]])
                wanted = text[-(n_positions + 1) :]
                mine = (row.branch == 0) | (row.branch == branch)
                np.testing.assert_array_equal(row.tokens[mine], wanted[:-1])
                np.testing.assert_array_equal(row.position[mine], np.arange(len(wanted) - 1))
                targets = batch.target_BM[index, span.start : span.end]
                np.testing.assert_array_equal(targets, wanted[-len(targets) :])
                places = batch.place_BM[index, span.start : span.end]
                np.testing.assert_array_equal(
                    row.position[places], np.arange(len(wanted) - 1)[-len(targets) :]
                )
                assert len(targets) == min(len(endings[span.continuation]), n_positions)
                assert span.cut == (len(text) > n_positions + 1)
    expected = [(n, i) for n, (_, rest) in enumerate(sizes) for i in range(len(rest))]
    assert sorted(seen) == expected


@pytest.mark.parametrize("sizes", [(0, 1), (1, 2, 0)])
def test_what_is_empty_cannot_be_scored(sizes):
    with pytest.raises(ValueError, match="no tokens"):
        make_batches(draw(sizes), 32, 1)


@given(st.integers(1, 5000), st.sampled_from([16, 32]))
def test_a_padded_length_is_little_longer(tokens, step):
    length = row_length(tokens, step)
    assert tokens <= length
    assert length < tokens + step or length <= tokens * (1 + step / 128)
