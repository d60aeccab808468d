"""The two compiled functions of generation, `read` and `decode`, and their state on the device.

Shapes: B rows (one a prompt), T prompt slots, S cache slots, V vocabulary, C tokens made in one
call, A alternatives.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.attention import KVCache, empty_cache
from gpt2_jax.generation.sampling import Sampling, choose
from gpt2_jax.model import GPT2, apply
from gpt2_jax.packed import PackedParams

CAPACITY = 64
"""tokens a row that one call can make"""


class Rows(NamedTuple):
    """State of all rows between two calls."""

    cache: KVCache
    token_B: jax.Array
    """the tokens chosen last, which the cache does not hold yet"""
    count_B: jax.Array
    """how many tokens were chosen in all"""
    ended_B: jax.Array
    """whether <|endoftext|> was"""
    seen_BV: jax.Array | None
    """the tokens that a row holds, if a sampling rule asks"""


class Made(NamedTuple):
    """What one call made; a row's tokens are its first `count_B`."""

    token_BC: Any
    logprob_BC: Any
    """None unless alternatives were asked for, be it 0 of them; so are the next two"""
    alternative_BCA: Any
    alternative_logprob_BCA: Any
    count_B: Any
    ended_B: Any
    finished_B: Any
    """whether the row's text is complete"""
    full_B: Any
    """whether the cache has no room for the row's last token"""

    def fetch(self) -> "Made":
        """The same as NumPy arrays; waits for the device."""
        return jax.device_get(self)


