"""Generation: read the prompts in one pass, then one token after another, all compiled.

`generate` returns whole texts, `stream` yields tokens as they are made. Both drive a `Session`,
whose loop calls the two compiled functions of `engine.py`.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.generation.engine import CAPACITY, Made
from gpt2_jax.generation.sampling import GREEDY, Sampling
from gpt2_jax.generation.session import Session
from gpt2_jax.model import Params
from gpt2_jax.packed import PackedParams, Precision, pack

FinishReason = Literal["stop", "length", "context"]
"""why a text ended: <|endoftext|>, max_new_tokens, or a context without room for more"""

Overflow = Literal["stop", "slide"]
"""where the context is full: end the text, or read its last half again and go on"""


SMOOTH = 0.03
"""seconds between two sights of a growing text that a reader takes for a flow"""


class NewToken(NamedTuple):
    """A token, as `stream` yields it."""

    row: int
    """index of the prompt"""
    token: int
    logprob: float
    """natural logarithm of the model's own probability, before any sampling rule"""
    alternatives: list[tuple[int, float]]
    """the model's likeliest tokens and their log-probabilities, likeliest first"""
    finish_reason: FinishReason | None
    """set on a row's last token"""


def generate(
    params: Params | PackedParams,
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    precision: Precision | None = None,
    overflow: Overflow = "stop",
) -> list[list[int]]:
    """Continues prompts, which may differ in length.

    A row ends after `max_new_tokens`, after `config.eos_token_id`, or where the context is full:
    the last new token needs no position of its own, so a prompt of n tokens leaves room for
    n_positions - n + 1. A row's text depends on its prompt, the seed and how often the same prompt
    came before it in `prompts`, not on the other rows.

    Args:
      params: the parameter tree, or what `gpt2_jax.pack` made of it: packing takes a moment, which
        those who call often spare themselves.
      config: the model they belong to.
      prompts: token ids, at least one a prompt.
      max_new_tokens: new tokens at most, for every row or for each.
      sampling: how tokens are chosen.
      seed: of the random draws, in [0, 2^32).
      precision: "f32" (the default), "bf16" or "int8"; packed parameters have theirs already.
      overflow: "stop" ends a row where the context is full; "slide" reads the last half of the
        context again, as if it were a new prompt, and goes on.

    Returns:
      The new tokens of every row, <|endoftext|> included where it ended the row.

    Raises:
      UserError: if a prompt is empty, longer than the context, or holds an unknown token; if
        another argument is out of range.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    limits = _wanted(max_new_tokens, len(prompts))
    session = _open(params, config, prompts, limits, sampling, seed, precision, overflow, None)
    for made in session.run():
        for row, text in enumerate(texts):
            text.extend(made.token_BC[row, : made.count_B[row]].tolist())
    return texts


def stream(
    params: Params | PackedParams,
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    precision: Precision | None = None,
    overflow: Overflow = "stop",
    alternatives: int = 0,
) -> Iterator[NewToken]:
    """Yields the tokens of `generate`, which has the arguments, as they are made.

    Rows take turns: all first tokens, then the second ones, until the last row ends. Arguments
    are checked at once, before the first token is asked for.

    Args:
      params: as for `generate`, like all other arguments but the last.
      config: ditto.
      prompts: ditto.
      max_new_tokens: ditto.
      sampling: ditto.
      seed: ditto.
      precision: ditto.
      overflow: ditto.
      alternatives: how many of the model's likeliest tokens are told with each.
    """
    if not 0 <= alternatives <= config.vocab_size:
        raise UserError(
            f"alternatives={alternatives} must be between 0 and {config.vocab_size}, the vocabulary"
        )
    wanted = _wanted(max_new_tokens, len(prompts))
    session = _open(
        params, config, prompts, wanted, sampling, seed, precision, overflow, alternatives
    )
    return _tokens(session, wanted)


def check_prompt(prompt: Sequence[int], config: GPT2Config) -> None:
    """Raises UserError if a prompt is empty, longer than the context, or of another vocabulary."""
    if not len(prompt):
        raise UserError(
            "the prompt is empty; give some text, or <|endoftext|> for a text from nothing"
        )
    if len(prompt) > config.n_positions:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, more than the context of "
            f"{config.n_positions}; shorten it"
        )
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"prompt token {token} is outside the model's vocabulary of {config.vocab_size}; "
                f"use the model's own tokenizer"
            )


def room(config: GPT2Config, prompt_length: int) -> int:
    """How many tokens can follow a prompt before the context is full."""
    return config.n_positions - prompt_length + 1


def _open(
    params: Params | PackedParams,
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    seed: int,
    precision: Precision | None,
    overflow: Overflow,
    alternatives: int | None,
) -> Session:
    """A session, once all arguments are checked."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be in [0, 2^32)")
    if overflow not in get_args(Overflow):
        raise UserError(f"overflow={overflow!r} must be one of {', '.join(get_args(Overflow))}")
    for prompt in prompts:
        check_prompt(prompt, config)
    if overflow == "stop":
        rooms = [room(config, len(prompt)) for prompt in prompts]
        limits = list(map(min, limits, rooms))
    packed = _packed(params, precision, len(prompts))
    return Session(packed, config, prompts, limits, sampling, seed, alternatives)


def _tokens(session: Session, wanted: Sequence[int]) -> Iterator[NewToken]:
    """Single tokens; from a fast device, more of them are fetched at a time."""
    counts = [0] * len(wanted)
    session.steps, last = 1, time.monotonic()
    for made in session.run():
        for index, row in itertools.product(range(made.count_B.max()), range(len(counts))):
            if index < made.count_B[row]:
                counts[row] += 1
                reason: FinishReason | None = None
                if made.finished_B[row] and index == made.count_B[row] - 1:
                    reason = "length" if counts[row] == wanted[row] else "context"
                    reason = "stop" if made.ended_B[row] else reason
                yield _new_token(made, row, index, reason)
        now = time.monotonic()
        if now - last < SMOOTH:
            session.steps = min(2 * session.steps, CAPACITY)
        last = now


def _new_token(made: Made, row: int, index: int, reason: FinishReason | None) -> NewToken:
    alternatives = zip(
        made.alternative_BCA[row, index].tolist(),
        made.alternative_logprob_BCA[row, index].tolist(),
        strict=True,
    )
    token, logprob = made.token_BC[row, index].item(), made.logprob_BC[row, index].item()
    return NewToken(row, token, logprob, list(alternatives), reason)


def _packed(params: Params | PackedParams, precision: Precision | None, rows: int) -> PackedParams:
    """Parameters packed in a precision; None takes what they have, float32 if they are not."""
    if not isinstance(params, PackedParams):
        return pack(params, precision or "f32", rows=rows)
    if precision not in (None, params.precision):
        raise UserError(
            f"precision={precision!r} does not fit parameters packed in {params.precision}; "
            f"pack the original ones again, or leave it out"
        )
    return params


def _wanted(max_new_tokens: int | Sequence[int], rows: int) -> list[int]:
    """New tokens for each row."""
    single = isinstance(max_new_tokens, int)
    wanted = [max_new_tokens] if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not single and len(wanted) != rows:
        raise UserError(
            f"max_new_tokens has {len(wanted)} limits for {rows} prompts; give one or one for each"
        )
    for count in wanted:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"max_new_tokens={count!r} must be a whole number of at least 1")
    return wanted * rows if single else wanted
