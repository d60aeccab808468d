"""PEFT's adapters: written by hand in its format, they load as its formula says or not at all."""

import json
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.interop.peft import load_adapter
from gpt2_jax.lora import merge
from gpt2_jax.lora_settings import LoraSettings, adapted_layers
from gpt2_jax.sources import load_source

ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
WIDTHS = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128)}
WIDTHS["mlp.c_proj"] = (128, 32)
# adapter_config.json as PEFT 0.21 writes it for GPT2LMHeadModel.
FIELDS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "openai-community/gpt2",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": True,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 6,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["c_attn"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def every(*targets, blocks=(0, 1)):
    """Full module names, as in "h.0.attn.c_attn"."""
    return [f"h.{block}.{target}" for block in blocks for target in targets]


def tensors(ranks, dtype=np.float32):
    """PEFT's state dict for modules of given ranks."""
    rng = np.random.default_rng(11)
    state = {}
    for module, rank in ranks.items():
        width_in, width_out = WIDTHS[module.split(".", 2)[2]]
        prefix = f"base_model.model.transformer.{module}"
        state[f"{prefix}.lora_A.weight"] = rng.uniform(-1, 1, (rank, width_in)).astype(dtype)
        state[f"{prefix}.lora_B.weight"] = rng.uniform(-1, 1, (width_out, rank)).astype(dtype)
    return state


def write(directory, state, **fields):
    """An adapter directory; fields set to ... are left out."""
    directory.mkdir(exist_ok=True)
    kept = {name: value for name, value in (FIELDS | fields).items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(kept))
    save_file(state, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture
def adapter(tmp_path):
    """A sound adapter of rank 4 on attn.c_attn."""
    return write(tmp_path / "adapter", tensors(dict.fromkeys(every("attn.c_attn"), 4)))


def assert_merged(base, merged, state, scalings):
    """Adapted weights are W + scaling (B A)^T, all others as they were."""
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        module = name.removeprefix("transformer.").removesuffix(".weight")
        if module not in scalings or name.endswith(".bias"):
            np.testing.assert_array_equal(merged[name], weight, err_msg=name)
            continue
        prefix = f"base_model.model.transformer.{module}"
        a, b = (np.float64(state[f"{prefix}.lora_{matrix}.weight"]) for matrix in "AB")
        expected = np.float64(weight) + scalings[module] * (b @ a).T
        # Sums of few products below 1, times a factor of a few: float32 rounding.
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=5e-6, err_msg=name)


