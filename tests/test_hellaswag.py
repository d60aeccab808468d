"""HellaSwag: what each protocol makes of an item, and how it chooses."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.continuations import make_scorer
from gpt2_jax.evaluation.hellaswag import (
    HellaSwagResult,
    HellaSwagScore,
    judge,
    make_hellaswag,
    question,
)
from gpt2_jax.evaluation.hellaswag_items import PROTOCOLS, Item, read_items
from gpt2_jax.model import GPT2, apply, init_params
from gpt2_jax.tokenizer import END_OF_TEXT_ID, decode, encode

CONFIG = GPT2Config(n_positions=80, n_embd=8, n_layer=1, n_head=2)
MODEL = GPT2(CONFIG)


def item(context, endings, label, **fields):
    parts = {"activity_label": "Test", "ctx_a": context, "ctx_b": "", "ctx": context, "ind": None}
    return Item(**(parts | fields), endings=endings, label=label)


ITEMS = [
    item("A man is sitting on a roof. he", ("is wrapping.", "naps", "falls off it", "sings a"), 3),
    item("The dog", ("barks at the moon", "reads", "is a very good dog", "flies away, far"), 0),
    item("One, two. " * 22, ("three and four, five", "six", "and so on", "no more of it"), 2),
]


@pytest.fixture(scope="module")
def params():
    """Parameters large enough that every token's loss is another."""
    initial = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim == 2 else leaf, initial)


def favouring(token):
    """Parameters of a model that always predicts one token, for a gain of about 2 nats.

    The position embeddings are all there is to a text, and only this token's embedding is like
    them.
    """
    zeros = jax.tree.map(jnp.zeros_like, init_params(CONFIG, jax.random.key(0)))
    direction_D = jnp.array([1.0, -1.0] * 4)
    table_VD = zeros["wte"]["embedding"].at[token].set(direction_D / 4)
    positions_TD = jnp.broadcast_to(direction_D[None], (CONFIG.n_positions, 8))
    ln_f = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    return zeros | {
        "wte": {"embedding": table_VD},
        "wpe": {"embedding": positions_TD},
        "ln_f": ln_f,
    }


forward = jax.jit(functools.partial(apply, MODEL))


def plain_losses(params, context, ending):
    """One text at a time, without padding; cut from the left as lm-evaluation-harness cuts."""
    tokens = np.concatenate([context, ending])[-(CONFIG.n_positions + 1) :]
    logits_TV = np.asarray(forward(params, tokens[None, :-1]), np.float64)[0, -len(ending) :]
    normaliser_T = np.log(np.exp(logits_TV).sum(axis=-1))
    return normaliser_T - logits_TV[np.arange(len(ending)), ending]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_losses_are_those_of_one_text_at_a_time(params, protocol):
    result = make_hellaswag(MODEL, ITEMS, 5, protocol=protocol)(params)
    for item, sums_E in zip(ITEMS, result.sums_NE, strict=True):
        context, endings = question(item, protocol)
        expected = [plain_losses(params, context, ending).sum() for ending in endings]
        # float32 sums of up to 5 losses near 15, in another order.
        np.testing.assert_allclose(sums_E, expected, atol=1e-5)
    assert result.cut_N.tolist() == [False, False, True]
    assert result.protocol == protocol


def test_build_nanogpt_takes_texts_as_they_are():
    odd = item("[header] How  to", ("[step] go. ", "a", "b", "c"), 0)
    context, endings = question(odd, "build-nanogpt")
    assert decode(context) == "[header] How  to"
    assert decode(endings[0]) == " [step] go. "
    result = judge([odd], make_scorer(MODEL, 1)(favouring(0), [(context, endings)]), PROTOCOLS[0])
    assert result.lengths_NE.tolist() == [[len(ending) for ending in endings]]


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"activity_label": "Roof", "ctx_a": "A man.", "ctx_b": "he"}, "Roof: A man. He"),
        ({"activity_label": "Home", "ctx_a": "[header] Do  it [title] Now", "ctx_b": ""},
         "Home: Do it. Now"),
        ({"activity_label": "X", "ctx_a": "a", "ctx_b": "he SAID Yes"}, "X: a He said yes"),
    ],
)  # fmt: skip
def test_lm_evaluation_harness_cleans_texts(fields, context):
    endings = ("[substeps] go.  There", " b [title] c", "d", "e")
    found = question(item("", endings, 0, **fields), "lm-evaluation-harness")
    assert decode(found.context) == context
    assert [decode(ending) for ending in found.continuations] == [
        "  go. There",
        " b. c",
        " d",
        " e",
    ]


