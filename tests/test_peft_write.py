"""Adapters written for PEFT: what comes back is what went out, and nothing else is harmed."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop.peft import load_adapter, save_adapter
from gpt2_jax.lora import Lora, lora_shapes
from gpt2_jax.lora_settings import TARGETS, LoraSettings, adapted_layers

FILES = {"adapter_config.json", "adapter_model.safetensors"}
SUBSETS = [
    targets
    for count in range(1, len(TARGETS) + 1)
    for targets in itertools.combinations(TARGETS, count)
]


def random_lora(config: GPT2Config, settings: LoraSettings, seed: int = 5) -> Lora:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        lora_shapes(config, settings),
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def assert_same(ours: Lora, theirs: Lora) -> None:
    """Bit for bit, float32."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


# Named as `load_adapter` names layers, so that the settings come back equal.
BRIEF = {
    "defaults": LoraSettings(),
    **{", ".join(targets): LoraSettings(targets, rank=3, alpha=5.0) for targets in SUBSETS},
    "one block's layer": LoraSettings(("attn.c_attn", "h_1.mlp.c_fc"), rank=2, alpha=0.3),
    "rs_lora, dropout": LoraSettings(rank=3, alpha=1e-3, rs_lora=True, dropout=0.1),
    "patterns": LoraSettings(
        targets=TARGETS,
        rank=3,
        alpha=5.0,
        rank_pattern=(("attn.c_proj", 2), ("h_1.mlp.c_fc", 70)),
        alpha_pattern=(("h_0.attn.c_proj", 0.5), ("mlp.c_proj", 1e30)),
    ),
}


@pytest.mark.parametrize("case", BRIEF)
def test_an_adapter_comes_back_bit_for_bit(
    tmp_path: Path, tiny_config: GPT2Config, case: str
) -> None:
    settings = BRIEF[case]
    lora = random_lora(tiny_config, settings)
    save_adapter(tmp_path / "out", lora, settings, tiny_config)
    back, its_settings = load_adapter(tmp_path / "out", tiny_config)
    assert its_settings == settings
    assert_same(lora, back)
    save_adapter(tmp_path / "again", back, its_settings, tiny_config)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(("c_proj", "h_0.attn.c_attn", "h_1.attn.c_attn"), rank=2),
        LoraSettings(("mlp.c_fc", "mlp.c_fc", "attn.c_attn"), rank=2),
        LoraSettings(
            ("c_proj", "mlp.c_fc"),
            rank=3,
            alpha=5.0,
            rs_lora=True,
            rank_pattern=(("h_1.attn.c_proj", 6), ("c_proj", 2), ("h_1.attn.c_proj", 4)),
            alpha_pattern=(("mlp.c_fc", 0.5), ("h_1.mlp.c_fc", 9.0)),
        ),
    ],
    ids=["names of two targets", "names twice", "patterns that overlap"],
)
def test_other_names_come_back_meaning_the_same(
    tmp_path: Path, tiny_config: GPT2Config, settings: LoraSettings
) -> None:
    lora = random_lora(tiny_config, settings)
    save_adapter(tmp_path / "out", lora, settings, tiny_config)
    back, its_settings = load_adapter(tmp_path / "out", tiny_config)
    layers = adapted_layers(tiny_config, settings)
    assert adapted_layers(tiny_config, its_settings) == layers
    for layer in layers:
        assert its_settings.rank_of(layer) == settings.rank_of(layer)
        assert its_settings.scaling(layer) == settings.scaling(layer)
    assert_same(lora, back)


def test_pattern_keys_fit_one_block_of_many(tmp_path: Path) -> None:
    """h.1 is not h.11: PEFT takes the keys as regular expressions."""
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=12, n_head=1)
    settings = LoraSettings(
        rank=1,
        rank_pattern=(("h_1.attn.c_attn", 2), ("h_11.attn.c_attn", 3)),
        alpha_pattern=(("h_1.attn.c_attn", 2.5),),
    )
    save_adapter(tmp_path / "out", random_lora(config, settings), settings, config)
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["rank_pattern"] == {
        r"transformer\.h\.1\.attn\.c_attn": 2,
        r"transformer\.h\.11\.attn\.c_attn": 3,
    }
    assert fields["alpha_pattern"] == {r"transformer\.h\.1\.attn\.c_attn": 2.5}
    assert load_adapter(tmp_path / "out", config)[1] == settings


