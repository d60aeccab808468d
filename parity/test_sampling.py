"""After every sampling rule the probabilities are those of Hugging Face's processors, built as its
`generate` builds them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpt2_jax.generation.sampling import Sampling, apply_rules, choose
from parity.checks import compare_tokens
from parity.outcomes import Check, Prove

BOUND = 1e-6
"""Largest absolute difference of probabilities."""
ROUNDING = 2e-7
"""How far float32 may be off, in a sum of probabilities or in a logit relative to the largest; a
nucleus whose edge is nearer than that depends on the order of additions, in theirs as in ours."""
PADDING = 1

apply_compiled = jax.jit(apply_rules, static_argnames="sampling")
choose_compiled = jax.jit(choose, static_argnames="sampling")

RULES = [
    *(Sampling(repetition_penalty=penalty) for penalty in (0.7, 1.3)),
    *(Sampling(temperature=temperature) for temperature in (0.05, 0.7, 3.0)),
    *(Sampling(top_k=k) for k in (1, 2, 50, 10**6)),
    *(Sampling(top_p=p) for p in (1e-30, 0.1, 0.9, 0.999, 1.0)),
    *(Sampling(min_p=p) for p in (0.0, 0.05, 1.0)),
    Sampling(temperature=0.7, top_k=40, top_p=0.9),
    Sampling(temperature=2.0, top_p=0.8, min_p=0.1, repetition_penalty=1.2),
    Sampling(temperature=1.5, top_k=100, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
    Sampling(temperature=0.0, repetition_penalty=1.3),
]


@functools.cache
def model() -> Any:
    """Any: processors take no more from it than that it is a decoder."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=3, n_embd=1, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
        )
    )


def processors(sampling: Sampling, tokens_BT: np.ndarray) -> Any:
    rules = {name: rule for name, rule in vars(sampling).items() if name != "temperature"}
    if not sampling.greedy:
        rules["temperature"] = sampling.temperature
    return model()._get_logits_processor(
        transformers.GenerationConfig(do_sample=not sampling.greedy, **rules),
        input_ids_seq_length=tokens_BT.shape[1],
        model_kwargs={"attention_mask": torch.from_numpy(tokens_BT != PADDING)},
    )


def theirs(logits_BV: np.ndarray, tokens_BT: np.ndarray, sampling: Sampling) -> np.ndarray:
    scores_BV = torch.from_numpy(logits_BV.copy())
    return processors(sampling, tokens_BT)(torch.from_numpy(tokens_BT), scores_BV).numpy()


def ours(logits_BV: np.ndarray, tokens_BT: np.ndarray, sampling: Sampling) -> np.ndarray:
    return np.asarray(
        apply_compiled(logits_BV, sampling=sampling, seen_BV=seen(logits_BV, tokens_BT))
    )


def seen(logits_BV: np.ndarray, tokens_BT: np.ndarray) -> np.ndarray:
    seen_BV = np.zeros(logits_BV.shape, bool)
    np.put_along_axis(seen_BV, tokens_BT, True, axis=1)
    seen_BV[:, PADDING] = False
    return seen_BV


def probabilities(logits_BV: np.ndarray) -> np.ndarray:
    """float64, so that the comparison adds no rounding of its own."""
    odds_BV = np.exp(logits_BV.astype(np.float64) - logits_BV.max(axis=1, keepdims=True))
    return odds_BV / odds_BV.sum(axis=1, keepdims=True)


def differences(one_BV: np.ndarray, other_BV: np.ndarray) -> np.ndarray:
    """Largest difference of each row's probabilities."""
    return np.abs(probabilities(one_BV) - probabilities(other_BV)).max(axis=1)


def random_tokens(rng: np.random.Generator, rows: int, vocab_size: int) -> np.ndarray:
    """Rows of one to twelve tokens with padding on their left."""
    tokens_BT = rng.integers(PADDING + 1, vocab_size, (rows, 12))
    for row in range(rows):
        tokens_BT[row, : row % 12] = PADDING
    return tokens_BT


