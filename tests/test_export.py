"""Exported models: what comes back is bit for bit what went out, and no other file is harmed."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from doors import Door
from safetensors import SafetensorError, safe_open

from gpt2_jax import tokenizer
from gpt2_jax.config import ACTIVATION_FUNCTIONS, GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop import export
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.pretrained import load_pretrained
from gpt2_jax.interop.tokenizer_files import gpt2_files, tokenizer_files
from gpt2_jax.lora import merge
from gpt2_jax.model import Params, param_shapes

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
GPT2_FILES = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


def random_params(config: GPT2Config) -> Params:
    """Any values but in the vocabulary's padding, which is zero."""
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), param_shapes(config)
    )
    for table in {"wte", "lm_head"} & params.keys():
        params[table]["embedding"][config.vocab_size :] = 0
    return params


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    with safe_open(directory / "model.safetensors", framework="numpy") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


SHAPES = [
    {},
    {"tie_word_embeddings": False},
    {"pad_vocab_size_multiple": 64},
    {"pad_vocab_size_multiple": 64, "tie_word_embeddings": False},
    {"n_inner": 40, "n_head": 1},
    {"eos_token_id": 96},
    *({"activation_function": name} for name in ACTIVATION_FUNCTIONS),
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_a_model_comes_back_bit_for_bit(
    tmp_path: Path, tiny_config: GPT2Config, changes: dict
) -> None:
    config = dataclasses.replace(tiny_config, **changes)
    params = random_params(config)
    export_model(tmp_path / "out", params, config)
    stored = read_weights(tmp_path / "out")
    assert stored["transformer.wte.weight"].shape == (97, 32)
    assert ("lm_head.weight" in stored) == (not config.tie_word_embeddings)
    assert all(name.startswith("transformer.") or name == "lm_head.weight" for name in stored)

    back, its_config = load_pretrained(tmp_path / "out")
    assert its_config == dataclasses.replace(config, pad_vocab_size_multiple=1)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert theirs.dtype == np.float32
        np.testing.assert_array_equal(ours[: len(theirs)], theirs)

    export_model(tmp_path / "again", back, its_config)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_the_files_say_what_other_tools_ask(tmp_path: Path, tiny_config: GPT2Config) -> None:
    config = dataclasses.replace(tiny_config, pad_vocab_size_multiple=64, eos_token_id=5)
    export_model(tmp_path / "out", random_params(config), config)
    assert set(contents(tmp_path / "out")) == MODEL_FILES
    with safe_open(tmp_path / "out/model.safetensors", framework="numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["architectures"] == ["GPT2LMHeadModel"]
    assert (fields["n_ctx"], fields["n_positions"], fields["vocab_size"]) == (32, 32, 97)
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (5, 5)
    assert fields["dtype"] == fields["torch_dtype"] == "float32"
    assert "pad_vocab_size_multiple" not in fields
    fields = json.loads((tmp_path / "out/generation_config.json").read_text())
    # A pipeline's own 256 new tokens would run out of this context.
    assert fields == {"bos_token_id": 5, "eos_token_id": 5, "pad_token_id": 5, "max_length": 32}


def test_a_model_without_an_end_says_so(tmp_path: Path, tiny_config: GPT2Config) -> None:
    config = dataclasses.replace(tiny_config, n_positions=1024, eos_token_id=None)
    export_model(tmp_path / "out", random_params(config), config)
    nothing = {"bos_token_id": None, "eos_token_id": None}
    for name, expected in (
        ("config.json", nothing),
        ("generation_config.json", {**nothing, "pad_token_id": None}),
    ):
        fields = json.loads((tmp_path / "out" / name).read_text())
        # Left out, a token would have transformers' default, 50256.
        assert fields.items() >= expected.items()
        assert "max_length" not in fields


def test_bfloat16_is_the_nearest_and_even_at_ties(
    tmp_path: Path, tiny_config: GPT2Config, tiny_params: Params
) -> None:
    # bfloat16 has steps of 2^-7 after 1.
    half = 2.0**-8
    odd = np.array([1 + half, 1 + 3 * half, 1 + 0.9 * half, 1 + 1.1 * half], np.float32)
    bias = np.asarray(tiny_params["ln_f"]["bias"]).copy()
    bias[:4] = odd
    params = {**tiny_params, "ln_f": {**tiny_params["ln_f"], "bias": bias}}
    export_model(tmp_path / "out", params, tiny_config, dtype="bfloat16")
    stored = read_weights(tmp_path / "out")
    assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    nearest = stored["transformer.ln_f.bias"][:4].astype(np.float32)
    np.testing.assert_array_equal(nearest, [1, 1 + 4 * half, 1, 1 + 2 * half])
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["dtype"] == fields["torch_dtype"] == "bfloat16"

    back, config = load_pretrained(tmp_path / "out")
    assert config == tiny_config
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(
            np.asarray(ours).astype(ml_dtypes.bfloat16).astype(np.float32), theirs
        ),
        params,
        back,
    )
    export_model(tmp_path / "again", back, config, dtype="bfloat16")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_gpt2s_tokenizer_is_what_openai_published() -> None:
    files = gpt2_files(model_max_length=48)
    assert set(files) == GPT2_FILES
    vocab_bpe, encoder_json = tokenizer.bpe_files()
    assert files["merges.txt"] == vocab_bpe.read_bytes()
    assert files["vocab.json"] == encoder_json.read_bytes()
    whole = json.loads(files["tokenizer.json"])
    assert whole["model"]["vocab"] == json.loads(files["vocab.json"])
    assert len(whole["model"]["merges"]) == 50_000
    assert whole["model"]["merges"][-1] == "Ġg azed"
    [end] = whole["added_tokens"]
    assert (end["id"], end["content"], end["special"]) == (50256, "<|endoftext|>", True)
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 48


@pytest.mark.parametrize(
    ("vocab_size", "names"),
    [(50256, set()), (50257, GPT2_FILES), (50304, GPT2_FILES), (50305, set()), (97, set())],
)
def test_gpt2s_tokenizer_goes_with_its_vocabulary_only(vocab_size: int, names: set[str]) -> None:
    assert set(tokenizer_files(GPT2Config(vocab_size=vocab_size))) == names


def test_a_tokenizer_of_its_own_goes_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b")
    # Half a tokenizer is none.
    assert set(tokenizer_files(GPT2Config(), tmp_path)) == GPT2_FILES
    assert tokenizer_files(GPT2Config(vocab_size=97), tmp_path) == {}
    (tmp_path / "vocab.json").write_text("its own")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "model.safetensors").touch()
    for source in (tmp_path, tmp_path / "model.safetensors"):
        for config in (GPT2Config(), GPT2Config(vocab_size=97)):
            files = tokenizer_files(config, source)
            assert files == {
                "merges.txt": b"a b",
                "tokenizer_config.json": b"{}",
                "vocab.json": b"its own",
            }