def test_everyone_may_read_the_files(tmp_path, tiny_config):
    lora = random_lora(tiny_config, LoraSettings())
    save_adapter(tmp_path / "out", lora, LoraSettings(), tiny_config)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_the_files_say_what_peft_asks(tmp_path: Path, tiny_config: GPT2Config) -> None:
    settings = LoraSettings(("c_proj",), rank=3, alpha=16.0, rs_lora=True, dropout=0.1)
    base = "openai-community/gpt2"
    save_adapter(tmp_path / "out", random_lora(tiny_config, settings), settings, tiny_config)
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 16,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "target_modules": ["attn.c_proj", "mlp.c_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": True,
    }
    assert type(fields["lora_alpha"]) is int
    with safe_open(tmp_path / "out/adapter_model.safetensors", framework="numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        shapes = {name: tensors.get_tensor(name).shape for name in tensors.keys()}  # noqa: SIM118
    prefix = "base_model.model.transformer.h"
    assert shapes == {
        f"{prefix}.{block}.{layer}.lora_{matrix}.weight": shape
        for block in (0, 1)
        for layer, width in (("attn.c_proj", 32), ("mlp.c_proj", 128))
        for matrix, shape in (("A", (3, width)), ("B", (32, 3)))
    }
    save_adapter(
        tmp_path / "based", random_lora(tiny_config, settings), settings, tiny_config, base=base
    )
    fields = json.loads((tmp_path / "based/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == base


def test_arrays_of_numpy_and_bfloat16_are_stored_as_float32(
    tmp_path: Path, tiny_config: GPT2Config
) -> None:
    lora = random_lora(tiny_config, LoraSettings())
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lora)
    for name, given in {"numpy": jax.tree.map(np.asarray, lora), "bfloat16": halves}.items():
        save_adapter(tmp_path / name, given, LoraSettings(), tiny_config)
        back, _ = load_adapter(tmp_path / name, tiny_config)
        assert_same(jax.tree.map(lambda leaf: leaf.astype(np.float32), given), back)


UNFIT = {
    "rank": (
        LoraSettings(rank=4),
        {},
        r"settings \(rank=4, .*h_0.attn.c_attn.lora_a has shape \(32, 8\), not \(32, 4\)",
    ),
    "targets": (
        LoraSettings(("mlp.c_fc",)),
        {},
        r"targets=\('mlp.c_fc',\).*missing h_0.mlp.c_fc.lora_a .*extra h_0.attn.c_attn.lora_a",
    ),
    "unknown target": (LoraSettings(("q_proj",)), {}, "'q_proj' is no linear layer of the model"),
    "width": (
        LoraSettings(),
        {"n_embd": 48},
        r"n_embd=48\).*has shape \(32, 8\), not \(48, 8\)",
    ),
    "blocks": (LoraSettings(), {"n_layer": 1}, r"\(n_layer=1.*extra h_1.attn.c_attn.lora_a"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_does_not_fit_is_not_written(
    tmp_path: Path, tiny_config: GPT2Config, case: str
) -> None:
    settings, changes, message = UNFIT[case]
    lora = random_lora(tiny_config, LoraSettings())
    with pytest.raises(UserError, match=message):
        save_adapter(tmp_path / "out", lora, settings, dataclasses.replace(tiny_config, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_written(
    tmp_path: Path, tiny_config: GPT2Config, value: float
) -> None:
    lora = random_lora(tiny_config, LoraSettings())
    save_adapter(tmp_path / "out", lora, LoraSettings(), tiny_config)
    before = contents(tmp_path / "out")
    layer = lora["h_1"]["attn"]["c_attn"]
    layer["lora_b"] = layer["lora_b"].at[3, 5].set(value)
    with pytest.raises(UserError, match=r"h_1\.attn\.c_attn\.lora_b holds NaN or infinity"):
        save_adapter(tmp_path / "out", lora, LoraSettings(), tiny_config, overwrite=True)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_is_replaced_only_when_asked_to(tmp_path: Path, tiny_config: GPT2Config) -> None:
    out = tmp_path / "on" / "the" / "way" / "out"
    first, second = (random_lora(tiny_config, LoraSettings(), seed) for seed in (1, 2))
    save_adapter(out, first, LoraSettings(), tiny_config)
    with pytest.raises(UserError, match=r"already holds an adapter; .* overwrite"):
        save_adapter(out, second, LoraSettings(), tiny_config)
    assert_same(first, load_adapter(out, tiny_config)[0])
    save_adapter(out, second, LoraSettings(), tiny_config, overwrite=True)
    assert_same(second, load_adapter(out, tiny_config)[0])
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_directory_is_filled(tmp_path: Path, tiny_config: GPT2Config) -> None:
    save_adapter(tmp_path, random_lora(tiny_config, LoraSettings()), LoraSettings(), tiny_config)
    assert {path.name for path in tmp_path.iterdir()} == FILES


FOREIGN = {
    "thesis.tex": {"thesis.tex": "years of work"},
    "README.md": {"adapter_config.json": '{"peft_type": "LORA"}', "README.md": "a model card"},
    "config.json": {"config.json": '{"model_type": "gpt2"}', "adapter_config.json": "{}"},
    "adapter_config.json": {"adapter_config.json": '{"of": "something else"}'},
    "adapter_model.safetensors": {"adapter_model.safetensors": "alone"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_directory_is_never_replaced(
    tmp_path: Path, tiny_config: GPT2Config, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file, text in FOREIGN[name].items():
        (out / file).write_text(text)
    before = contents(out)
    lora = random_lora(tiny_config, LoraSettings())
    with pytest.raises(UserError, match=f"is no adapter, or not that alone: it holds {name}"):
        save_adapter(out, lora, LoraSettings(), tiny_config, overwrite=True)
    assert contents(out) == before


def test_a_folder_under_a_files_name_is_never_replaced(
    tmp_path: Path, tiny_config: GPT2Config
) -> None:
    lora = random_lora(tiny_config, LoraSettings())
    save_adapter(tmp_path / "out", lora, LoraSettings(), tiny_config)
    (tmp_path / "out/adapter_model.safetensors").unlink()
    (tmp_path / "out/adapter_model.safetensors").mkdir()
    with pytest.raises(UserError, match="it holds adapter_model"):
        save_adapter(tmp_path / "out", lora, LoraSettings(), tiny_config, overwrite=True)


def test_a_place_that_is_none_is_told(tmp_path: Path, tiny_config: GPT2Config) -> None:
    lora = random_lora(tiny_config, LoraSettings())
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.write_text("kept")
    loop.symlink_to(loop)
    for place in (file, file / "below", loop, tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"cannot write adapter .*; give another directory"):
            save_adapter(place, lora, LoraSettings(), tiny_config, overwrite=True)
    assert file.read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("stopped_at", range(3))
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path,
    tiny_config: GPT2Config,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    stopped_at: int,
) -> None:
    """The config is renamed, then the old directory, then the new one."""
    lora = random_lora(tiny_config, LoraSettings())
    save_adapter(tmp_path / "out", lora, LoraSettings(), tiny_config)
    before = contents(tmp_path / "out")
    replace, calls = os.replace, []

    def replace_or_stop(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == stopped_at + 1:
            raise error
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    other = random_lora(tiny_config, LoraSettings(), seed=6)
    with pytest.raises(expected):
        save_adapter(tmp_path / "out", other, LoraSettings(), tiny_config, overwrite=True)
    assert len(calls) > stopped_at
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_size_is_that_of_the_two_matrices_alone(tmp_path: Path) -> None:
    settings = LoraSettings()
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), lora_shapes(SIZES["gpt2"], settings)
    )
    save_adapter(tmp_path / "out", zeros, settings, SIZES["gpt2"])
    matrices = 4 * 12 * 8 * (768 + 2304)
    size = (tmp_path / "out/adapter_model.safetensors").stat().st_size
    assert matrices < size < matrices + 5_000
