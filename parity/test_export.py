"""Exported models as others open them: transformers, and llama.cpp through its own converter."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.decode import generate
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.model_directory import own_fields
from gpt2_jax.interop.tokenizer_files import gpt2_files, tokenizer_files
from gpt2_jax.lora import lora_shapes, merge
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.sources import load_source
from parity.checks import check_logits, check_state_dict, compare_tokens
from parity.models import Models, random_models, random_tokens
from parity.outcomes import Prove

ODD_TEXTS = [
    "",
    " ",
    "Hello, my name is",
    "  two  spaces\n\n\nand lines \r\n\ttabs\t ",
    "it's we'll they'D 'S don't'd",
    "naïve café, Straße, Ελλάδα, Привет, 你好世界, नमस्ते, שלום, 한국어",
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 \u200b \u00a0 \ufeff \x00 \x1c \x85 \u2028",
    "1234567890 ½ Ⅷ ٣٤ x² def f(x):\n    return x**2",
    "<|endoftext|>",
    "one<|endoftext|> two <|endoftext|><|endoftext|>\n<|endoftext |>",
    "".join(map(chr, range(1, 0x500))),
]


@pytest.fixture(scope="module")
def speaking() -> Models:
    """Random weights with GPT-2's vocabulary, whose texts do not repeat one token."""
    config = GPT2Config(
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return random_models(config, seed=3)


@pytest.fixture(scope="module")
def spoken(speaking: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, exported with its tokenizer."""
    directory = tmp_path_factory.mktemp("exported") / "model"
    files, _ = tokenizer_files(speaking.config)
    export_model(directory, speaking.params, speaking.config, files=files)
    return directory


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What transformers warns of; Python's warnings are errors anyway."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, verbosity = Listener(), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.add_handler(listener)
    yield said
    transformers.logging.remove_handler(listener)
    transformers.logging.set_verbosity(verbosity)


VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"pad_vocab_size_multiple": 64},
    {"n_inner": 80, "n_head": 1, "activation_function": "relu"},
    {"activation_function": "gelu", "eos_token_id": None, "layer_norm_epsilon": 1e-3},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_transformers_opens_the_model_and_agrees(
    small: Models, tmp_path: Path, prove: Prove, complaints: list[str], changes: dict
) -> None:
    config = dataclasses.replace(small.config, **changes)
    ours = random_models(config, seed=2)
    export_model(tmp_path / "out", ours.params, config)
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    theirs, loading = opened
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    for limits in (theirs.config, theirs.generation_config):
        assert (limits.bos_token_id, limits.eos_token_id) == (config.eos_token_id,) * 2
    assert theirs.config.vocab_size == 211
    both = dataclasses.replace(ours, huggingface=theirs.eval())
    prove(check_state_dict(both), *check_logits(both, random_tokens(config, (2, 48))))
    assert complaints == []


def test_bfloat16_opens_as_bfloat16(small: Models, tmp_path: Path) -> None:
    export_model(tmp_path / "out", small.params, small.config, dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    # PyTorch's own rounding of the same weights.
    for name, weight in small.huggingface.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight.bfloat16()), name


def test_a_merged_adapter_is_in_the_logits(small: Models, tmp_path: Path, prove: Prove) -> None:
    settings = LoraSettings(targets=("attn.c_attn", "mlp.c_proj"), rank=4, alpha=6.0)
    rng = np.random.default_rng(4)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
        lora_shapes(small.config, settings),
    )
    params = merge(small.params, lora, settings)
    export_model(tmp_path / "out", params, small.config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    reference = type(small.reference)(small.config)
    reference.load_state_dict(theirs.state_dict(), strict=True)
    merged = dataclasses.replace(
        small, huggingface=theirs, reference=reference.eval(), params=params
    )
    tokens_BT = random_tokens(small.config, (2, 48))
    prove(*check_logits(merged, tokens_BT))
    with torch.no_grad():
        plain = small.huggingface(torch.from_numpy(tokens_BT)).logits
        assert (theirs(torch.from_numpy(tokens_BT)).logits - plain).abs().max() > 1


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saved_goes_out_as_it_came(
    small: Models, tmp_path: Path, tied: bool
) -> None:
    config = dataclasses.replace(small.config, tie_word_embeddings=tied)
    model = random_models(config, seed=4).huggingface
    for limits in (model.config, model.generation_config):
        limits.bos_token_id, limits.pad_token_id = 5, 7
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "theirs")
    params, config = load_source(str(tmp_path / "theirs"))
    own, files = own_fields(tmp_path / "theirs")
    export_model(tmp_path / "ours", params, config, fields=own, files=files)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    fields = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")
    ]
    both = fields[0].keys() & fields[1].keys()
    assert {key: fields[1][key] for key in both} == {key: fields[0][key] for key in both}
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for its_limits in (opened.config, opened.generation_config):
        assert (its_limits.bos_token_id, its_limits.pad_token_id) == (5, 7)
    assert opened.generation_config.repetition_penalty == 1.5


def test_the_tokenizer_gives_the_same_ids(spoken: Path, complaints: list[str]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(spoken)
    assert theirs.is_fast
    assert len(theirs) == 50257
    assert theirs.model_max_length == 64
    assert theirs.bos_token_id == theirs.eos_token_id == 50256
    assert complaints == []
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text, allow_end_of_text=True).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text


def test_the_slower_files_hold_the_same_tokenizer(tmp_path: Path) -> None:
    files = gpt2_files(model_max_length=64)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(files[name])
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in ODD_TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, allow_end_of_text=True).tolist()


def test_a_pipeline_continues_text(
    speaking: Models, spoken: Path, prove: Prove, complaints: list[str]
) -> None:
    pipe: Any = transformers.pipeline("text-generation", model=str(spoken), device="cpu")
    prompt = tokenizer.encode("Hello, my name is").tolist()
    [ours] = generate(speaking.params, speaking.config, [prompt], max_new_tokens=59)
    # To the end of the context, where the pipeline's own 256 new tokens would go beyond.
    [text] = pipe("Hello, my name is", do_sample=False, return_tensors=True)
    theirs = text["generated_token_ids"][len(prompt) :]
    assert complaints == []
    prove(compare_tokens("greedy tokens, exported to a pipeline", ours, theirs))
    assert len(ours) == 59
    # The listener does hear: two limits are one too many.
    pipe("Hello, my name is", do_sample=False, max_new_tokens=1)
    assert "Both `max_new_tokens` (=1) and `max_length`(=64)" in complaints[0]


def test_llama_cpp_continues_text(speaking: Models, spoken: Path, prove: Prove) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not name a folder with llama.cpp's convert_hf_to_gguf.py")
    converter = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    file = spoken.parent / "model.gguf"
    command = [sys.executable, str(converter), str(spoken), "--outfile", str(file)]
    subprocess.run([*command, "--outtype", "f32"], check=True, capture_output=True)
    kind = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(file), n_ctx=0, type_k=kind, type_v=kind, verbose=False)
    for text in ODD_TEXTS[1:-1]:
        ids = tokenizer.encode(text, allow_end_of_text=True).tolist()
        if "\0" not in text:
            assert model.tokenize(text.encode(), add_bos=False, special=True) == ids, text
    prompt = tokenizer.encode("Hello, my name is").tolist()
    [ours] = generate(speaking.params, speaking.config, [prompt], max_new_tokens=59)
    theirs: list[int] = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == len(ours):
            break
    model.close()
    prove(compare_tokens("greedy tokens, exported to llama.cpp", ours, theirs))
