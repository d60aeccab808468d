"""Exported models: what comes back is bit for bit what went out, and an interrupt harms nothing."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from gpt2_jax import tokenizer
from gpt2_jax.config import ACTIVATION_FUNCTIONS, GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.pretrained import load_pretrained
from gpt2_jax.interop.tokenizer_files import gpt2_files, tokenizer_files
from gpt2_jax.model import Params, param_shapes

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
GPT2_FILES = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}


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
    assert set(tokenizer_files(GPT2Config(vocab_size=vocab_size))[0]) == names


def test_a_tokenizer_of_its_own_goes_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b")
    # Half a tokenizer is none.
    assert set(tokenizer_files(GPT2Config(), tmp_path)[0]) == GPT2_FILES
    assert tokenizer_files(GPT2Config(vocab_size=97), tmp_path)[0] == {}
    (tmp_path / "vocab.json").write_text('{"its": 0, "own": 96}')
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "model.safetensors").touch()
    for source in (tmp_path, tmp_path / "model.safetensors"):
        for config in (GPT2Config(), GPT2Config(vocab_size=97)):
            files, why_none = tokenizer_files(config, source)
            assert why_none == ""
            assert files == {
                "merges.txt": b"a b",
                "tokenizer_config.json": b"{}",
                "vocab.json": b'{"its": 0, "own": 96}',
            }


LARGEST_IS_97 = {
    "vocab": {"vocab.json": '{"a": 97, "b": 0}', "merges.txt": ""},
    "added": {"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"<pad>": 97}'},
    "decoder": {
        "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
        "tokenizer_config.json": '{"added_tokens_decoder": {"97": {}}}',
    },
    "one file": {"tokenizer.json": '{"model": {"vocab": {"a": 97}}, "added_tokens": null}'},
    "its added": {"tokenizer.json": '{"model": {"vocab": {}}, "added_tokens": [{"id": 97}]}'},
    "unigram": {"tokenizer.json": json.dumps({"model": {"vocab": [["a", -1.5]] * 98}})},
    "words": {"vocab.txt": "word\n" * 98},
}


@pytest.mark.parametrize("files", LARGEST_IS_97.values(), ids=LARGEST_IS_97)
def test_a_tokenizer_beyond_the_vocabulary_does_not_go_along(
    tmp_path: Path, files: dict[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert set(tokenizer_files(GPT2Config(vocab_size=98), tmp_path)[0]) == set(files)
    none, why_none = tokenizer_files(GPT2Config(vocab_size=97), tmp_path)
    assert none == {}
    assert why_none == f"that of {tmp_path} has ids up to 97, and the model's vocabulary ends at 96"


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    for damage in ("{", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "b"}}}'):
        (tmp_path / "tokenizer.json").write_text(damage)
        with pytest.raises(UserError, match="json beside the source is no tokenizer's"):
            tokenizer_files(GPT2Config(), tmp_path)


@pytest.mark.parametrize("renaming", [0, 1])
def test_an_interrupt_leaves_the_old_model(
    tmp_path: Path,
    tiny_config: GPT2Config,
    tiny_params: Params,
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

    source = tmp_path / "source"
    export_model(source, tiny_params, tiny_config)
    before = contents(source)
    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(KeyboardInterrupt):
        export_model(source, tiny_params, tiny_config, dtype="bfloat16", overwrite=True)
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_function_overwrites_only_when_asked_to(
    tmp_path: Path, tiny_config: GPT2Config, tiny_params: Params
) -> None:
    export_model(tmp_path / "source", tiny_params, tiny_config)
    with pytest.raises(UserError, match="already holds a model"):
        export_model(tmp_path / "source", tiny_params, tiny_config)