@pytest.fixture
def source(tmp_path: Path, tiny_config: GPT2Config, tiny_params: Params) -> Path:
    """A model without a tokenizer."""
    export_model(tmp_path / "source", tiny_params, tiny_config)
    return tmp_path / "source"


def test_the_script_writes_a_model_and_says_how_to_open_it(door: Door, source: Path) -> None:
    before = contents(source)
    code, out, err = door("export_hf", "--source", "source", "--output", "new/out")
    assert code == 0
    assert "wrote new/out: 29,600 parameters, float32" in out
    assert 'AutoModelForCausalLM.from_pretrained("new/out")' in out
    assert err.startswith("note: no tokenizer is written: the vocabulary of 97 is not GPT-2's")
    assert err.count("\n") == 1
    assert contents(source.parent / "new/out") == contents(source) == before
    assert [path.name for path in (source.parent / "new").iterdir()] == ["out"]

    code, _, _ = door("export_hf", "--source", "source", "--output", "half", "--dtype", "bfloat16")
    assert code == 0
    sizes = [
        (source.parent / name / "model.safetensors").stat().st_size for name in ("half", source)
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_with_gpt2s_vocabulary_the_script_writes_its_tokenizer(door: Door, tmp_path: Path) -> None:
    config = GPT2Config(n_positions=24, n_embd=4, n_layer=1, n_head=1)
    export_model(tmp_path / "plain", random_params(config), config)
    code, out, err = door("export_hf", "--source", "plain", "--output", "out")
    assert (code, err) == (0, "")
    assert 'pipeline("text-generation", model="out")' in out
    assert set(contents(tmp_path / "out")) == MODEL_FILES | GPT2_FILES
    # What the script wrote is a source of its own, tokenizer and all, under any name.
    code, _, err = door(
        "export_hf", "--weights", "out/model.safetensors", "--output", "again", "--overwrite"
    )
    assert (code, err) == (0, "")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_an_adapter_is_merged(
    door: Door, source: Path, tiny_config: GPT2Config, tiny_params: Params
) -> None:
    from safetensors.numpy import save_file

    from gpt2_jax.interop.peft import load_adapter

    rng = np.random.default_rng(0)
    matrices = {
        f"base_model.model.transformer.h.{block}.attn.c_attn.{name}.weight": rng.normal(
            size=shape
        ).astype(np.float32)
        for block in range(2)
        for name, shape in (("lora_A", (4, 32)), ("lora_B", (96, 4)))
    }
    Path("adapter").mkdir()
    save_file(matrices, "adapter/adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["c_attn"]}
    Path("adapter/adapter_config.json").write_text(json.dumps({**fields, "fan_in_fan_out": True}))
    assert door("export_hf", "--source", source, "--lora", "adapter", "--output", "out")[0] == 0
    merged = merge(tiny_params, *load_adapter(Path("adapter"), tiny_config))
    back, _ = load_pretrained(Path("out"))
    jax.tree.map(np.testing.assert_array_equal, back, merged)
    assert "give another --output" in door.refuses(
        "export_hf", "--source", source, "--lora", "adapter", "--output", "adapter", "--overwrite"
    )


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--source", "source"], "--output"),
        (["--output", "out", "--source", "nowhere"], "'nowhere' is no directory"),
        (["--output", "out", "--source", "source", "--dtype", "float16"], "bfloat16"),
        (["--output", "out", "--source", "source", "--model", "gpt2"], "--model gpt2 goes with"),
        (["--output", "a_file", "--source", "source"], "a_file is a file"),
        (["--output", "a_file/out", "--source", "source"], "a_file is a file"),
        (["--output", "source", "--source", "source"], "is where source is read from"),
        (["--output", "source", "--source", "source", "--overwrite"], "is where source is read"),
        (["--output", ".", "--source", "source", "--overwrite"], "is where source is read from"),
        (["--output", "linked", "--source", "source", "--overwrite"], "is where source is read"),
        (["--output", "source", "--weights", "source/model.safetensors", "--overwrite"], "is read"),
        (["--output", "model", "--source", "source"], "already holds a model; give another"),
        (["--output", "full", "--source", "source"], "no exported model, or not that alone: it"),
        (["--output", "full", "--source", "source", "--overwrite"], "it holds notes.txt;"),
        (["--output", "run", "--source", "source", "--overwrite"], "it holds config.json;"),
        (["--output", "nested", "--source", "source", "--overwrite"], "it holds vocab.json;"),
    ],
    ids=str,
)
def test_the_script_refuses(
    door: Door,
    source: Path,
    tiny_params: Params,
    tiny_config: GPT2Config,
    flags: list[str],
    rule: str,
) -> None:
    here = source.parent
    (here / "a_file").touch()
    (here / "linked").symlink_to("source")
    for name in ("model", "full", "nested"):
        export_model(here / name, tiny_params, tiny_config)
    (here / "full/notes.txt").write_text("precious")
    (here / "nested/vocab.json").mkdir()
    (here / "run").mkdir()
    (here / "run/config.json").write_text('{"model": {}, "run_dir": "run"}')

    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    before = everything()
    assert rule in door.refuses("export_hf", *flags)
    assert everything() == before
    assert not (here / "out").exists()