# targets, other fields, rank and scaling of each module that PEFT gives another than 4 and 6/4
SOUND = {
    "the default target": (["attn.c_attn"], {}, {}),
    **{
        f"{target} alone": ([target], {"target_modules": [target.split(".", 1)[1]]}, {})
        for target in ("attn.c_attn", "mlp.c_fc")
    },
    **{f"{target} in full": ([target], {"target_modules": [target]}, {}) for target in ALL},
    "c_proj twice": (["attn.c_proj", "mlp.c_proj"], {"target_modules": ["c_proj"]}, {}),
    "all": (ALL, {"target_modules": "all-linear"}, {}),
    "rsLoRA": (
        ALL,
        {"target_modules": ALL, "use_rslora": True},
        dict.fromkeys(every(*ALL), (4, 3.0)),
    ),
    "patterns": (
        ["attn.c_attn", "mlp.c_fc"],
        {
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"attn": 3, "c_fc": 2, r"h\.1\..*": 5},
            "alpha_pattern": {r"^transformer\.h\.0\.mlp\.c_fc": 1.5, "attn.c_attn": 10},
        },
        {
            "h.0.attn.c_attn": (4, 10 / 4),
            "h.0.mlp.c_fc": (2, 1.5 / 2),
            "h.1.attn.c_attn": (5, 10 / 5),
            "h.1.mlp.c_fc": (2, 6 / 2),
        },
    ),
    "patterns with rsLoRA": (
        ["attn.c_proj"],
        {
            "target_modules": ["attn.c_proj"],
            "use_rslora": True,
            "rank_pattern": {"h.1.attn.c_proj": 9},
        },
        {"h.0.attn.c_proj": (4, 3.0), "h.1.attn.c_proj": (9, 2.0)},
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_merged_weights_are_those_of_the_formula(tmp_path, tiny_config, tiny_params, case):
    targets, fields, special = SOUND[case]
    modules = {name: special.get(name, (4, 1.5)) for name in every(*targets)}
    state = tensors({name: rank for name, (rank, _) in modules.items()})
    directory = write(tmp_path / "adapter", state, **fields)
    lora, settings = load_adapter(directory, tiny_config)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(lora))
    merged = state_dict_from_params(merge(tiny_params, lora, settings), tiny_config)
    base = state_dict_from_params(tiny_params, tiny_config)
    scalings = {name: scaling for name, (_, scaling) in modules.items()}
    assert_merged(base, merged, state, scalings)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"target_modules": None}, every("attn.c_attn")),
        ({"target_modules": ...}, every("attn.c_attn")),
        ({"target_modules": "ALL-linear"}, every(*ALL)),
        ({"target_modules": r".*\.(c_attn|mlp\.c_fc)"}, every("attn.c_attn", "mlp.c_fc")),
        # A string is an expression for the whole name, not for its end.
        ({"target_modules": r".*h\.1\.attn\.c_.*"}, every(*ALL[:2], blocks=[1])),
        ({"target_modules": ["transformer.h.0.mlp.c_fc"]}, ["h.0.mlp.c_fc"]),
        ({"target_modules": ["1.mlp.c_fc", "c_attn"]}, [*every("attn.c_attn"), "h.1.mlp.c_fc"]),
        ({"layers_to_transform": 1}, ["h.1.attn.c_attn"]),
        ({"layers_to_transform": [1], "layers_pattern": "h"}, ["h.1.attn.c_attn"]),
        ({"layers_to_transform": []}, every("attn.c_attn")),
        (
            {
                "target_modules": ["c_fc", "transformer.h.0.attn.c_proj"],
                "layers_to_transform": [1],
            },
            ["h.0.attn.c_proj", "h.1.mlp.c_fc"],
        ),
        (
            {"target_modules": ["c_proj"], "exclude_modules": ["h.0.attn.c_proj"]},
            ["h.0.mlp.c_proj", *every("attn.c_proj", "mlp.c_proj", blocks=[1])],
        ),
        (
            {"target_modules": ["c_proj"], "exclude_modules": r".*attn.*"},
            every("mlp.c_proj"),
        ),
    ],
    ids=str,
)
def test_names_mean_the_layers_they_mean_to_peft(tmp_path, tiny_config, fields, layers):
    directory = write(tmp_path / "adapter", tensors(dict.fromkeys(layers, 4)), **fields)
    _, settings = load_adapter(directory, tiny_config)
    found = adapted_layers(tiny_config, settings)
    assert [name.replace("h_", "h.") for name in found] == sorted(layers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", init) for init in (False, None, "gaussian", "orthogonal", "mica")),
        ("fan_in_fan_out", False),
        ("task_type", None),
        ("auto_mapping", {"base_model_class": "GPT2LMHeadModel"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("rank_pattern", None),
        ("a_field_of_the_future", False),
        ("use_dora", ...),
        ("lora_bias", ...),
    ],
)
def test_what_changes_no_result_is_accepted(tmp_path, adapter, tiny_config, field, value):
    state = load_file(adapter / "adapter_model.safetensors")
    other = write(tmp_path / "other", state, **{field: value})
    (plain, plain_settings), (lora, settings) = (
        load_adapter(directory, tiny_config) for directory in (adapter, other)
    )
    assert settings == plain_settings
    jax.tree.map(np.testing.assert_array_equal, lora, plain)


@pytest.mark.parametrize(("field", "dropout"), [(0.5, 0.5), (0, 0.0), (..., 0.0)], ids=str)
def test_dropout_is_read(tmp_path, tiny_config, field, dropout):
    state = tensors(dict.fromkeys(every("attn.c_attn"), 4))
    _, settings = load_adapter(write(tmp_path / "adapter", state, lora_dropout=field), tiny_config)
    assert settings.dropout == dropout


@pytest.mark.parametrize(
    ("modules", "fields", "expected"),
    [
        (every("attn.c_attn"), {}, LoraSettings(rank=4, alpha=6.0, dropout=0.05)),
        (
            every(*ALL),
            {"rank_pattern": {"c_fc": 4}, "alpha_pattern": {r"h\.0\.mlp\..*": 2, "attn.c_proj": 3}},
            LoraSettings(
                targets=tuple(ALL),
                rank=4,
                alpha=6.0,
                alpha_pattern=(
                    ("attn.c_proj", 3.0),
                    ("h_0.mlp.c_fc", 2.0),
                    ("h_0.mlp.c_proj", 2.0),
                ),
                dropout=0.05,
            ),
        ),
        (
            [*every("attn.c_attn"), "h.1.mlp.c_fc"],
            {},
            LoraSettings(("attn.c_attn", "h_1.mlp.c_fc"), rank=4, alpha=6.0, dropout=0.05),
        ),
    ],
    ids=["one target", "patterns", "one block's layer"],
)
def test_settings_name_layers_as_briefly_as_can_be(
    tmp_path, tiny_config, modules, fields, expected
):
    state = tensors(dict.fromkeys(modules, 4))
    directory = write(tmp_path / "adapter", state, target_modules=modules, **fields)
    _, settings = load_adapter(directory, tiny_config)
    assert settings == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_every_float_becomes_float32(tmp_path, tiny_config, dtype):
    state = tensors(dict.fromkeys(every("attn.c_attn"), 4), dtype)
    lora, _ = load_adapter(write(tmp_path / "adapter", state), tiny_config)
    stored = state["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"]
    np.testing.assert_array_equal(
        lora["h_1"]["attn"]["c_attn"]["lora_a"], stored.astype(np.float32).T
    )


def test_a_source_opens_with_the_adapter_merged(tmp_path, adapter, tiny_config, tiny_params):
    base = state_dict_from_params(tiny_params, tiny_config)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(tiny_config)))
    save_file(base, tmp_path / "model.safetensors")
    params, config = load_source(str(tmp_path), lora=str(adapter))
    assert config == tiny_config
    state = load_file(adapter / "adapter_model.safetensors")
    merged = state_dict_from_params(params, config)
    assert_merged(base, merged, state, dict.fromkeys(every("attn.c_attn"), 1.5))


