"""Perplexity is that of Hugging Face's documented loop, and that of lm-evaluation-harness."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.continuations import Scorer, make_scorer
from gpt2_jax.evaluation.perplexity import (
    Document,
    Protocol,
    beginning_with,
    score_documents,
)
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode
from parity.models import Models, random_models, random_tokens
from parity.outcomes import Check, Prove, bounded

CONTEXT = 48
# Of mean losses of about 10 nats/token, whose float32 ulp is 9.5e-7.
BOUND = 1e-5
LENGTHS = (2, 31, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 200)


class HuggingFaceWindow(NamedTuple):
    """What the loop has of one window."""

    loss: float
    """the model's own mean over the labels it was given"""
    labels: int
    """how many are in the mean: the first token of a window has no prediction"""
    weight: int
    """how many the loop takes to be in it"""


def huggingface_windows(
    models: Models, tokens: np.ndarray, context: int, stride: int
) -> list[HuggingFaceWindow]:
    """The windows of "Perplexity of fixed-length models", which is PyTorch with labels of -100."""
    found, held = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        inputs = torch.tensor(tokens[None, begin:end])
        labels = inputs.clone()
        labels[:, : held - begin] = -100
        with torch.no_grad():
            loss = models.huggingface(inputs, labels=labels).loss
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:  # of none the mean is NaN
            weight = int((labels != -100).sum()) - 1
            found.append(HuggingFaceWindow(float(loss), predicted, weight))
        held = end
        if end == len(tokens):
            break
    return found


@pytest.fixture(scope="module")
def scorer(small: Models) -> Scorer:
    return make_scorer(GPT2(small.config), batch_size=8)


def documents_of(models: Models, lengths: Sequence[int] = LENGTHS) -> list[Document]:
    return [
        Document(f"{length} tokens", random_tokens(models.config, (1, length), seed=length)[0])
        for length in lengths
    ]


@pytest.mark.parametrize("stride", [CONTEXT, CONTEXT // 2, 7])
@pytest.mark.parametrize("context", [CONTEXT, 30])
def test_strided(small: Models, scorer: Scorer, context: int, stride: int, prove: Prove) -> None:
    stride = min(stride, context)
    documents, protocol = documents_of(small), Protocol("strided", context, stride)
    figures = score_documents(scorer, small.params, documents, protocol, None, lambda *_: None)
    theirs, documented, weighed = [], [], []
    for document, one in zip(documents, figures, strict=True):
        windows = huggingface_windows(small, document.tokens, context, stride)
        losses, labels, weights = (np.array(column) for column in zip(*windows, strict=True))
        assert one.tokens == labels.sum()
        theirs.append(losses @ labels / labels.sum())
        documented.append(losses @ weights / max(1, weights.sum()))
        # The same windows by our losses, with the loop's own weights.
        asked = [
            window.question(document.tokens) for window in protocol.windows(len(document.tokens))
        ]
        means = [one.losses_E.mean() for (one,) in scorer(small.params, asked)]
        weighed.append(means @ weights / max(1, weights.sum()))
    ours = [one.nll / one.tokens for one in figures]
    prove(
        bounded("perplexity, strided: nats/token", theirs, ours, BOUND),
        bounded("perplexity, strided: nats/token as the loop weighs", documented, weighed, BOUND),
    )


def test_rolling_windows(prove: Prove) -> None:
    """The harness's own windows, for every length up to several contexts."""
    utils = pytest.importorskip("lm_eval.utils")
    differing, lengths = [], range(1, 70)
    for context, length in itertools.product((2, 3, 16), lengths):
        tokens = np.arange(1, length + 1)
        theirs = [
            utils.make_disjoint_window(window)
            for window in utils.get_rolling_token_windows(tokens.tolist(), 0, context, 1)
        ]
        document = beginning_with(0, tokens)
        questions = [
            window.question(document)
            for window in Protocol("rolling", context).windows(len(document))
        ]
        ours = [(before.tolist(), scored.tolist()) for before, (scored,) in questions]
        if ours != theirs:
            differing.append(f"{length} tokens in contexts of {context}: {ours}, not {theirs}")
    count = 3 * len(lengths)
    counted = f"{count - len(differing)} of {count} texts' windows equal"
    prove(
        Check(
            "perplexity, rolling: windows",
            len(differing),
            0,
            (count,),
            counted=counted,
            details=tuple(differing[:8]),
        )
    )


def test_rolling(gpt2_tokenizer: Any, prove: Prove) -> None:
    """The harness's own Hugging Face model, asked for whole texts."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    config = GPT2Config(n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    models = random_models(config, seed=4)
    # Its cache can take two requests for one; see test_lm_eval.py.
    theirs = HFLM(models.huggingface, tokenizer=gpt2_tokenizer, batch_size=4, logits_cache=False)
    words = itertools.cycle(
        ["The", "quick", "brown", "fox", "jumps", "over", "it,", "naïve", "日本"]
    )
    texts = [" ".join(itertools.islice(words, count)) for count in (1, 20, 40, 60, 200)]
    asked = [
        Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)
    ]
    expected = -np.array(theirs.loglikelihood_rolling(asked, disable_tqdm=True))
    documents = [Document(text, beginning_with(END_OF_TEXT_ID, encode(text))) for text in texts]
    scorer = make_scorer(GPT2(config), batch_size=4)
    figures = score_documents(
        scorer, models.params, documents, Protocol("rolling", CONTEXT), None, lambda *_: None
    )
    tokens = np.array([one.tokens for one in figures])
    assert tokens.min() < CONTEXT < tokens.max() // 3
    ours = np.array([one.nll for one in figures])
    prove(bounded("perplexity, rolling: nats/token", expected / tokens, ours / tokens, BOUND))
