"""Generation: read the prompts in one pass, then one token a step, all compiled.

Shapes: B rows (one a prompt), T prompt slots, S cache slots, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gpt2_jax.attention import KVCache, empty_cache
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.generation.sampling import GREEDY, Sampling, choose
from gpt2_jax.model import GPT2, Params, apply

SMALLEST_BUCKET = 32


def generate(
    params: Params,
    config: GPT2Config,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """Continues prompts, which may differ in length.

    A row ends after `max_new_tokens`, after `config.eos_token_id`, or where the context is
    full: the last new token needs no position of its own, so a prompt of n tokens leaves room
    for n_positions - n + 1. Row i draws its randomness from (seed, i) alone.

    Lengths are rounded up to powers of two before compiling, so that calls share programs.

    Args:
      params: the parameter tree.
      config: the model they belong to.
      prompts: token ids, at least one a prompt.
      max_new_tokens: new tokens for every row, at most.
      sampling: how tokens are chosen.
      seed: of the random draws, in [0, 2^32).
      dtype: compute dtype.

    Returns:
      The new tokens of every row, <|endoftext|> included where it ended the row.

    Raises:
      UserError: if a prompt is empty, longer than the context, or holds an unknown token; if
        `seed` or `max_new_tokens` is out of range.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be in [0, 2^32)")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if len(prompts) == 0:
        return []
    for prompt in prompts:
        check_prompt(prompt, config)
    lengths = [len(prompt) for prompt in prompts]
    limits = [min(max_new_tokens, room(config, length)) for length in lengths]
    prompt_slots = _bucket(max(lengths), config.n_positions)
    cache_slots = _bucket(
        max(prompt_slots, max(map(sum, zip(lengths, limits, strict=True))) - 1), config.n_positions
    )
    tokens_BT = np.zeros((len(prompts), prompt_slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    new_BS, count_B = _generate(
        params,
        tokens_BT,
        np.array(lengths, np.int32),
        np.array(limits, np.int32),
        jax.random.key(seed),
        model=GPT2(config, dtype=dtype),
        sampling=sampling,
        cache_slots=cache_slots,
    )
    counts = np.asarray(count_B)
    return [row[:count].tolist() for row, count in zip(np.asarray(new_BS), counts, strict=True)]


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


class _Loop(NamedTuple):
    """State of the decode loop."""

    step: jax.Array
    """int32 scalar, number of tokens chosen for the rows still going"""
    token_B: jax.Array
    """the tokens chosen last"""
    new_BS: jax.Array
    """all tokens chosen so far"""
    count_B: jax.Array
    """how many of them each row has"""
    done_B: jax.Array
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("model", "sampling", "cache_slots"))
def _generate(
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    key: jax.Array,
    *,
    model: GPT2,
    sampling: Sampling,
    cache_slots: int,
) -> tuple[jax.Array, jax.Array]:
    """The compiled whole: new tokens [B, S + 1] and how many of them count in each row."""
    B = tokens_BT.shape[0]
    row_keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))

    def next_token(x_BD: jax.Array, step: jax.Array) -> jax.Array:
        logits_BV = apply(model, params, x_BD[:, None], method="logits")[:, 0]
        keys_B = jax.vmap(lambda row_key: jax.random.fold_in(row_key, step))(row_keys_B)
        return choose(logits_BV, keys_B, sampling)

    def record(loop: _Loop, token_B: jax.Array) -> _Loop:
        new_BS = loop.new_BS.at[:, loop.step].set(token_B)
        count_B = loop.count_B + ~loop.done_B
        done_B = loop.done_B | (count_B >= limit_B)
        if model.config.eos_token_id is not None:
            done_B |= token_B == model.config.eos_token_id
        return loop._replace(
            step=loop.step + 1, token_B=token_B, new_BS=new_BS, count_B=count_B, done_B=done_B
        )

    def decode(loop: _Loop) -> _Loop:
        x_B1D, cache = apply(model, params, loop.token_B[:, None], loop.cache, method="features")
        token_B = next_token(x_B1D[:, 0], loop.step)
        return record(loop._replace(cache=cache), token_B)

    cache = empty_cache(model.config, B, cache_slots, model.dtype)
    x_BTD, cache = apply(model, params, tokens_BT, cache, method="features")
    # The prompts are padded at their ends: the padding's slots are overwritten as the text grows,
    # and until then no position of the text looks at them.
    cache = cache._replace(length_B=length_B)
    x_BD = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    start = jnp.zeros((), jnp.int32)
    loop = _Loop(
        step=start,
        token_B=jnp.zeros(B, jnp.int32),
        new_BS=jnp.zeros((B, cache_slots + 1), jnp.int32),
        count_B=jnp.zeros(B, jnp.int32),
        done_B=jnp.zeros(B, bool),
        cache=cache,
    )
    loop = record(loop, next_token(x_BD, start))
    loop = jax.lax.while_loop(lambda loop: ~jnp.all(loop.done_B), decode, loop)
    return loop.new_BS, loop.count_B


def _bucket(length: int, limit: int) -> int:
    """`length` rounded up to a power of two, at most `limit`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)