def test_spaces_at_the_end_of_a_context_go_to_the_ending():
    odd = item("", ("b", "c", "d", "e"), 0, activity_label="A", ctx_a="x [y]", ctx_b="[z]")
    context, endings = question(odd, "lm-evaluation-harness")
    assert decode(context) == "A: x"
    assert decode(endings[0]) == "  b"


def test_a_context_of_nothing_is_the_end_of_text():
    odd = item("", ("b", "c", "d", "e"), 0, activity_label="[A", ctx_a="]", ctx_b="")
    context, endings = question(odd, "lm-evaluation-harness")
    assert decode(context) == "<|endoftext|>"
    assert decode(endings[1]) == " c"


def test_the_harness_divides_by_characters_and_an_ending_of_none_never_wins(params):
    odd = item("a", ("[step]", "é b", "[title] c", "d"), 0)
    result = make_hellaswag(MODEL, [odd], 1, protocol="lm-evaluation-harness")(params)
    assert result.lengths_NE.tolist() == [[0, 3, 2, 1]]
    assert np.isinf(result.normalised[0, 0])
    assert result.normalised_choices[0] != 0
    assert result.ties(1e-6) == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_predictions_do_not_depend_on_the_batch_size(params, protocol):
    results = [make_hellaswag(MODEL, ITEMS, size, protocol=protocol)(params) for size in (1, 4, 16)]
    for result in results[1:]:
        np.testing.assert_allclose(result.sums_NE, results[0].sums_NE, atol=1e-5)
        np.testing.assert_array_equal(result.choices, results[0].choices)
        np.testing.assert_array_equal(result.normalised_choices, results[0].normalised_choices)


