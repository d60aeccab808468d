"""What generation compiles: few programs for all calls, which hold no second copy of anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation import engine
from gpt2_jax.generation.decode import generate, stream
from gpt2_jax.generation.sampling import GREEDY, Sampling
from gpt2_jax.generation.session import bucket
from gpt2_jax.model import GPT2, param_shapes
from gpt2_jax.packed import compute_dtype, pack

RNG = np.random.default_rng(8)
PROMPTS = [RNG.integers(0, 97, length).tolist() for length in (4, 1, 17)]
WARM = Sampling(temperature=1.5)


def programs():
    return [engine.compiled(function)._cache_size() for function in (engine.read, engine.decode)]


def test_prompts_in_one_bucket_share_their_programs(shallow_config, shallow_params):
    def run(prompts=PROMPTS, **options):
        options = {"max_new_tokens": 9, "sampling": WARM, **options}
        generate(shallow_params, shallow_config, prompts, **options)
        return programs()

    before = run()
    assert run([prompt[::-1] for prompt in PROMPTS]) == before
    assert run([[1, 2, 3], [4] * 20, [5]]) == before
    assert run(max_new_tokens=3) == before
    assert run(max_new_tokens=[1, 16, 5]) == before
    assert run(seed=1) == before
    assert run(overflow="slide") == before
    assert run(PROMPTS[:2]) == [count + 1 for count in before]


def test_streams_share_their_programs_however_many_tokens_they_fetch(
    shallow_config, shallow_params
):
    def run(**options):
        options = {"max_new_tokens": 9, "alternatives": 2, **options}
        list(stream(shallow_params, shallow_config, PROMPTS, **options))
        return programs()

    before = run()
    assert run(max_new_tokens=16) == before
    assert run(max_new_tokens=1, seed=1) == before
    assert run(alternatives=1) == [count + 1 for count in before]


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (1, 1024, 32),
        (32, 1024, 32),
        (33, 1024, 64),
        (64, 1024, 64),
        (65, 1024, 96),
        (97, 1024, 128),
        (129, 1024, 192),
        (193, 1024, 256),
        (600, 1024, 768),
        (900, 1000, 1000),
        (5, 8, 8),
        (1, 1, 1),
    ],
)
def test_lengths_are_rounded_up_within_the_context(length, limit, expected):
    assert bucket(length, limit) == expected


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
@pytest.mark.parametrize(("packed_for", "rows"), [(1, 1), (3, 3), (9, 9), (3, 1)])
def test_the_loop_holds_no_second_copy_of_the_weights_or_the_cache(precision, packed_for, rows):
    """XLA likes to convert or turn all weights before a loop: they would be read at twice the
    size, and again in every call."""
    config = GPT2Config(vocab_size=4096, n_positions=64, n_embd=384, n_layer=2, n_head=6)
    shapes = param_shapes(config)
    packed = jax.eval_shape(functools.partial(pack, precision=precision, rows=packed_for), shapes)
    plan = engine.Plan(GPT2(config, dtype=compute_dtype(precision)), GREEDY, 64, None)

    def integers(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    constants = integers(rows), integers(rows, 2, dtype=jnp.uint32), key
    tokens_BT, which_B = integers(rows, 32), integers(rows, dtype=bool)
    state, _ = jax.eval_shape(
        functools.partial(engine.read, plan=plan),
        *(packed, None, tokens_BT, integers(rows), which_B, *constants),
    )
    decode = engine.compiled(engine.decode)
    program = decode.lower(packed, state, integers(), *constants, plan=plan).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < size(shapes) / 10
    # Donated: the loop goes on in the arrays it was given.
    assert memory.alias_size_in_bytes >= size(state.cache)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