class _Told(NamedTuple):
    """The first four of `Made`, [B, ...] of one step or [C, B, ...] of many."""

    token: jax.Array
    logprob: jax.Array | None = None
    alternative: jax.Array | None = None
    alternative_logprob: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled in."""

    model: GPT2
    sampling: Sampling
    slots: int
    """of the cache"""
    alternatives: int | None


@functools.cache
def compiled(function: Callable[..., Any]) -> Any:
    """`read` or `decode`, jitted for this platform; the state is donated."""
    options = None
    if jax.default_backend() == "cpu":
        options = {
            # XLA uses half of a 512-bit register by itself.
            "xla_cpu_prefer_vector_width": 512,
            # It cuts sums into sums of 32, too short for LLVM to vectorise: see packed_int8.
            "xla_disable_hlo_passes": "tree_reduction_rewriter",
        }
    return jax.jit(
        function, static_argnames="plan", donate_argnames="rows", compiler_options=options
    )


def read(
    params: PackedParams,
    rows: Rows | None,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    which_B: jax.Array,
    limit_B: jax.Array,
    names_B2: jax.Array,
    key: jax.Array,
    *,
    plan: Plan,
) -> tuple[Rows, Made]:
    """Fills the cache of the rows in `which_B` with their texts and chooses their next tokens."""
    B = tokens_BT.shape[0]
    cache = empty_cache(plan.model.config, B, plan.slots, plan.model.dtype)
    x_BTD, cache = apply(plan.model, params, tokens_BT, cache, method="features")
    # The texts are padded at their ends: the padding's slots are overwritten as a text grows, and
    # until then none of its positions looks at them.
    cache = cache._replace(length_B=length_B)
    x_BD = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    if rows is None:
        zero_B = jnp.zeros(B, jnp.int32)
        seen_BV = _seen(tokens_BT, length_B, plan)
        rows = Rows(cache, zero_B, zero_B, jnp.zeros(B, bool), seen_BV)
    else:
        rows = rows._replace(cache=_select(which_B, cache, rows.cache))
    rows, told = _choose(params, rows, x_BD, which_B, names_B2, key, plan)
    told = jax.tree.map(lambda told_B: told_B[:, None], told)
    return rows, _made(told, which_B.astype(jnp.int32), rows, limit_B, plan)


def decode(
    params: PackedParams,
    rows: Rows,
    steps: jax.Array,
    limit_B: jax.Array,
    names_B2: jax.Array,
    key: jax.Array,
    *,
    plan: Plan,
) -> tuple[Rows, Made]:
    """Goes on, token by token, with every row that is neither finished nor full."""

    def active(rows: Rows) -> jax.Array:
        return ~_finished(rows, limit_B) & ~_full(rows, plan)

    def step(loop: tuple[jax.Array, Rows, _Told]) -> tuple[jax.Array, Rows, _Told]:
        index, rows, told = loop
        active_B = active(rows)
        x_B1D, cache = apply(
            plan.model, params, rows.token_B[:, None], rows.cache, method="features"
        )
        length_B = jnp.where(active_B, cache.length_B, rows.cache.length_B)
        rows = rows._replace(cache=cache._replace(length_B=length_B))
        rows, told_B = _choose(params, rows, x_B1D[:, 0], active_B, names_B2, key, plan)
        told = jax.tree.map(lambda all_CB, one_B: all_CB.at[index].set(one_B), told, told_B)
        return index + 1, rows, told

    def goes_on(loop: tuple[jax.Array, Rows, _Told]) -> jax.Array:
        index, rows, _ = loop
        return (index < steps) & jnp.any(active(rows))

    before_B = rows.count_B
    none_yet = _nothing_told(before_B.shape[0], plan)
    start = (jnp.zeros((), jnp.int32), rows, none_yet)
    _, rows, told = jax.lax.while_loop(goes_on, step, start)
    told = jax.tree.map(lambda told_CB: jnp.moveaxis(told_CB, 0, 1), told)
    return rows, _made(told, rows.count_B - before_B, rows, limit_B, plan)


def _choose(
    params: PackedParams,
    rows: Rows,
    x_BD: jax.Array,
    which_B: jax.Array,
    names_B2: jax.Array,
    key: jax.Array,
    plan: Plan,
) -> tuple[Rows, _Told]:
    """Chooses a token for every row from its features, and writes it down for those asked for."""
    logits_BV = apply(plan.model, params, x_BD[:, None], method="logits")[:, 0]

    def row_key(name_2: jax.Array, count: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, (name_2[0], name_2[1], count), key)

    keys_B = jax.vmap(row_key)(names_B2, rows.count_B)
    token_B = choose(logits_BV, keys_B, plan.sampling, rows.seen_BV)
    seen_BV = rows.seen_BV
    if seen_BV is not None:
        B = token_B.shape[0]
        seen_BV = seen_BV.at[jnp.arange(B), token_B].max(which_B)
    ended_B = rows.ended_B
    if plan.model.config.eos_token_id is not None:
        ended_B |= which_B & (token_B == plan.model.config.eos_token_id)
    rows = Rows(
        rows.cache,
        jnp.where(which_B, token_B, rows.token_B),
        rows.count_B + which_B,
        ended_B,
        seen_BV,
    )
    if plan.alternatives is None:
        return rows, _Told(token_B)
    logprob_BV = jax.nn.log_softmax(logits_BV)
    logprob_B = jnp.take_along_axis(logprob_BV, token_B[:, None], axis=1)[:, 0]
    likeliest = jax.lax.top_k(logprob_BV, plan.alternatives)
    return rows, _Told(token_B, logprob_B, likeliest[1], likeliest[0])


def _nothing_told(B: int, plan: Plan) -> _Told:
    """Buffers for what `_choose` tells in one call of `decode`."""
    integers, floats = (functools.partial(jnp.zeros, dtype=t) for t in (jnp.int32, jnp.float32))
    if plan.alternatives is None:
        return _Told(integers((CAPACITY, B)))
    many = (CAPACITY, B, plan.alternatives)
    return _Told(integers((CAPACITY, B)), floats((CAPACITY, B)), integers(many), floats(many))


def _made(told: _Told, count_B: jax.Array, rows: Rows, limit_B: jax.Array, plan: Plan) -> Made:
    return Made(*told, count_B, rows.ended_B, _finished(rows, limit_B), _full(rows, plan))


def _finished(rows: Rows, limit_B: jax.Array) -> jax.Array:
    return rows.ended_B | (rows.count_B >= limit_B)


def _full(rows: Rows, plan: Plan) -> jax.Array:
    return rows.cache.length_B >= plan.model.config.n_positions


def _seen(tokens_BT: jax.Array, length_B: jax.Array, plan: Plan) -> jax.Array | None:
    """The tokens that the texts hold, bool [B, V], if a sampling rule asks."""
    if not plan.sampling.needs_seen:
        return None
    B, T = tokens_BT.shape
    V = plan.model.config.vocab_size
    # Padding is sent outside the vocabulary, where nothing is written.
    tokens_BT = jnp.where(jnp.arange(T)[None] < length_B[:, None], tokens_BT, V)
    return jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], tokens_BT].set(True, mode="drop")


def _select(which_B: jax.Array, new: KVCache, old: KVCache) -> KVCache:
    """The new cache for some rows, the old one for the others."""

    def pick(new_N: jax.Array, old_N: jax.Array) -> jax.Array:
        which_N = jnp.repeat(which_B, new_N.shape[0] // which_B.shape[0])
        return jnp.where(which_N.reshape(-1, *[1] * (new_N.ndim - 1)), new_N, old_N)

    return jax.tree.map(pick, new, old)
