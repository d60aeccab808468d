"""The architecture's hyperparameters: published sizes, and values that make no model."""

import math

import jax
import pytest

from gpt2_jax.config import SIZES, GPT2Config, config_for_size
from gpt2_jax.errors import UserError
from gpt2_jax.model import param_shapes

PARAMETER_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def count_parameters(config: GPT2Config) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))


def test_the_sizes_are_the_published_ones():
    assert set(SIZES) == set(PARAMETER_COUNTS)


@pytest.mark.parametrize(("name", "count"), PARAMETER_COUNTS.items())
def test_parameter_count_of_the_published_sizes(name, count):
    config = config_for_size(name)
    assert config.parameter_count == count
    assert count_parameters(config) == count


@pytest.mark.parametrize(
    "fields",
    [
        {"n_inner": 40},
        {"tie_word_embeddings": False},
        {"n_layer": 3, "n_head": 2, "n_positions": 11},
    ],
    ids=str,
)
def test_parameter_count_follows_every_field_that_adds_parameters(fields):
    config = GPT2Config(**{"vocab_size": 97, "n_embd": 16, "n_layer": 1, "n_head": 4, **fields})
    assert config.parameter_count == count_parameters(config)


def test_vocabulary_padding_adds_rows_but_no_parameters_that_count():
    config = GPT2Config(pad_vocab_size_multiple=64)
    assert config.padded_vocab_size == 50_304
    assert config.parameter_count == PARAMETER_COUNTS["gpt2"]
    padding_rows = 50_304 - 50_257
    assert count_parameters(config) == PARAMETER_COUNTS["gpt2"] + padding_rows * config.n_embd


def test_a_vocabulary_that_is_a_multiple_already_gets_no_padding():
    assert GPT2Config(vocab_size=128, pad_vocab_size_multiple=64).padded_vocab_size == 128


def test_widths_follow_from_the_fields():
    config = GPT2Config(n_embd=48, n_head=6)
    assert (config.head_width, config.mlp_width) == (8, 192)
    assert GPT2Config(n_inner=100).mlp_width == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, bad) for name in ("vocab_size", "n_positions", "n_embd") for bad in (0, -1, 1.5)),
        ("n_layer", 0),
        ("n_layer", True),
        ("n_head", "12"),
        ("n_head", None),
        ("n_head", 7),
        ("n_inner", 0),
        ("n_inner", 10.0),
        ("pad_vocab_size_multiple", 0),
        ("activation_function", "swish7"),
        ("layer_norm_epsilon", 0.0),
        ("layer_norm_epsilon", math.inf),
        ("initializer_range", -0.02),
        ("initializer_range", math.nan),
        ("embd_pdrop", 1.0),
        ("attn_pdrop", -0.1),
        ("resid_pdrop", math.nan),
        ("resid_pdrop", None),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", [50256]),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field) as caught:
        GPT2Config(**{field: value})
    assert repr(value) in str(caught.value)


def test_an_unknown_size_is_refused_and_the_known_ones_listed():
    with pytest.raises(UserError, match="'gpt3'") as caught:
        config_for_size("gpt3")
    assert all(name in str(caught.value) for name in SIZES)
