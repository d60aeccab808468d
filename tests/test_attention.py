"""Attention against its formula, and the cache against attention without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.attention import CausalSelfAttention, choose_implementation, empty_cache
from gpt2_jax.blocked_attention import blocked_attention
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2

# Sums of the same float32 terms in another order, through two blocks, at values near 3.
ROUNDING = {"rtol": 0, "atol": 2e-5}
TOKENS_BT = np.random.default_rng(4).integers(0, 97, (3, 14)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def features(model, params, tokens_BT, cache=None):
    return model.apply({"params": params}, tokens_BT, cache, method="features")


def test_attention_follows_its_formula(tiny_config, tiny_params):
    """Every head's mean of values, weighted by softmax(q k / sqrt(K)) over keys not later."""
    B, T, D, H, K = 2, 5, 32, 4, 8
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    params = tiny_params["h_0"]["attn"]
    layer = CausalSelfAttention(tiny_config, jnp.float32)
    actual_BTD, cache = layer.apply({"params": params}, x_BTD)
    assert cache is None

    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    qkv_BT3D = x_BTD @ weights["c_attn"]["kernel"] + weights["c_attn"]["bias"]
    mixed_BTD = np.zeros((B, T, D))
    for row in range(B):
        for head in range(H):
            q_TK, k_TK, v_TK = (qkv_BT3D[row, :, part * D + head * K :][:, :K] for part in range(3))
            for t in range(T):
                weight_S = np.exp(k_TK[: t + 1] @ q_TK[t] / np.sqrt(K))
                weight_S /= weight_S.sum()
                mixed_BTD[row, t, head * K : (head + 1) * K] = weight_S @ v_TK[: t + 1]
    expected_BTD = mixed_BTD @ weights["c_proj"]["kernel"] + weights["c_proj"]["bias"]
    np.testing.assert_allclose(actual_BTD, expected_BTD, **ROUNDING)


def test_decoding_token_by_token_gives_the_features_of_one_pass(tiny_config, tiny_params):
    """Rows of different lengths: padding is overwritten before any position looks at it."""
    model = GPT2(tiny_config)
    full_BTD, no_cache = features(model, tiny_params, TOKENS_BT)
    assert no_cache is None

    length_B = np.array([3, 7, 5], np.int32)
    prompt_BT = np.where(np.arange(7) < length_B[:, None], TOKENS_BT[:, :7], 96)
    cache = empty_cache(tiny_config, 3, slots=14, dtype=jnp.float32)
    prompt_BTD, cache = features(model, tiny_params, prompt_BT, cache)
    np.testing.assert_array_equal(cache.length_B, [7, 7, 7])
    for row, length in enumerate(length_B):
        np.testing.assert_allclose(prompt_BTD[row, :length], full_BTD[row, :length], **ROUNDING)

    cache = cache._replace(length_B=jnp.asarray(length_B))
    rows_B = np.arange(3)
    for step in range(7):
        position_B = length_B + step
        token_B1 = TOKENS_BT[rows_B, position_B][:, None]
        x_B1D, cache = features(model, tiny_params, token_B1, cache)
        np.testing.assert_allclose(x_B1D[:, 0], full_BTD[rows_B, position_B], **ROUNDING)
    np.testing.assert_array_equal(cache.length_B, length_B + 7)


def test_a_cache_takes_several_tokens_at_once(tiny_config, tiny_params):
    model = GPT2(tiny_config)
    full_BTD, _ = features(model, tiny_params, TOKENS_BT)
    cache = empty_cache(tiny_config, 3, slots=20, dtype=jnp.float32)
    parts = []
    for start in (0, 7):
        x_BTD, cache = features(model, tiny_params, TOKENS_BT[:, start : start + 7], cache)
        parts.append(x_BTD)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full_BTD, **ROUNDING)


def test_an_empty_cache_has_room_for_every_head_and_layer(tiny_config):
    cache = empty_cache(dataclasses.replace(tiny_config, n_layer=3), 2, slots=9, dtype="bfloat16")
    assert len(cache.layers) == 3
    for array in jax.tree.leaves(cache.layers):
        assert array.shape == (2 * 4, 9, 8)
        assert array.dtype == jnp.bfloat16
        assert not np.any(array)
    np.testing.assert_array_equal(cache.length_B, [0, 0])


