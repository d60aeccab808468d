"""The layers that hold parameters, against float64 NumPy and by their edges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.layers import Embedding, LayerNorm, Linear
from gpt2_jax.model import param_shapes

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_layer_norm_follows_its_formula_even_far_from_zero(mean):
    """The mean of the squares minus the square of the mean would be off by a tenth at 1000."""
    x_BTD = RNG.normal(mean, 1.0, (2, 3, 64)).astype(np.float32)
    scale_D, bias_D = (RNG.uniform(-1, 1, 64).astype(np.float32) for _ in range(2))
    params = {"scale": scale_D, "bias": bias_D}
    actual_BTD = LayerNorm(1e-5).apply({"params": params}, x_BTD)

    exact_BTD = x_BTD.astype(np.float64)
    deviation_BTD = exact_BTD - exact_BTD.mean(axis=-1, keepdims=True)
    variance_BT1 = exact_BTD.var(axis=-1, keepdims=True)
    expected_BTD = deviation_BTD / np.sqrt(variance_BT1 + 1e-5) * scale_D + bias_D
    # Summing 64 numbers in pairs rounds their mean six times, each by up to 2^-24 of it.
    np.testing.assert_allclose(actual_BTD, expected_BTD, rtol=0, atol=2e-6 + 6 * mean * 2**-24)


def test_layer_norm_of_equal_values_is_its_bias():
    params = {"scale": np.ones(4, np.float32), "bias": np.arange(4, dtype=np.float32)}
    y_BTD = LayerNorm(1e-5).apply({"params": params}, jnp.full((1, 1, 4), 7.0))
    np.testing.assert_array_equal(y_BTD[0, 0], params["bias"])


def test_linear_is_x_times_w_plus_b():
    x_BTD = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    kernel_DF, bias_F = (RNG.normal(size=shape).astype(np.float32) for shape in ((5, 7), (7,)))
    params = {"kernel": kernel_DF, "bias": bias_F}
    y_BTF = Linear(7, 0.02, jnp.float32).apply({"params": params}, x_BTD)
    # Five float32 products near 1.
    np.testing.assert_allclose(y_BTF, x_BTD.astype(float) @ kernel_DF + bias_F, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(Linear(7, 0.02, "bfloat16"), jnp.bfloat16), (LayerNorm(1e-5), jnp.float32)],
)
def test_layers_round_as_the_policy_says_and_keep_float32_parameters(layer, dtype):
    x_BTD = jnp.ones((1, 2, 5), jnp.float32)
    y_BTD, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x_BTD)
    assert y_BTD.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.fixture(scope="module")
def padded_table():
    """97 rows padded to 128, and the layer that reads them."""
    layer = Embedding(97, 32, 0.02, jnp.float32, padded_rows=128)
    return layer, layer.init(jax.random.key(0), jnp.zeros(1, jnp.int32))


def test_rows_that_pad_a_table_start_at_zero_and_are_no_output(padded_table):
    layer, variables = padded_table
    table_VD = variables["params"]["embedding"]
    assert table_VD.shape == (128, 32)
    assert not np.any(table_VD[97:])
    assert np.all(np.any(table_VD[:97], axis=1))
    logits_BTV = layer.apply(variables, jnp.ones((1, 2, 32)), method="logits")
    assert logits_BTV.shape == (1, 2, 97)


@pytest.mark.parametrize("index", [97, 128, 1000, -1])
def test_a_row_outside_the_table_is_nan(padded_table, index):
    layer, variables = padded_table
    assert np.isnan(layer.apply(variables, jnp.array([index]))).all()


def test_both_tables_of_an_untied_model_are_padded(tiny_config):
    config = dataclasses.replace(tiny_config, pad_vocab_size_multiple=64, tie_word_embeddings=False)
    shapes = param_shapes(config)
    assert {shapes[name]["embedding"].shape for name in ("wte", "lm_head")} == {(128, 32)}
