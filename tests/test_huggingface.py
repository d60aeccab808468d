"""Hugging Face's names: weights come back from a round trip, and nothing unknown gets in."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from gpt2_jax.config import ACTIVATION_FUNCTIONS, SIZES, GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop.huggingface import (
    config_from_json,
    config_to_json,
    expected_shapes,
    param_path,
    params_from_state_dict,
    state_dict_from_params,
    state_name,
)
from gpt2_jax.model import param_shapes


@pytest.fixture
def state(tiny_config, tiny_params):
    return state_dict_from_params(tiny_params, tiny_config)


def random_params(config, seed=3):
    """Any values, but the vocabulary's padding zero."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), param_shapes(config)
    )
    for table in ("wte", "lm_head"):
        if table in params:
            params[table]["embedding"][config.vocab_size :] = 0
    return params


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multiple", [1, 64])
def test_parameters_come_back_from_a_round_trip_bit_for_bit(tiny_config, tied, multiple):
    config = dataclasses.replace(
        tiny_config, tie_word_embeddings=tied, pad_vocab_size_multiple=multiple
    )
    params = random_params(config)
    state = state_dict_from_params(params, config)
    assert state["transformer.wte.weight"].shape == (97, 32)
    assert state["lm_head.weight"].shape == (97, 32)
    assert np.array_equal(state["lm_head.weight"], state["transformer.wte.weight"]) == tied
    back = params_from_state_dict(state, config, "state")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_are_those_of_hugging_face_and_go_both_ways(tiny_config):
    assert state_name("h_0/attn/c_attn/kernel") == "h.0.attn.c_attn.weight"
    assert state_name("h_11/ln_2/scale") == "h.11.ln_2.weight"
    assert state_name("wpe/embedding") == "wpe.weight"
    assert state_name("ln_f/bias") == "ln_f.bias"
    for config in (GPT2Config(), dataclasses.replace(tiny_config, tie_word_embeddings=False)):
        paths = {
            "/".join(key.key for key in path)
            for path, _ in jax.tree_util.tree_leaves_with_path(param_shapes(config))
        }
        names = {state_name(path) for path in paths}
        assert names == set(expected_shapes(config))
        assert {param_path(name) for name in names} == paths


def test_the_prefix_may_be_missing(tiny_config, tiny_params, state):
    bare = {name.removeprefix("transformer."): array for name, array in state.items()}
    assert "wte.weight" in bare
    back = params_from_state_dict(bare, tiny_config, "state")
    jax.tree.map(np.testing.assert_array_equal, back, tiny_params)


def test_a_weight_given_twice_is_refused(tiny_config, state):
    state["ln_f.bias"] = state["transformer.ln_f.bias"]
    with pytest.raises(UserError, match=r"holds ln_f\.bias twice"):
        params_from_state_dict(state, tiny_config, "state")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_stored_masks_are_ignored(tiny_config, tiny_params, state, prefix):
    for layer in range(2):
        state[f"{prefix}h.{layer}.attn.bias"] = np.tri(32, dtype=np.bool_)[None, None]
        state[f"{prefix}h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    back = params_from_state_dict(state, tiny_config, "state")
    jax.tree.map(np.testing.assert_array_equal, back, tiny_params)


def test_a_tied_head_need_not_be_stored(tiny_config, tiny_params, state):
    del state["lm_head.weight"]
    back = params_from_state_dict(state, tiny_config, "state")
    jax.tree.map(np.testing.assert_array_equal, back, tiny_params)


def test_a_tied_head_that_differs_is_refused(tiny_config, state):
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"state: lm_head\.weight differs"):
        params_from_state_dict(state, tiny_config, "state")


