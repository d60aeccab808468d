"""lm-evaluation-harness: what requests become, and that answers are theirs whatever the batch."""

import itertools
import json
import logging
import subprocess
import sys

import jax
import numpy as np
import pytest
from full_passes import FullPasses

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.continuations import Continuation
from gpt2_jax.generation.decode import NewToken, generate
from gpt2_jax.generation.sampling import Sampling
from gpt2_jax.interop import lm_eval_generation
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.lm_eval_generation import (
    Generation,
    continue_all,
    continue_until,
    read_generation,
)
from gpt2_jax.interop.lm_eval_scoring import log_likelihoods
from gpt2_jax.model import init_params
from gpt2_jax.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, decode, encode

CONFIG = GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False)
GREEDY = Sampling(temperature=0.0)
NONE = (END_OF_TEXT,)
"""the stop strings of a request that names none"""


@pytest.fixture(scope="module")
def params():
    """Parameters large enough that texts do not repeat one token."""
    initial = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim == 2 else leaf, initial)


@pytest.fixture(scope="module")
def lm_class():
    pytest.importorskip("lm_eval")
    from gpt2_jax.interop.lm_eval import GPT2LM

    return GPT2LM


@pytest.fixture(scope="module")
def lm(lm_class, params):
    return lm_class((params, CONFIG), batch_size=8, max_gen_toks=8)


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


class Recorder:
    """A scorer whose losses are the tokens' numbers."""

    def __call__(self, questions):
        self.questions = questions
        return [
            tuple(Continuation(ids.astype(np.float32), len(ids) == 1, False) for ids in tails)
            for _, tails in questions
        ]


# Log-likelihoods.


def test_requests_of_one_context_are_one_question_and_the_same_request_is_scored_once():
    scorer = Recorder()
    pairs = [([1, 2], [3]), ([9], [4, 5]), ([1, 2], [6, 7]), ([9], [4, 5]), ([1, 2], [3])]
    answers = log_likelihoods(scorer, pairs, max_length=8)
    assert answers == [(-3, True), (-9, False), (-13, False), (-9, False), (-3, True)]
    found = [(c.tolist(), [t.tolist() for t in tails]) for c, tails in scorer.questions]
    assert found == [([1, 2], [[3], [6, 7]]), ([9], [[4, 5]])]


def test_a_long_context_loses_its_beginning_and_it_is_said(caplog):
    scorer = Recorder()
    pairs = [(range(10), [10, 11]), (range(3), [4]), ([1], range(4))]
    with caplog.at_level(logging.WARNING):
        log_likelihoods(scorer, pairs, max_length=4)
    found = [(c.tolist(), tails[0].tolist()) for c, tails in scorer.questions]
    assert found == [([7, 8, 9], [10, 11]), ([0, 1, 2], [4]), ([1], [0, 1, 2, 3])]
    assert caplog.messages == ["1 of 3 texts have more than 5 tokens and lost their beginnings"]


@pytest.mark.parametrize(("tail", "reason"), [([], "adds no token"), (range(5), "has 5 tokens")])
def test_a_continuation_must_have_tokens_and_fit(tail, reason):
    with pytest.raises(UserError, match=f"' the cat' {reason}"):
        log_likelihoods(Recorder(), [(encode(" the cat"), tail)], max_length=4)


# Generation.


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, Generation(NONE, 7, GREEDY)),
        ({"until": "a", "max_gen_toks": 3}, Generation(("a", END_OF_TEXT), 3, GREEDY)),
        ({"until": ["a", "", END_OF_TEXT]}, Generation(("a", END_OF_TEXT), 7, GREEDY)),
        ({"until": None, "max_tokens": 2, "max_new_tokens": 3}, Generation(NONE, 3, GREEDY)),
        ({"do_sample": False, "temperature": 0.8, "top_p": 0.9}, Generation(NONE, 7, GREEDY)),
        ({"temperature": 0.8, "num_beams": 1}, Generation(NONE, 7, Sampling(0.8))),
        (
            {"do_sample": True, "temperature": 1, "top_k": 0, "top_p": 0.9},
            Generation(NONE, 7, Sampling(1, top_p=0.9)),
        ),
    ],
)
def test_arguments_of_a_request(arguments, wanted):
    before = json.dumps(arguments)
    assert read_generation(arguments, 7) == wanted
    assert json.dumps(arguments) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"length_penalty": 2}, "length_penalty=2 is not known; use until"),
        ({"until": 3}, "until=3"),
        ({"until": ["a", 3]}, "until="),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"do_sample": True}, "temperature above 0"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": 1.0, "top_p": 2}, "top_p=2"),
    ],
)
def test_arguments_that_cannot_be(arguments, reason):
    with pytest.raises(UserError, match=reason):
        read_generation(arguments, 7)


PROMPTS = [encode(text).tolist() for text in ("The", "A cat on the mat", "One, two, three", "x")]