def test_a_bad_adapter_is_told_before_the_base_is_opened(tmp_path):
    with pytest.raises(UserError, match="nowhere is no directory"):
        load_source("no base either", lora=str(tmp_path / "nowhere"))


REFUSED_FIELDS = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [5],
    "target_parameters": ["mlp.c_fc.weight"],
    "layer_replication": [[0, 2], [1, 2]],
    "layers_pattern": "layers",
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "arrow_config": {"top_k": 3},
    "velora_config": {"scale": 1.0},
    "alora_invocation_tokens": [1, 2],
    "megatron_config": {"a": 1},
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "a_field_of_the_future": "on",
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_more_than_plain_lora_is_refused_by_name(tmp_path, tiny_config, field):
    value = REFUSED_FIELDS[field]
    state = tensors(dict.fromkeys(every("attn.c_attn"), 4))
    directory = write(tmp_path / "adapter", state, **{field: value})
    with pytest.raises(UserError, match=f"{field}={re.escape(repr(value))}, which is not supp"):
        load_adapter(directory, tiny_config)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard of"]
)
def test_initial_values_taken_from_the_base_are_refused(tmp_path, tiny_config, init):
    state = tensors(dict.fromkeys(every("attn.c_attn"), 4))
    directory = write(tmp_path / "adapter", state, init_lora_weights=init)
    with pytest.raises(UserError, match=f"init_lora_weights='{init}'.*path_initial_model"):
        load_adapter(directory, tiny_config)