def test_an_untied_head_must_be_stored(tiny_config, state):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False)
    del state["lm_head.weight"]
    with pytest.raises(UserError, match=r"missing lm_head\.weight"):
        params_from_state_dict(state, config, "state")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_every_float_becomes_float32(tiny_config, state, dtype):
    narrow = {name: array.astype(dtype) for name, array in state.items()}
    back = params_from_state_dict(narrow, tiny_config, "state")
    for leaf in jax.tree.leaves(back):
        assert leaf.dtype == np.float32
    np.testing.assert_array_equal(
        back["wte"]["embedding"], narrow["lm_head.weight"].astype(np.float32)
    )


KERNEL = "transformer.h.1.attn.c_attn.weight"
SPOILED = {
    "missing h.1.attn.c_attn.weight": lambda state: state.pop(KERNEL),
    "extra h.2.ln_1.bias": lambda state: state.update({"h.2.ln_1.bias": np.zeros(32)}),
    "h.1.attn.c_attn.weight has shape (96, 32), not (32, 96)": lambda state: state.update(
        {KERNEL: state[KERNEL].T}
    ),
    "h.1.attn.c_attn.weight has dtype int32": lambda state: state.update(
        {KERNEL: state[KERNEL].astype(np.int32)}
    ),
}


@pytest.mark.parametrize("problem", SPOILED)
def test_a_weight_that_does_not_fit_is_named(tiny_config, state, problem):
    SPOILED[problem](state)
    with pytest.raises(UserError) as caught:
        params_from_state_dict(state, tiny_config, "somewhere")
    assert "somewhere does not fit the model" in str(caught.value)
    assert problem in str(caught.value)


def test_many_problems_are_told_and_the_rest_counted(tiny_config):
    with pytest.raises(UserError, match=r"missing .*; and 20 more") as caught:
        params_from_state_dict({}, tiny_config, "state")
    assert str(caught.value).count("missing") == 8


def test_a_config_comes_back_from_json(tiny_config):
    for config in (*SIZES.values(), dataclasses.replace(tiny_config, n_inner=40)):
        fields = json.loads(json.dumps(config_to_json(config)))
        assert config_from_json(fields, "config.json") == config
    assert config_to_json(tiny_config)["model_type"] == "gpt2"


def test_fields_left_out_have_hugging_faces_defaults():
    assert config_from_json({"model_type": "gpt2"}, "config.json") == GPT2Config()


UNUSUAL = {
    "vocab_size": 11,
    "n_positions": 10,
    "n_embd": 26,
    "n_layer": 3,
    "n_head": 13,
    "n_inner": 14,
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-3,
    "initializer_range": 0.5,
    "embd_pdrop": 0.25,
    "attn_pdrop": 0.3,
    "resid_pdrop": 0.35,
    "tie_word_embeddings": False,
    "eos_token_id": 9,
}


def test_every_field_of_the_architecture_is_obeyed():
    config = config_from_json({"model_type": "gpt2", "n_ctx": 5, **UNUSUAL}, "config.json")
    kept = dataclasses.asdict(config)
    assert kept.pop("pad_vocab_size_multiple") == 1
    assert kept == UNUSUAL
    default = dataclasses.asdict(GPT2Config())
    assert all(default[name] != value for name, value in UNUSUAL.items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt_neox"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
        ("activation_function", "gelu_python_tanh"),
        ("n_head", 5),
        ("n_layer", "12"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"config.json.*{field}"):
        config_from_json({"model_type": "gpt2", field: value}, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reorder_and_upcast_attn", True),
        ("pruned_heads", None),
        ("pruned_heads", {}),
        ("use_cache", False),
        *(("activation_function", name) for name in ACTIVATION_FUNCTIONS),
    ],
)
def test_what_changes_nothing_or_is_supported_is_accepted(field, value):
    config = config_from_json({"model_type": "gpt2", field: value}, "config.json")
    assert config.n_layer == 12


@pytest.mark.parametrize("fields", [{}, [], None, "gpt2", {"n_layer": 12}], ids=str)
def test_what_is_no_model_config_is_refused(fields):
    with pytest.raises(UserError, match="it has no model_type"):
        config_from_json(fields, "config.json")
