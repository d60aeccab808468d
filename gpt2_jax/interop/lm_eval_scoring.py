"""Log-likelihoods as lm-evaluation-harness asks for them: of pairs of context and continuation.

Its tasks ask for many continuations of one context, in any order and at times twice. Here they
become questions, which are scored once and whose context is read once.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.continuations import Continuation, Question
from gpt2_jax.tokenizer import decode

_log = logging.getLogger(__name__)

_Tokens = tuple[int, ...]


def log_likelihoods(
    scorer: Callable[[Sequence[Question]], Sequence[tuple[Continuation, ...]]],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
) -> list[tuple[float, bool]]:
    """Scores continuations of contexts.

    Args:
      scorer: what `make_scorer` returns, given its parameters.
      pairs: token ids of contexts and of continuations, at least one each. A context loses its
        beginning where both together have more than `max_length` + 1: the last is only predicted.
      max_length: most tokens in the model's context, at most its `n_positions`.

    Returns:
      For each pair the log-likelihood of the continuation, nats, summed in float64, and whether
      every token was the likeliest.

    Raises:
      UserError: if a continuation has no tokens, or more than `max_length`.
    """
    groups: dict[_Tokens, dict[_Tokens, list[int]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        _check(context, continuation, max_length)
        tokens = (*context, *continuation)[-(max_length + 1) :]
        start = len(tokens) - len(continuation)
        group = groups.setdefault(tokens[:start], {})
        group.setdefault(tokens[start:], []).append(number)
    warn_of_cuts([len(context) + len(tail) for context, tail in pairs], max_length + 1)
    questions = [
        Question(_array(context), tuple(map(_array, continuations)))
        for context, continuations in groups.items()
    ]
    answers = [(0.0, False)] * len(pairs)
    for group, results in zip(groups.values(), scorer(questions), strict=True):
        for numbers, result in zip(group.values(), results, strict=True):
            score = -float(result.losses_E.sum(dtype=np.float64))
            for number in numbers:
                answers[number] = score, result.greedy
    return answers


def warn_of_cuts(lengths: Sequence[int], longest: int) -> None:
    """Says how many texts of some numbers of tokens were too long, if any were."""
    cut = sum(length > longest for length in lengths)
    if cut:
        message = "%d of %d texts have more than %d tokens and lost their beginnings"
        _log.warning(message, cut, len(lengths), longest)


def _check(context: Sequence[int], continuation: Sequence[int], max_length: int) -> None:
    if 0 < len(continuation) <= max_length:
        return
    after = decode(context)[-40:]
    if not continuation:
        raise UserError(
            f"a continuation of {after!r} adds no token to it; mend the task, or leave it out"
        )
    raise UserError(
        f"a continuation of {after!r} has {len(continuation)} tokens, more than the context of "
        f"{max_length}; leave the task out, or give a model of longer context"
    )


def _array(tokens: _Tokens) -> np.ndarray:
    return np.array(tokens, np.int32)
