"""Perplexity of documents: which tokens are scored, from what, and what the figures are of."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.continuations import Continuation, make_scorer
from gpt2_jax.evaluation.perplexity import (
    Document,
    Figures,
    Protocol,
    beginning_with,
    byte_lengths,
    check_documents,
    cut_documents,
    score_documents,
    total,
)
from gpt2_jax.model import GPT2, apply
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode

END = 96
LENGTHS = st.integers(0, 200)
CONTEXTS = st.integers(2, 40)


@st.composite
def strided(draw) -> Protocol:
    context = draw(CONTEXTS)
    return Protocol("strided", context, draw(st.integers(1, context)))


def scored(protocol: Protocol, length: int) -> list[int]:
    return [place for w in protocol.windows(length) for place in range(w.start, w.end)]


@given(LENGTHS, strided())
def test_strided_windows_score_every_token_once_but_the_first(length, protocol):
    firsts = range(0, length, protocol.context) if protocol.stride == protocol.context else [0]
    assert scored(protocol, length) == [n for n in range(length) if n not in firsts]


@given(LENGTHS, strided())
def test_strided_windows_are_of_the_context_and_a_stride_apart(length, protocol):
    windows = list(protocol.windows(length))
    assert [w.begin for w in windows] == [n * protocol.stride for n in range(len(windows))]
    for window in windows:
        assert window.end == min(window.begin + protocol.context, length)
        assert window.begin < window.start < window.end
    for window in windows[1:]:
        # What a window before held is context: all but the last stride, at the least.
        assert window.start - window.begin >= max(1, protocol.context - protocol.stride)


@given(LENGTHS, CONTEXTS)
def test_rolling_windows_score_every_token_once_behind_the_end_of_text(length, context):
    protocol = Protocol("rolling", context)
    assert scored(protocol, length) == list(range(1, length))
    windows = list(protocol.windows(length))
    assert [w.end - 1 - w.begin for w in windows] == (
        [context] * len(windows) if length > context + 1 else [length - 1] * len(windows)
    )
    # Only the last reaches back.
    assert all(w.start == w.begin + 1 for w in windows[:-1])


def test_windows_that_leave_tokens_out_or_are_too_long_are_refused():
    Protocol("strided", 64, 64).check(64)
    Protocol("rolling", 2).check()
    with pytest.raises(UserError, match="context=65 must be from 2 to n_positions=64"):
        Protocol("rolling", 65).check(64)
    with pytest.raises(UserError, match="context=1 must be from 2"):
        Protocol("rolling", 1).check()
    for stride in (0, 9):
        with pytest.raises(UserError, match=f"stride={stride} must be from 1 to context=8"):
            Protocol("strided", 8, stride).check()


def cut(*shards: list[int], end: int | None = END) -> list[list[int]]:
    arrays = [np.array(shard, np.uint16) for shard in shards]
    return [document.tolist() for document in cut_documents(arrays, end)]


def test_documents_are_cut_before_the_end_of_text():
    assert cut([END, 1, 2, END, 3]) == [[END, 1, 2], [END, 3]]
    assert cut([1, 2, END, 3]) == [[1, 2], [END, 3]]
    assert cut([1, END, END, 2]) == [[1], [END], [END, 2]]
    assert cut([1, END]) == cut([1], [END]) == [[1]]
    assert cut([END]) == cut([]) == cut() == []
    assert cut([1, END, 2], end=None) == [[1, END, 2]]


@given(st.lists(st.sampled_from([1, 2, END]), max_size=20), st.data())
def test_shards_may_end_anywhere(stream, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=3)))
    bounds = [0, *places, len(stream)]
    shards = [stream[start:end] for start, end in itertools.pairwise(bounds)]
    assert cut(*shards) == cut(stream)
    # Nothing is lost but an end at the very end.
    joined = list(itertools.chain(*cut(stream)))
    assert joined in (stream, stream[:-1])


def test_rolling_documents_begin_with_one_end_of_text():
    for tokens in ([], [1, 2], [END], [END, 1]):
        found = beginning_with(END, np.array(tokens, np.uint16)).tolist()
        assert found == (tokens if tokens[:1] == [END] else [END, *tokens])
    assert beginning_with(END, np.zeros(3, np.uint16)).dtype == np.uint16


class UniformScorer:
    """Finds every token as likely as any other of 4, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, params, questions, report):  # noqa: ARG002
        self.asked.extend(questions)
        report(sum(len(context) + len(one) - 1 for context, (one,) in questions), -1)
        return [
            (Continuation(np.full(len(one), math.log(4), np.float32), False, False),)
            for _, (one,) in questions
        ]


def documents_of(*lengths: int) -> list[Document]:
    rng = np.random.default_rng(0)
    return [
        Document(f"{length} long", rng.integers(0, 50257, length).astype(np.uint16))
        for length in lengths
    ]