def test_a_text_ends_before_the_first_stop_string(params):
    whole = generate(params, CONFIG, PROMPTS, max_new_tokens=20)
    uncut = [decode(tokens) for tokens in whole]
    # A piece of every text but the last, which goes on to its end; it lies in several tokens.
    stops = tuple(text[20:32] for text in uncut[:-1])
    texts = continue_until(params, CONFIG, PROMPTS, Generation(stops, 20, GREEDY))
    assert (
        texts
        == [text[: text.find(stop)] for text, stop in zip(uncut, stops, strict=False)] + uncut[-1:]
    )


def test_a_text_does_not_depend_on_the_batch_nor_on_the_order(params):
    wanted = [Generation(("e", END_OF_TEXT), limit, GREEDY) for limit in (9, 12, 9, 9)]

    def texts(prompts, wanted, batch_size):
        made = continue_all(params, CONFIG, prompts, wanted, max_length=64, batch_size=batch_size)
        return [text for _, text in sorted(made)]

    one_by_one = [
        continue_until(params, CONFIG, [prompt], one)[0]
        for prompt, one in zip(PROMPTS, wanted, strict=True)
    ]
    assert texts(PROMPTS, wanted, 2) == one_by_one
    assert texts(PROMPTS[::-1], wanted[::-1], 3) == one_by_one[::-1]


def test_samples_of_one_prompt_differ_and_come_again(params):
    wanted = [read_generation({"temperature": 1.0}, 8)] * 6

    def texts(seed):
        made = continue_all(
            params, CONFIG, PROMPTS[:1] * 6, wanted, max_length=64, batch_size=2, seed=seed
        )
        return [text for _, text in sorted(made)]

    assert len(set(texts(seed=2**32 - 1))) == 6
    assert texts(seed=5) == texts(seed=5)


@pytest.fixture
def fake_stream(monkeypatch):
    """In place of the model: every row says "Hi", <|endoftext|>, and would go on. The rows of each
    call are written down."""
    calls = []

    def stream(_params, _config, prompts, **_):
        calls.append(len(prompts))
        for token, row in itertools.product((17250, END_OF_TEXT_ID, 0, 0), range(len(prompts))):
            yield NewToken(row, token, 0.0, [], None)

    monkeypatch.setattr(lm_eval_generation, "stream", stream)
    return calls


@pytest.mark.usefixtures("fake_stream")
def test_a_text_ends_at_the_end_of_text(params):
    assert continue_until(params, CONFIG, PROMPTS, Generation((), 4, GREEDY)) == ["Hi"] * 4


def test_nothing_is_made_after_the_stop_string(monkeypatch, params):
    """Also where the string lies in two tokens."""
    made = []

    def stream(*_, **__):
        for token in encode("The cat sat").tolist():
            made.append(token)
            yield NewToken(0, token, 0.0, [], None)

    monkeypatch.setattr(lm_eval_generation, "stream", stream)
    wanted = Generation(("e c",), 9, GREEDY)
    assert continue_until(params, CONFIG, PROMPTS[:1], wanted) == ["Th"]
    assert decode(made) == "The cat"


@pytest.mark.parametrize(("batch_size", "rows"), [(1, [1] * 4), (3, [3, 3]), (4, [4]), (9, [4])])
def test_all_batches_have_as_many_rows(fake_stream, params, batch_size, rows):
    wanted = [Generation((), 4, GREEDY)] * 4
    made = continue_all(params, CONFIG, PROMPTS, wanted, max_length=64, batch_size=batch_size)
    assert sorted(made) == [(number, "Hi") for number in range(4)]
    assert fake_stream == rows


def test_a_long_prompt_loses_its_beginning(params, caplog):
    prompt, wanted = encode("a b c d " * 30).tolist(), Generation((END_OF_TEXT,), 10, GREEDY)
    with caplog.at_level(logging.WARNING):
        made = list(continue_all(params, CONFIG, [prompt], [wanted], max_length=40, batch_size=2))
    assert made == [(0, continue_until(params, CONFIG, [prompt[-30:]], wanted)[0])]
    assert caplog.messages == ["1 of 1 texts have more than 30 tokens and lost their beginnings"]
    with pytest.raises(UserError, match="max_gen_toks=10 leaves no room"):
        list(continue_all(params, CONFIG, [prompt], [wanted], max_length=10, batch_size=2))


# The harness's model.


def test_it_needs_no_torch(lm_class):
    blocked = "sys.modules.update(torch=None, transformers=None)"
    code = f"import sys; {blocked}; import {lm_class.__module__}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_log_likelihoods_are_those_of_full_passes(lm, params):
    """The rows are split over eight devices."""
    full = FullPasses(params, CONFIG)
    pairs = [("The cat", " sat"), ("", "One"), ("  ", "x y"), ("The cat ", "is"), ("The cat", "!")]
    answers = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for (context, tail), (score, greedy) in zip(pairs, answers, strict=True):
        start = len(encode(context.rstrip()))
        text = encode(context + tail).tolist()
        if not start:
            start, text = 1, [END_OF_TEXT_ID, *text]
        logprobs = [full.logprobs(text[:end]) for end in range(start, len(text))]
        expected = sum(one[token] for one, token in zip(logprobs, text[start:], strict=True))
        assert score == pytest.approx(expected, abs=2e-5)
        assert greedy == all(
            one.argmax() == token for one, token in zip(logprobs, text[start:], strict=True)
        )