WRONG_VALUES = {
    "r=0 must be a whole number": {"r": 0},
    "r=-4 must be a whole number": {"r": -4},
    "r=None must": {"r": None},
    "r='4' must": {"r": "4"},
    "lora_alpha=0 must be a finite number above 0": {"lora_alpha": 0},
    "lora_alpha=-6 must": {"lora_alpha": -6},
    "lora_alpha=nan must": {"lora_alpha": math.nan},
    "lora_alpha=inf must": {"lora_alpha": math.inf},
    "lora_alpha='6' must": {"lora_alpha": "6"},
    "lora_dropout=1.0 must be a number from 0 to less than 1": {"lora_dropout": 1.0},
    "lora_dropout=-0.1 must": {"lora_dropout": -0.1},
    "lora_dropout=nan must": {"lora_dropout": math.nan},
    "lora_dropout='0' must": {"lora_dropout": "0"},
    "lora_dropout=None must": {"lora_dropout": None},
    "use_rslora='yes' must be true or false": {"use_rslora": "yes"},
    "target_modules=3 must be": {"target_modules": 3},
    "target_modules=['c_attn', 1] must be": {"target_modules": ["c_attn", 1]},
    "target_modules has '(c_attn', no regular expression": {"target_modules": "(c_attn"},
    "exclude_modules={'a': 1} must be": {"exclude_modules": {"a": 1}},
    "layers_to_transform=1.5 must be": {"layers_to_transform": 1.5},
    "layers_to_transform=[True] must be": {"layers_to_transform": [True]},
    "layers_to_transform needs": {"layers_to_transform": 1, "target_modules": ".*c_attn"},
    "rank_pattern=[4] must map": {"rank_pattern": [4]},
    "rank_pattern 'c_fc'=0 must be": {"rank_pattern": {"c_fc": 0}},
    "rank_pattern has": {"rank_pattern": {"(?i)c_attn": 4}},
    "alpha_pattern 'c_fc'=nan must be": {"alpha_pattern": {"c_fc": math.nan}},
    "target_modules has 'q_proj', which is no linear layer of the model; it has attn.c_attn": {
        "target_modules": ["c_attn", "q_proj"]
    },
    "target_modules has 'c_fc', which is no linear layer": {"target_modules": "c_fc"},
    "target_modules has '.*q_proj', which is no": {"target_modules": ".*q_proj"},
    "target_modules has 'attn', which is no": {"target_modules": ["attn"]},
    "target_modules has 'h.2.attn.c_attn', which is no linear layer of the model; it has "
    "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj in its blocks h.0 to h.1": {
        "target_modules": ["h.2.attn.c_attn"]
    },
    "it adapts lm_head": {"target_modules": ["c_attn", "lm_head"]},
    "it adapts transformer.wte": {"target_modules": ".*"},
    "layers_to_transform has 2, but the model has layers 0 to 1": {"layers_to_transform": [0, 2]},
    "adapts no layer": {"target_modules": []},
    "adapts no layer; see its target_modules, exclude": {"exclude_modules": ["c_attn"]},
}


@pytest.mark.parametrize("message", WRONG_VALUES)
def test_a_wrong_value_is_named(tmp_path, tiny_config, message):
    state = tensors(dict.fromkeys(every("attn.c_attn"), 4))
    directory = write(tmp_path / "adapter", state, **WRONG_VALUES[message])
    with pytest.raises(UserError, match=r"adapter_config\.json") as caught:
        load_adapter(directory, tiny_config)
    assert message in str(caught.value)