@pytest.mark.parametrize(
    ("platform", "dtype", "head_width", "expected"),
    [
        ("gpu", "bfloat16", 64, "cudnn"),
        ("gpu", "float16", 128, "cudnn"),
        ("gpu", "bfloat16", 8, "cudnn"),
        ("gpu", "bfloat16", 136, "plain"),
        ("gpu", "bfloat16", 20, "plain"),
        ("gpu", "float32", 64, "plain"),
        ("cpu", "bfloat16", 64, "blocked"),
        ("cpu", "float32", 5, "blocked"),
        ("tpu", "bfloat16", 64, "plain"),
    ],
)
def test_flash_attention_is_chosen_only_where_cudnn_has_it(platform, dtype, head_width, expected):
    assert choose_implementation(platform, jnp.dtype(dtype), head_width) == expected


@pytest.mark.parametrize("T", [1, 5, 256, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_give_the_plain_forms_values_and_gradients(T, dtype):
    config = GPT2Config(n_positions=300, n_embd=24, n_layer=1, n_head=3, attn_pdrop=0.0)
    rng = np.random.default_rng(T)
    x_BTD, weights_BTD = (jnp.asarray(rng.normal(size=(2, T, 24)), jnp.float32) for _ in range(2))
    plain, blocked = (
        CausalSelfAttention(config, jnp.dtype(dtype), implementation)
        for implementation in ("plain", "blocked")
    )
    params = plain.init(jax.random.key(0), x_BTD)
    # Weights as large as this make some probabilities nearly one, and others nearly zero.
    params = jax.tree.map(lambda leaf: leaf * 20, params)

    def value(params, x_BTD, attention):
        return jnp.sum(attention.apply(params, x_BTD)[0].astype(jnp.float32) * weights_BTD)

    results = [
        (attention.apply(params, x_BTD)[0], jax.grad(value, (0, 1))(params, x_BTD, attention))
        for attention in (plain, blocked)
    ]
    # bfloat16 rounds a probability before or after it is divided by the sum: 8 bits either way.
    tolerance = {"float32": 1e-5, "bfloat16": 0.03}[dtype]
    for plain_leaf, blocked_leaf in zip(*map(jax.tree.leaves, results), strict=True):
        plain_leaf, blocked_leaf = (np.asarray(x, np.float32) for x in (plain_leaf, blocked_leaf))
        scale = np.abs(plain_leaf).max() or 1.0
        assert np.abs(plain_leaf - blocked_leaf).max() <= tolerance * scale


def test_blocks_are_chosen_on_a_cpu_and_not_where_probabilities_are_dropped():
    config = GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1, attn_pdrop=0.5)
    attention = CausalSelfAttention(config, jnp.float32)
    x_BTD = jnp.ones((1, 8, 4))
    params = attention.init(jax.random.key(0), x_BTD)

    def program(**options):
        return str(jax.make_jaxpr(lambda x: attention.apply(params, x, **options)[0])(x_BTD))

    assert "blocked_attention" in program()
    dropped = program(deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert "blocked_attention" not in dropped


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_many_layers_are_not_held_at_once(dtype):
    """The backward pass computes scores again, and each layer's when it is their turn."""
    B, T, H, K, layers = 1, 512, 4, 16, 8

    def value(x_BHTK):
        for _ in range(layers):
            x_BHTK = blocked_attention(x_BHTK, x_BHTK, x_BHTK, jnp.dtype(dtype))
        return x_BHTK.astype(jnp.float32).sum()

    x_BHTK = jnp.zeros((B, H, T, K), dtype)
    memory = jax.jit(jax.grad(value)).lower(x_BHTK).compile().memory_analysis()
    scores_of_a_layer = B * H * T * T * 4
    assert memory.temp_size_in_bytes < layers / 2 * scores_of_a_layer