def test_the_end_of_text_may_be_in_a_text(lm):
    assert lm.tok_encode(f"a{END_OF_TEXT}", add_special_tokens=False) == [64, END_OF_TEXT_ID]


def test_each_token_of_a_text_is_predicted_once(lm, params):
    text = "The cat sat on the mat, one, two, three. " * 12
    [score] = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    tokens, full = [END_OF_TEXT_ID, *encode(text).tolist()], FullPasses(params, CONFIG)
    # The first window begins with <|endoftext|>; the last is full, whatever it predicts.
    expected, longest = 0.0, CONFIG.n_positions
    for end in range(1, len(tokens)):
        window = min(-(-end // longest) * longest, len(tokens) - 1)
        start = max(0, window - longest)
        expected += full.logprobs(tokens[start:end])[tokens[end]]
    assert score == pytest.approx(expected, rel=1e-6)
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0]


def test_texts(lm, params):
    contexts = ["The", "", "A cat on the mat"]
    requests = asked("generate_until", *[(context, {"until": ["e"]}) for context in contexts])
    prompts = [encode(context).tolist() or [END_OF_TEXT_ID] for context in contexts]
    wanted = Generation(("e", END_OF_TEXT), 8, GREEDY)
    expected = continue_until(params, CONFIG, prompts, wanted)
    assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_bfloat16_is_near(lm, lm_class, params):
    requests = asked("loglikelihood", ("The cat", " sat on the mat"))
    rounded = lm_class((params, CONFIG), dtype="bfloat16", batch_size=8)
    [(exact, _)], [(near, _)] = (
        one.loglikelihood(requests, disable_tqdm=True) for one in (lm, rounded)
    )
    assert exact != near
    assert near == pytest.approx(exact, rel=0.02)


def test_the_harness_finds_it_by_name(lm_class, params, tmp_path):
    from lm_eval.api.registry import get_model

    export_model(tmp_path / "model", params, CONFIG, files={})
    given = {"batch_size": "auto", "max_batch_size": 3, "device": None}
    assert get_model("gpt2_jax") is lm_class
    found = lm_class.create_from_arg_string(f"source={tmp_path / 'model'},max_length=32", given)
    assert (found.batch_size, found.max_length, found.max_gen_toks) == (8, 32, 256)
    assert found.get_model_info()["model_num_parameters"] == CONFIG.parameter_count


@pytest.mark.parametrize(
    ("batch_size", "rows"), [(None, 32), ("auto", 32), ("auto:4", 32), ("9", 16), (1, 8), (16, 16)]
)
def test_batches_fit_the_devices(lm_class, params, batch_size, rows):
    assert jax.device_count() == 8
    assert lm_class((params, CONFIG), batch_size=batch_size).batch_size == rows


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16"),
        ({"device": "cuda:0"}, "device='cuda:0'.*JAX_PLATFORMS"),
        ({"max_length": 65}, "max_length=65 is more than n_positions=64"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"lora": "adapter"}, "lora='adapter'"),
    ],
)
def test_values_are_checked(lm_class, params, given, reason):
    with pytest.raises(UserError, match=reason):
        lm_class((params, CONFIG), **given)


def test_another_vocabulary_is_refused(lm_class, tiny_params, tiny_config):
    with pytest.raises(UserError, match="vocab_size=97"):
        lm_class((tiny_params, tiny_config))


def test_a_directory_may_be_named_like_a_number(lm_class):
    with pytest.raises(UserError, match="source '2026' is no directory"):
        lm_class.create_from_arg_string("source=2026")


def test_there_is_a_single_process(lm_class, params, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="one of 2 processes"):
        lm_class((params, CONFIG))


def test_there_is_no_chat_template(lm):
    with pytest.raises(UserError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_answers_are_kept(lm_class, params, tmp_path):
    """The harness's cache, asked a second time, gives what the model gave the first."""
    from lm_eval.api.model import CachingLM

    lm = lm_class((params, CONFIG), batch_size=8)
    kept = CachingLM(lm, str(tmp_path / "cache.db"))
    requests = {
        "loglikelihood": asked("loglikelihood", ("The cat", " sat"), ("The cat", " is")),
        "loglikelihood_rolling": asked("loglikelihood_rolling", ("The cat sat",)),
        "generate_until": asked("generate_until", ("The", {"until": ["e"], "max_gen_toks": 4})),
    }
    first = {kind: getattr(lm, kind)(some) for kind, some in requests.items()}
    lm._loglikelihood_tokens = lm.generate_until = None
    assert {kind: getattr(kept, kind)(some) for kind, some in requests.items()} == first
    kept.dbdict.close()