@pytest.mark.parametrize(("word", "expected"), [(" cat", 1.0), (" dog", 0.0), (" sky", 0.5)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_ending_a_model_favours_wins(protocol, word, expected):
    """Endings of one length, so that sum and mean agree; with no favourite, the first wins."""
    items = [
        item("I saw a", ("dog", "cat", "dog", "dog"), 1),
        item("You saw a big", ("cat", "dog", "dog", "dog"), 0),
    ]
    (token,) = encode(word)
    result = make_hellaswag(MODEL, items, 4, protocol=protocol)(favouring(token))
    assert result.score == HellaSwagScore(acc=expected, acc_norm=expected, items=2)


def result_of(sums_NE, lengths_NE, labels_N=(0,)):
    arrays = (np.array(labels_N), np.array(sums_NE, float), np.array(lengths_NE))
    return HellaSwagResult("build-nanogpt", *arrays, np.zeros(len(labels_N), bool))


def test_acc_takes_the_smallest_sum_and_acc_norm_the_smallest_mean():
    sums_NE = [[1, 2, 3, 4], [4, 1, 3, 2], [1, 2, 3, 4]]
    lengths_NE = [[1, 4, 1, 1], [8, 1, 1, 1], [1, 2, 6, 4]]
    result = result_of(sums_NE, lengths_NE, (0, 1, 2))
    assert result.choices.tolist() == [0, 1, 0]
    assert result.normalised_choices.tolist() == [1, 0, 2]
    assert result.score == HellaSwagScore(2 / 3, 1 / 3, 3)
    assert result.prediction(1) == {
        "acc": 1, "acc_norm": 0, "losses": [4, 1, 3, 2], "lengths": [8, 1, 1, 1]
    }  # fmt: skip


def test_ties_are_items_that_a_small_error_would_decide():
    apart = [10, 20, 30, 40], [2, 2, 2, 2]
    sums_close = [10, 10.05, 30, 40], [2, 4, 2, 2]
    means_close = [10, 20.05, 90, 90], [2, 4, 2, 2]
    result = result_of(*zip(apart, sums_close, means_close, strict=True), labels_N=(0, 0, 0))
    assert [result.ties(nats) for nats in (0.01, 0.1, 20)] == [0, 2, 3]


@pytest.mark.parametrize(
    ("sums_E", "lengths_E"),
    [
        # The short ending's own error brings it behind the long one.
        ([20.0, 800.002, 900, 900], [10, 400, 10, 10]),
        # A short ending third in line passes both before it.
        ([800.0, 900, 40100 * 2.0000001, 4.00005], [400, 10, 40100, 2]),
    ],
)
def test_ties_are_found_whichever_ending_errs(sums_E, lengths_E):
    result = result_of([sums_E], [lengths_E])
    assert (result.ties(1e-6), result.ties(1e-4)) == (0, 1)


def test_the_end_of_text_is_a_token_for_the_harness_alone():
    odd = item("a <|endoftext|> b", ("c<|endoftext|>", "d", "e", "f"), 0)
    plain, special = (question(odd, protocol) for protocol in PROTOCOLS)
    assert END_OF_TEXT_ID not in plain.context
    assert END_OF_TEXT_ID in special.context
    assert special.continuations[0][-1] == END_OF_TEXT_ID


def test_standard_errors_are_those_of_a_share():
    result = HellaSwagScore(acc=0.25, acc_norm=0.5, items=10_042)
    assert result.acc_stderr == pytest.approx(0.00432, abs=1e-5)
    assert result.acc_norm_stderr == pytest.approx(0.00499, abs=1e-5)
    assert HellaSwagScore(1.0, 0.0, 3).acc_stderr == 0


def test_a_model_of_another_vocabulary_is_refused(tiny_config):
    with pytest.raises(UserError, match="vocab_size=97 is less than the 50257"):
        make_hellaswag(GPT2(tiny_config), ITEMS, 4)


@pytest.fixture(scope="module")
def validation_items():
    if "GPT2_JAX_SHARED" not in os.environ:
        pytest.skip("GPT2_JAX_SHARED is not set")
    path = Path(os.environ["GPT2_JAX_SHARED"]) / "data" / "hellaswag_val.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return read_items(path)


@pytest.mark.slow
def test_the_metric_has_the_right_sign(validation_items):
    """Trained on the true endings of some items, a model finds them; before, it only guesses.

    Endings alone are scored, so that they must be told apart by what follows the context.
    """
    items = validation_items[:12]
    config = dataclasses.replace(CONFIG, n_embd=32, n_positions=128, embd_pdrop=0.0,
                                 attn_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    model = GPT2(config)
    params = init_params(config, jax.random.key(0))
    evaluates = [make_hellaswag(model, items, 16, protocol=protocol) for protocol in PROTOCOLS]
    before = [evaluate(params).score for evaluate in evaluates]
    texts = [
        np.concatenate([context, endings[item.label]])[:49]
        for item in items
        for context, endings in (question(item, PROTOCOLS[0]),)
    ]
    tokens_NT = np.stack([np.pad(text, (0, 49 - len(text))) for text in texts]).astype(np.int32)
    weight_NT = np.stack([np.arange(1, 49) < len(text) for text in texts])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits_BTV = apply(model, params, tokens_NT[:, :-1])
            loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_NT[:, 1:])
            return jnp.sum(loss_BT * weight_NT) / weight_NT.sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(40):
        params, state = step(params, state)
    for evaluate, guess in zip(evaluates, before, strict=True):
        trained = evaluate(params).score
        assert abs(guess.acc - 0.25) < 4 * guess.acc_stderr
        assert abs(guess.acc_norm - 0.25) < 4 * guess.acc_norm_stderr
        assert trained.acc > 0.6
        assert trained.acc_norm > 0.9