def left_open(logits_BV: np.ndarray, tokens_BT: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Which rows have a nucleus that float32 can't tell: rounding would change it in float64."""
    if sampling.top_p is None or sampling.top_p == 1:
        return np.zeros(len(logits_BV), bool)
    logits_BV = logits_BV.astype(np.float64)
    expected_BV = theirs(logits_BV, tokens_BT, sampling)
    against_BV = logits_BV + np.where(np.isinf(expected_BV), ROUNDING, -ROUNDING)
    changed_B = np.zeros(len(logits_BV), bool)
    for p in (sampling.top_p - ROUNDING, sampling.top_p + ROUNDING):
        rounded = dataclasses.replace(sampling, top_p=max(p, 1e-30))
        changed_B |= differences(theirs(against_BV, tokens_BT, rounded), expected_BV) > BOUND
    return changed_B


@pytest.mark.parametrize("sampling", RULES, ids=str)
@pytest.mark.parametrize("vocab_size", [3, 1000, 50257])
def test_probabilities_after_the_rules(vocab_size: int, sampling: Sampling, prove: Prove) -> None:
    rng = np.random.default_rng(vocab_size)
    # As flat, as peaked and as far from zero as models make them.
    scales_B = np.array([0.01, 0.3, 1, 3, 3, 10, 30, 3])[:, None]
    means_B = np.array([0, 0, 0, 0, -60, -100, 50, 1000])[:, None]
    logits_BV = rng.normal(means_B, scales_B, (8, vocab_size)).astype(np.float32)
    logits_BV[3, rng.random(vocab_size) < 0.3] = -np.inf
    logits_BV[3, 0] = 1.0
    tokens_BT = random_tokens(rng, 8, vocab_size)
    decided_B = ~left_open(logits_BV, tokens_BT, sampling)
    assert decided_B.sum() >= 6
    difference_B = differences(
        ours(logits_BV, tokens_BT, sampling), theirs(logits_BV, tokens_BT, sampling)
    )
    largest = float(difference_B[decided_B].max())
    prove(Check("sampling: probabilities", largest, BOUND, logits_BV.shape))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=3),
        Sampling(top_p=0.37),
        Sampling(top_p=0.913),
        Sampling(min_p=0.3),
        Sampling(temperature=2.0, top_k=4, top_p=0.613, min_p=0.1, repetition_penalty=1.5),
    ],
    ids=str,
)
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(data=st.data())
def test_ties_and_tokens_excluded_before(sampling: Sampling, data: st.DataObject) -> None:
    """Up to 16 tokens, their sort keeps the order of equals, so that each token can be compared."""
    # A quarter apart: sums of such probabilities don't meet 1 - p by accident.
    values = st.one_of(st.integers(-8, 8).map(lambda n: n / 4), st.just(-np.inf))
    logits_BV = data.draw(arrays(np.float32, (2, 9), elements=values))
    logits_BV[:, 0] = 0.25
    tokens_BT = data.draw(arrays(np.int64, (2, 4), elements=st.integers(PADDING + 1, 8)))
    ours_BV, theirs_BV = (rule(logits_BV, tokens_BT, sampling) for rule in (ours, theirs))
    assert differences(ours_BV, theirs_BV).max() <= BOUND


@pytest.mark.parametrize("p", [1e-30, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("vocab_size", [10, 100, 50257])
def test_of_equal_tokens_as_many_stay(vocab_size: int, p: float) -> None:
    """Which of them, their sort leaves open; so the probabilities are compared in their order."""
    rng = np.random.default_rng(0)
    logits_BV = rng.choice([-1.0, 0.0, 0.5], (3, vocab_size)).astype(np.float32)
    logits_BV[0] = -7.5
    tokens_BT = random_tokens(rng, 3, vocab_size)
    sampling = Sampling(top_p=p)
    ours_BV, theirs_BV = (
        np.sort(rule(logits_BV, tokens_BT, sampling), axis=1) for rule in (ours, theirs)
    )
    np.testing.assert_array_equal(ours_BV, theirs_BV)


def test_greedy_with_a_repetition_penalty(prove: Prove) -> None:
    rng = np.random.default_rng(3)
    logits_BV = rng.normal(0, 1, (64, 30)).astype(np.float32)
    tokens_BT = random_tokens(rng, 64, 30)
    sampling = Sampling(temperature=0, repetition_penalty=1.8)
    tokens_B = choose_compiled(
        logits_BV,
        jax.random.split(jax.random.key(0), 64),
        sampling=sampling,
        seen_BV=seen(logits_BV, tokens_BT),
    )
    theirs_B = theirs(logits_BV, tokens_BT, sampling).argmax(axis=1)
    prove(
        compare_tokens(
            "sampling: greedy with a penalty", np.asarray(tokens_B).tolist(), theirs_B.tolist()
        )
    )
    assert (theirs_B != logits_BV.argmax(axis=1)).sum() > 5, "the penalty changes too little"


def test_their_order_is_ours() -> None:
    every = Sampling(0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.3)
    assert [type(processor).__name__ for processor in processors(every, np.zeros((1, 1), int))] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]