def test_an_exported_model_is_replaced_whole(
    door: Door, source: Path, tiny_params: Params, tiny_config: GPT2Config
) -> None:
    old = {"vocab.json": b"of another model", "merges.txt": b"too"}
    export_model(source.parent / "out", tiny_params, tiny_config, tokenizer=old)
    (source.parent / "link").symlink_to("out")
    assert door("export_hf", "--source", source, "--output", "link", "--overwrite")[0] == 0
    assert contents(source.parent / "out") == contents(source)
    assert (source.parent / "link").is_symlink()
    # An empty directory is no one's.
    (source.parent / "empty").mkdir()
    assert door("export_hf", "--source", source, "--output", "empty")[0] == 0
    assert contents(source.parent / "empty") == contents(source)


FAULTS = {
    "no room": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no room for safetensors": SafetensorError("Error while serializing: I/O error: no space"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_is_told_and_leaves_what_was_there(
    door: Door, source: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    here = source.parent
    assert door("export_hf", "--source", source, "--output", "old")[0] == 0

    def fail(_state: object, file: Path, **_options: object) -> None:
        file.write_bytes(b"half of")
        raise FAULTS[fault]

    monkeypatch.setattr(export, "save_file", fail)
    before = contents(here / "old")
    for output in ("old", "new/deep/out"):
        line = door.refuses("export_hf", "--source", source, "--output", output, "--overwrite")
        assert f"cannot write {output}: " in line
        assert "make room" in line
    assert contents(here / "old") == before
    assert {path.name for path in here.iterdir()} == {"source", "old"}


@pytest.mark.parametrize("renaming", [0, 1])
def test_an_interrupt_leaves_the_old_model(
    tmp_path: Path,
    tiny_config: GPT2Config,
    tiny_params: Params,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    renaming: int,
) -> None:
    replace, directories = os.replace, []

    def replace_or_stop(old: Path, new: Path, **options: object) -> None:
        if Path(old).is_dir():
            directories.append(old)
            if len(directories) == renaming + 1:
                raise KeyboardInterrupt
        replace(old, new, **options)

    before = contents(source)
    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(KeyboardInterrupt):
        export_model(source, tiny_params, tiny_config, dtype="bfloat16", overwrite=True)
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_function_overwrites_only_when_asked_to(
    source: Path, tiny_config: GPT2Config, tiny_params: Params
) -> None:
    with pytest.raises(UserError, match="already holds a model"):
        export_model(source, tiny_params, tiny_config)