PREFIX = "base_model.model.transformer.h.1.attn.c_attn.lora_"


def without(name):
    return lambda state: state.pop(f"{PREFIX}{name}.weight")


def changed(name, change):
    return lambda state: state.update({f"{PREFIX}{name}": change(state[f"{PREFIX}A.weight"])})


SPOILED = {
    r"missing \S+h.1.attn.c_attn.lora_B.weight;": without("B"),
    r"A.weight has shape \(8, 32\), not \(4, 32\)": changed(
        "A.weight", lambda a: np.repeat(a, 2, 0)
    ),
    r"A.weight has shape \(4, 16\), not \(4, 32\)": changed("A.weight", lambda a: a[:, :16].copy()),
    r"A.weight has shape \(32, 4\), not \(4, 32\)": changed("A.weight", lambda a: a.T.copy()),
    "A.weight has dtype int32, not a float": changed("A.weight", lambda a: a.astype(np.int32)),
    r"extra \S+lora_magnitude_vector": changed("magnitude_vector", lambda a: a[0].copy()),
    "A.weight holds NaN": changed("A.weight", lambda a: np.where(a == a.max(), np.nan, a)),
    "A.weight holds NaN or infinity": changed("A.weight", lambda a: a.astype(np.float64) * 1e300),
}


@pytest.mark.parametrize("problem", SPOILED)
def test_a_tensor_that_does_not_fit_is_named(adapter, tiny_config, problem):
    weights = adapter / "adapter_model.safetensors"
    state = load_file(weights)
    SPOILED[problem](state)
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, weights)
    with pytest.raises(UserError, match=problem):
        load_adapter(adapter, tiny_config)


def test_an_adapter_of_another_model_is_told_with_both_sizes(adapter):
    other = GPT2Config(vocab_size=97, n_positions=8, n_embd=48, n_layer=1, n_head=4)
    with pytest.raises(UserError) as caught:
        load_adapter(adapter, other)
    message = str(caught.value)
    assert "(r=4, blocks up to h.1, trained on 'openai-community/gpt2')" in message
    assert "does not fit the model (n_layer=1, n_embd=48)" in message
    assert "h.0.attn.c_attn.lora_A.weight has shape (4, 32), not (4, 48) (and 1 more)" in message
    assert (
        "extra base_model.model.transformer.h.1.attn.c_attn.lora_A.weight (and 1 more)" in message
    )
    assert "\n" not in message


def test_tensors_of_other_targets_than_the_configs_are_told(tmp_path, tiny_config):
    state = tensors(dict.fromkeys(every("mlp.c_fc"), 4))
    directory = write(tmp_path / "adapter", state)
    with pytest.raises(UserError, match=r"missing \S+attn.c_attn.* extra \S+mlp.c_fc"):
        load_adapter(directory, tiny_config)


def test_files_that_are_missing_or_damaged_are_told(tmp_path, adapter, tiny_config):
    def assert_told(message, directory=adapter):
        with pytest.raises(UserError, match=message):
            load_adapter(directory, tiny_config)

    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    assert_told("nowhere is no directory", tmp_path / "nowhere")
    assert_told("safetensors is no directory", weights)
    whole = weights.read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert_told(r"adapter_model\.safetensors are damaged")
    weights.unlink()
    assert_told(r"has no adapter_model\.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"anything")
    assert_told(r"adapter_model\.bin is a pickle, .* refused; .* save_pretrained it again")
    for text in ('{"r": 4', "", "[" * 100_000):
        config.write_text(text)
        assert_told(r"adapter_config\.json is not JSON")
    for text in ("[]", "null", '"LORA"', "{}", '{"r": 4}'):
        config.write_text(text)
        assert_told("is not a PEFT config: it has no peft_type")
    config.write_bytes(b"\xff")
    assert_told(r"adapter_config\.json is not UTF-8")
    config.unlink()
    assert_told(r"has no adapter_config\.json")