def test_figures_are_of_the_scored_tokens():
    documents = documents_of(30, 0, 1, 9)
    lengths = byte_lengths()
    figures = score_documents(
        UniformScorer(), {}, documents, Protocol("strided", 8, 4), lengths, lambda *_: None
    )
    assert [one.tokens for one in figures] == [29, 0, 0, 8]
    for one, (name, tokens) in zip(figures, documents, strict=True):
        assert one.name == name
        assert one.bytes == sum(map(int, lengths[tokens[1:]]))
    first, empty, *_ = figures
    # float32's log 4 is off by up to 1.2e-7 of 1.4.
    assert first.nll == pytest.approx(29 * math.log(4), rel=1e-7)
    assert first.loss == pytest.approx(math.log(4), rel=1e-7)
    assert first.perplexity == pytest.approx(4, rel=2e-7)
    assert first.byte_perplexity == pytest.approx(4 ** (29 / first.bytes), rel=2e-7)
    assert first.bits_per_byte == pytest.approx(2 * 29 / first.bytes, rel=1e-7)
    assert empty.values() == {"tokens": 0, "bytes": 0} | dict.fromkeys(
        ("loss", "perplexity", "byte_perplexity", "bits_per_byte")
    )


@pytest.mark.parametrize("text", ["", "a", "plain words, and\nmore of them", "naïve 😀 日本"])
def test_a_rolling_document_has_the_bytes_of_its_text(text):
    document = Document("text", beginning_with(END_OF_TEXT_ID, encode(text)))
    scorer, protocol = UniformScorer(), Protocol("rolling", 3)
    [figures] = score_documents(scorer, {}, [document], protocol, byte_lengths(), lambda *_: None)
    assert (figures.tokens, figures.bytes) == (len(encode(text)), len(text.encode()))


def test_tokens_without_text_have_no_bytes():
    documents = [Document("padding", np.array([5, 50257])), Document("text", np.array([5, 6]))]
    protocol = Protocol("rolling", 8)
    for lengths, sizes in ((byte_lengths(), [None, 1]), (None, [None, None])):
        figures = score_documents(
            UniformScorer(), {}, documents, protocol, lengths, lambda *_: None
        )
        assert [one.bytes for one in figures] == sizes
        whole = total("all", figures)
        assert (whole.tokens, whole.bytes, whole.bits_per_byte) == (2, None, None)
        assert whole.perplexity == pytest.approx(4, rel=2e-7)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(0, 99))))
def test_all_together_are_the_sums(values):
    figures = [Figures("one", *value) for value in values]
    assert total("all", figures) == Figures(
        "all",
        sum(tokens for tokens, _, _ in values),
        sum(size for _, size, _ in values),
        math.fsum(nll for _, _, nll in values),
    )


def test_a_perplexity_beyond_all_floats_is_infinite():
    figures = Figures("wrong", 1, 1, 1e4)
    assert figures.perplexity == figures.byte_perplexity == math.inf
    assert figures.loss == 1e4


def test_documents_that_a_model_cannot_score_are_refused():
    config, protocol = GPT2Config(vocab_size=97, eos_token_id=END), Protocol("strided", 8, 4)
    check_documents(
        [Document("good", np.array([1, 96])), Document("", np.array([]))], protocol, config
    )
    with pytest.raises(UserError, match="document bad holds token 97, outside the model's"):
        check_documents([Document("bad", np.array([1, 97]))], protocol, config)
    for tokens in ([], [1]):
        with pytest.raises(UserError, match=r"2 document\(s\) hold no token after the first"):
            check_documents([Document("", np.array(tokens))] * 2, protocol, config)


@pytest.mark.parametrize(
    "protocol", [Protocol("strided", 12, 5), Protocol("strided", 32, 32), Protocol("rolling", 16)]
)
def test_losses_are_the_models(shallow_config, shallow_params, protocol):
    rng = np.random.default_rng(0)
    documents = [Document("", rng.integers(0, 97, n).astype(np.uint16)) for n in (70, 2, 16)]
    model = GPT2(shallow_config)
    figures = score_documents(
        make_scorer(model, 4), shallow_params, documents, protocol, None, lambda *_: None
    )
    forward = jax.jit(functools.partial(apply, model))
    for one, (_, tokens) in zip(figures, documents, strict=True):
        losses = []
        for begin, start, end in protocol.windows(len(tokens)):
            # What follows a token has no effect on its loss, so all windows can be of one length.
            inputs_1T = np.zeros((1, shallow_config.n_positions), np.int32)
            inputs_1T[0, : end - begin] = tokens[begin:end]
            logits_TV = np.asarray(forward(shallow_params, inputs_1T)[0], np.float64)
            for place in range(start, end):
                logits_V = logits_TV[place - begin - 1]
                losses.append(np.log(np.exp(logits_V).sum()) - logits_V[tokens[place]])
        assert one.loss == pytest.approx(np.mean(losses), abs=1e-5)  # float32's logits


def test_a_question_holds_the_window():
    windows = Protocol("rolling", 4).windows(7)
    questions = [window.question(np.arange(7)) for window in windows]
    assert [(context.tolist(), tail.tolist()) for context, [tail] in questions] == [
        ([0], [1, 2, 3, 4]),
        ([2, 3, 4], [5, 6]),
    ]
