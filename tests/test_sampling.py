"""The rules of sampling against plain NumPy, and draws against their probabilities."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from gpt2_jax.errors import UserError
from gpt2_jax.generation.sampling import (
    GREEDY,
    Sampling,
    apply_rules,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    likeliest,
    penalize_repetition,
)

LOGITS_BV = np.random.default_rng(2).normal(0, 2, (3, 11)).astype(np.float32)
SEEN_BV = np.random.default_rng(3).random((3, 11)) < 0.4
EVERY_RULE = Sampling(0.7, top_k=8, top_p=0.93, min_p=0.02, repetition_penalty=1.4)

apply_compiled = jax.jit(apply_rules, static_argnames="sampling")
choose_compiled = jax.jit(choose, static_argnames="sampling")


def numpy_rules(logits_V, seen_V, sampling):
    """The rules one after the other, in float64, as loops."""
    penalty = sampling.repetition_penalty
    logits_V = [
        (logit * penalty if logit < 0 else logit / penalty) if seen else logit
        for logit, seen in zip(logits_V.astype(np.float64), seen_V, strict=True)
    ]
    logits_V = np.array(logits_V) / sampling.temperature
    if sampling.top_k is not None:
        kth = sorted(logits_V, reverse=True)[min(sampling.top_k, len(logits_V)) - 1]
        logits_V = np.array([logit if logit >= kth else -math.inf for logit in logits_V])
    if sampling.top_p is not None:
        probability_V = np.exp(logits_V - logits_V.max())
        probability_V /= probability_V.sum()
        total = 0.0
        least_first = sorted(range(len(logits_V)), key=lambda token: logits_V[token])
        for token in least_first[:-1]:
            total += probability_V[token]
            if total <= 1 - sampling.top_p:
                logits_V[token] = -math.inf
    if sampling.min_p is not None:
        least = logits_V.max() + (math.log(sampling.min_p) if sampling.min_p else -math.inf)
        logits_V = np.array([logit if logit >= least else -math.inf for logit in logits_V])
    return logits_V


def assert_rules(logits_BV, sampling, seen_BV=SEEN_BV):
    actual_BV = apply_compiled(logits_BV, sampling=sampling, seen_BV=seen_BV)
    for actual_V, logits_V, seen_V in zip(actual_BV, logits_BV, seen_BV, strict=True):
        expected_V = numpy_rules(logits_V, seen_V, sampling)
        np.testing.assert_allclose(actual_V, expected_V, rtol=1e-6)


def kept(rule, logits, value):
    logits_V = jax.jit(lambda logits_BV: rule(logits_BV, value))(jnp.float32(logits)[None])[0]
    return np.flatnonzero(np.isfinite(logits_V)).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        *(Sampling(temperature=temperature) for temperature in (0.3, 5.0)),
        *(Sampling(top_k=k) for k in (1, 2, 10, 11, 50257)),
        *(Sampling(top_p=p) for p in (1e-6, 0.2, 0.5, 0.9, 0.999, 1.0)),
        *(Sampling(min_p=p) for p in (0.0, 0.01, 0.3, 1.0)),
        *(Sampling(repetition_penalty=penalty) for penalty in (0.8, 1.4)),
        EVERY_RULE,
        dataclasses.replace(EVERY_RULE, temperature=3.0),
    ],
    ids=str,
)
def test_rules_are_those_of_plain_numpy(sampling):
    assert_rules(LOGITS_BV, sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=3),
        Sampling(top_p=0.37),
        Sampling(top_p=0.913),
        dataclasses.replace(EVERY_RULE, top_k=4, top_p=0.713),
    ],
    ids=str,
)
@settings(max_examples=100)
@given(data=st.data())
def test_rules_with_ties_and_excluded_tokens(sampling, data):
    # Quarters: sums of such probabilities don't meet 1 - p by accident.
    values = st.one_of(st.integers(-8, 8).map(lambda n: n / 4), st.just(-math.inf))
    logits_BV = data.draw(arrays(np.float32, (3, 11), elements=values))
    logits_BV[:, 3] = 1.0
    assert_rules(logits_BV, sampling, data.draw(arrays(bool, (3, 11))))


@settings(max_examples=25)
@given(st.permutations(range(11)))
def test_rules_follow_a_permutation_of_the_vocabulary(order):
    sampled_BV = apply_compiled(LOGITS_BV, sampling=EVERY_RULE, seen_BV=SEEN_BV)
    permuted_BV = apply_compiled(
        LOGITS_BV[:, order], sampling=EVERY_RULE, seen_BV=SEEN_BV[:, order]
    )
    np.testing.assert_array_equal(permuted_BV, sampled_BV[:, np.array(order)])


def test_tokens_tied_with_the_kth_stay():
    assert kept(keep_top_k, [1.0, 3.0, 1.0, 0.0, 1.0], 2) == [0, 1, 2, 4]
    assert kept(keep_top_k, [2.0, 2.0, 2.0], 1) == [0, 1, 2]


def test_zeros_of_both_signs_are_tied():
    """Whether a processor takes the smallest float32 numbers for zero or not."""
    assert kept(keep_top_k, [0.0, 1.0, -0.0, 2.0, -1.0], 3) == [0, 1, 2, 3]
    assert kept(keep_top_k, [-0.0, 0.0, 1.0], 2) == [0, 1, 2]


def test_top_k_of_fewer_tokens_keeps_these():
    assert kept(keep_top_k, [-math.inf, 1.0, -math.inf, 0.0], 3) == [1, 3]


def test_neighbouring_float32_numbers_are_told_apart():
    largest = np.float32(-100.0)
    second = np.nextafter(largest, np.float32(-math.inf))
    third = np.nextafter(second, np.float32(-math.inf))
    assert kept(keep_top_k, [third, largest, second], 2) == [1, 2]


def test_of_tokens_tied_at_the_nucleus_edge_the_last_stay():
    """Probabilities are 1/4 each: three reach 0.6."""
    assert kept(keep_top_p, [0.0, 0.0, 0.0, 0.0], 0.6) == [1, 2, 3]
    assert kept(keep_top_p, [0.0, 9.0, 9.0, 9.0, 9.0], 0.6) == [2, 3, 4]


def test_a_nucleus_reached_exactly_takes_no_token_more():
    assert kept(keep_top_p, [0.0, 0.0, 0.0, 0.0], 0.5) == [2, 3]


def test_a_tiny_nucleus_is_one_token():
    for p in (1e-300, 1e-30, 1e-6):
        assert kept(keep_top_p, LOGITS_BV[0], p) == [int(np.argmax(LOGITS_BV[0]))]
        assert kept(keep_top_p, [0.0, 0.0, 0.0], p) == [2]


def test_a_nucleus_of_everything_keeps_even_what_is_all_but_impossible():
    assert kept(keep_top_p, [0.0, 50.0, -50.0, 1.0], 1.0) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.8}, [0, 1]),
        ({"top_k": 2, "top_p": 0.5}, [0]),
        # The second would not be in the nucleus of what min-p leaves.
        ({"top_p": 0.55, "min_p": 0.6}, [0, 1]),
        # The third would be in the nucleus before the temperature.
        ({"temperature": 0.5, "top_p": 0.8}, [0, 1]),
    ],
    ids=str,
)
def test_a_rule_applies_to_what_the_rules_before_left(rules, expected):
    logits_BV = np.log([[0.4, 0.3, 0.2, 0.1]]).astype(np.float32)
    left_BV = apply_compiled(logits_BV, sampling=Sampling(**rules))
    assert np.flatnonzero(np.isfinite(left_BV[0])).tolist() == expected


def test_min_p_of_one_keeps_the_likeliest_and_its_equals():
    assert kept(keep_min_p, [1.0, 3.0, 2.9, 3.0], 1.0) == [1, 3]
    assert kept(keep_min_p, [1.0, 3.0, -math.inf, 3.0], 0.0) == [0, 1, 3]


def test_a_penalty_lowers_seen_tokens_whatever_their_sign():
    logits_BV = jnp.array([[3.0, -3.0, 3.0, -3.0, 0.0]])
    seen_BV = jnp.array([[True, True, False, False, True]])
    penalized_BV = penalize_repetition(logits_BV, seen_BV, 1.5)
    np.testing.assert_allclose(penalized_BV, [[2.0, -4.5, 3.0, -3.0, 0.0]], rtol=1e-7)


def test_a_rows_rules_do_not_depend_on_the_rows_beside_it():
    """Searches take more steps in a row than in another, and ties only concern their own."""
    beside_BV = np.stack([LOGITS_BV[0], 40 * LOGITS_BV[1], np.zeros(11, np.float32)])
    for sampling in (Sampling(top_k=4), Sampling(top_p=0.77), EVERY_RULE):
        together_BV = apply_compiled(beside_BV, sampling=sampling, seen_BV=SEEN_BV)
        for row in (slice(0, 1), slice(1, 2), slice(2, 3)):
            alone_BV = apply_compiled(beside_BV[row], sampling=sampling, seen_BV=SEEN_BV[row])
            np.testing.assert_array_equal(together_BV[row], alone_BV)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, True, "1", None], ids=repr)
@pytest.mark.parametrize("rule", ["temperature", "repetition_penalty"])
def test_bad_numbers_are_refused_by_name(rule, value):
    with pytest.raises(UserError, match=f"^{rule}={value!r} must be a finite number"):
        Sampling(**{rule: value})


def test_a_penalty_of_nothing_is_refused():
    with pytest.raises(UserError, match="above 0; 1 turns it off"):
        Sampling(repetition_penalty=0.0)


@pytest.mark.parametrize("value", [0, -3, 1.5, 2.0, math.nan, True, "5"], ids=repr)
def test_bad_top_k_is_refused_by_name(value):
    with pytest.raises(UserError, match=f"^top_k={value!r} must be a whole number of at least 1; "):
        Sampling(top_k=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, False, "0.9"], ids=repr)
@pytest.mark.parametrize("rule", ["top_p", "min_p"])
def test_bad_probabilities_are_refused_by_name(rule, value):
    with pytest.raises(UserError, match=f"^{rule}={value!r} must be a number in "):
        Sampling(**{rule: value})


def test_a_nucleus_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"^top_p=0\.0 must be"):
        Sampling(top_p=0.0)


def test_numbers_of_numpy_are_numbers():
    sampling = Sampling(np.float32(0.5), np.int64(3), np.float64(0.9), np.float32(0.1))
    assert_rules(LOGITS_BV, sampling)


def test_missing_seen_tokens_are_a_bug_that_is_named():
    sampling = Sampling(repetition_penalty=1.2)
    assert sampling.needs_seen
    assert not Sampling().needs_seen
    with pytest.raises(ValueError, match="needs seen_BV"):
        apply_rules(jnp.asarray(LOGITS_BV), sampling)


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
    logits_BV = jnp.array([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]])
    tokens_B = choose_compiled(logits_BV, jax.random.split(jax.random.key(0), 2), sampling=GREEDY)
    assert tokens_B.tolist() == [1, 0]
    assert tokens_B.dtype == jnp.int32
    assert GREEDY.greedy
    assert not Sampling().greedy


def test_greedy_heeds_a_penalty():
    logits_BV = jnp.array([[2.0, 1.9, 0.0], [-1.0, -1.1, -2.0], [2.0, 1.0, 0.0]])
    seen_BV = jnp.array([[True, False, True]] * 3)
    tokens_B = choose_compiled(
        logits_BV,
        jax.random.split(jax.random.key(0), 3),
        sampling=Sampling(temperature=0, repetition_penalty=1.3),
        seen_BV=seen_BV,
    )
    assert tokens_B.tolist() == [1, 1, 0]


@given(arrays(np.float32, (4, 9), elements=st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 7.0])))
def test_the_likeliest_is_that_of_argmax(logits_BV):
    np.testing.assert_array_equal(likeliest(logits_BV), logits_BV.argmax(axis=1))


def test_the_likeliest_of_no_numbers_is_still_a_token():
    assert likeliest(jnp.full((1, 9), jnp.nan))[0] in range(9)


@pytest.mark.parametrize("temperature", [1e-3, 1e-29, 1e-37, 1e-39, 1e-300])
@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_a_tiny_temperature_is_greedy(temperature, shift):
    keys_B = jax.random.split(jax.random.key(0), 3)
    tokens_B = choose_compiled(LOGITS_BV + shift, keys_B, sampling=Sampling(temperature))
    np.testing.assert_array_equal(tokens_B, LOGITS_BV.argmax(axis=1))


def p_value(tokens_N, probability_V):
    """How likely draws would be at least as far from their expected counts (Pearson's chi-square).

    None may be of probability zero.
    """
    expected_V = len(tokens_N) * probability_V / probability_V.sum()
    counts_V = np.bincount(tokens_N, minlength=len(probability_V))
    possible_V = expected_V > 0
    assert not counts_V[~possible_V].any()
    assert expected_V[possible_V].min() > 5, "too few draws for the approximation"
    return stats.chisquare(counts_V[possible_V], expected_V[possible_V]).pvalue


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(2.0, top_k=6, top_p=0.9), dataclasses.replace(EVERY_RULE, temperature=3)],
    ids=str,
)
def test_draws_follow_the_probabilities(sampling):
    """With one seed, fixed: draws as they should be fail for one seed in a thousand."""
    draws = 200_000
    tokens_N = choose_compiled(
        jnp.tile(LOGITS_BV[:1], (draws, 1)),
        jax.random.split(jax.random.key(7), draws),
        sampling=sampling,
        seen_BV=jnp.tile(SEEN_BV[:1], (draws, 1)),
    )
    probability_V = np.exp(numpy_rules(LOGITS_BV[0], SEEN_BV[0], sampling))
    assert p_value(tokens_N, probability_V) > 1e-3
    # Had the likeliest token been a twentieth likelier, this test would have failed.
    wrong_V = probability_V.copy()
    wrong_V[np.argmax(wrong_V)] *= 1.05
    assert p_value(tokens_N, wrong_V) < 1e-9


def test_draws_from_gpt2s_vocabulary_follow_the_probabilities():
    """Tokens are counted in 64 groups of similar probability, so that each is drawn often."""
    logits_V = np.random.default_rng(4).normal(-60, 3, 50257).astype(np.float32)
    keys_N = jax.random.split(jax.random.key(1), 20_000)
    tokens_N = jax.jit(lambda x_V: jax.lax.map(lambda key: draw(x_V[None], key[None])[0], keys_N))(
        logits_V
    )
    probability_V = np.exp(logits_V.astype(np.float64) + 60)
    probability_V /= probability_V.sum()
    order_V = np.argsort(probability_V)
    group_V = np.empty(50257, int)
    group_V[order_V] = np.minimum(64 * np.cumsum(probability_V[order_V]), 63)
    groups_N = group_V[np.asarray(tokens_N)]
    assert p_value(groups_N, np.bincount(group_V, probability_V)) > 1e-3
    # And in 64 groups of neighbours, which lie in the same blocks.
    neighbours_V = np.arange(50257) * 64 // 50257
    assert p_value(neighbours_V[tokens_N], np.bincount(neighbours_V, probability_V)) > 1e-3


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 10, 50])
def test_the_only_token_left_is_drawn_wherever_it_is(vocab_size):
    logits_BV = jnp.where(jnp.eye(vocab_size, dtype=bool), -80.0, -jnp.inf)
    keys_B = jax.random.split(jax.random.key(0), vocab_size)
    np.testing.assert_array_equal(jax.jit(draw)(logits_BV, keys_B), np.arange(vocab_size))


def test_a_rows_draw_does_not_depend_on_the_rows_beside_it():
    keys_B = jax.random.split(jax.random.key(1), 3)
    together_B = choose_compiled(LOGITS_BV, keys_B, sampling=EVERY_RULE, seen_BV=SEEN_BV)
    for row in (slice(0, 1), slice(1, 2), slice(2, 3)):
        alone_B = choose_compiled(
            LOGITS_BV[row], keys_B[row], sampling=EVERY_RULE, seen_BV=SEEN_BV[row]
        )
        assert alone_B[0] == together_B[row][0]


def test_rows_of_equal_logits_and_different_keys_differ():
    keys_N = jax.random.split(jax.random.key(1), 50)
    tokens_N = choose_compiled(jnp.zeros((50, 1000)), keys_N, sampling=Sampling())
    assert len(set(tokens_N.tolist())) > 40
