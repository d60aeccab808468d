"""The script that exports models: what goes along, and no other file is harmed."""

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from doors import Door
from safetensors import SafetensorError

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop import export
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.pretrained import load_pretrained
from gpt2_jax.lora import merge
from gpt2_jax.model import Params, init_params

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
GPT2_FILES = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


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
    export_model(tmp_path / "plain", init_params(config, jax.random.key(0)), config)
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


def rewrite(file: Path, **changes: object) -> None:
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"bos_token_id": 5, "pad_token_id": 7}, (5, 7)),
        ({"bos_token_id": None, "pad_token_id": None}, (None, None)),
        ({"bos_token_id": "absent"}, (50256, "absent")),  # what transformers makes of it
    ],
    ids=str,
)
def test_special_tokens_and_generation_settings_go_along(
    door: Door, source: Path, special: dict, expected: tuple
) -> None:
    rewrite(source / "config.json", eos_token_id=3, **special)
    settings = b'{"top_k": 5, "eos_token_id": [3, 4]}'
    (source / "generation_config.json").write_bytes(settings)
    for number, flags in enumerate(
        (["--source", "source"], ["--weights", "source/model.safetensors"])
    ):
        assert door("export_hf", *flags, "--output", f"out{number}")[0] == 0
        written = contents(source.parent / f"out{number}")
        fields = json.loads(written["config.json"])
        tokens = fields["bos_token_id"], fields.get("pad_token_id", "absent")
        assert (*tokens, fields["eos_token_id"]) == (*expected, 3)
        assert written["generation_config.json"] == settings

    # Without its own settings, generation has the same tokens.
    (source / "generation_config.json").unlink()
    assert door("export_hf", "--source", "source", "--output", "plain")[0] == 0
    fields = json.loads((source.parent / "plain/generation_config.json").read_text())
    pad = expected[1] if isinstance(expected[1], int) else 3
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (expected[0], 3)
    assert fields["pad_token_id"] == pad


def test_a_tokenizer_too_large_for_the_model_is_told_and_left_out(door: Door, source: Path) -> None:
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 50256}}}')
    code, out, err = door("export_hf", "--source", "source", "--output", "out")
    assert (code, "pipeline" in out) == (0, False)
    assert err == (
        "note: no tokenizer is written: that of source has ids up to 50256, and the model's "
        "vocabulary ends at 96; the model takes and gives token ids\n"
    )
    assert set(contents(source.parent / "out")) == MODEL_FILES


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--source", "source"], "--output"),
        (["--output", "out", "--source", "nowhere"], "'nowhere' is no directory"),
        (["--output", "out", "--source", "source", "--dtype", "float16"], "bfloat16"),
        (["--output", "out", "--source", "source", "--model", "gpt2"], "--model gpt2 goes with"),
        (["--output", "a_file", "--source", "source"], "a_file is a file"),
        (["--output", "loop", "--source", "source"], "loop: Too many levels of symbolic links;"),
        (["--output", "loop/out", "--source", "source"], "Too many levels of symbolic links; give"),
        (["--output", "out", "--source", "loop"], "loop: Too many levels of symbolic links; give"),
        (["--output", "x" * 300, "--source", "source"], "xxx: File name too long; give another"),
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
    (here / "loop").symlink_to("loop")
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
    export_model(source.parent / "out", tiny_params, tiny_config, files=old)
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
