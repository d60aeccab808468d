"""scripts/compare_outputs.py at the door: tables, JSON and a page out, mistakes in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from doors import SCRIPTS, Door
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.model import Params, param_shapes

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, adapters for them, and text."""
    place = tmp_path_factory.mktemp("place")
    small = GPT2Config(n_positions=24, n_embd=4, n_layer=1, n_head=1)
    three = GPT2Config(
        vocab_size=3, n_positions=11, n_embd=4, n_layer=1, n_head=1, eos_token_id=None
    )
    for name, config in (("model", small), ("three", three)):
        state = state_dict_from_params(random_params(config), config)
        (place / name).mkdir()
        save_file(
            {name: np.ascontiguousarray(array) for name, array in state.items()},
            place / name / "model.safetensors",
            metadata={"format": "pt"},
        )
        (place / name / "config.json").write_text(json.dumps(config_to_json(config)))
    adapter(place / "adapter", 5.0)
    adapter(place / "nothing", 0.0)
    adapter(place / "wide", 1.0, width=8)
    (place / "held_out.txt").write_text(TEXT)
    (place / "one.txt").write_text("The")
    (place / "ids.txt").write_text("0 1 2 " * 9)
    (place / "latin.txt").write_bytes("d\u00e9j\u00e0 vu".encode("latin-1"))
    return place


def random_params(config: GPT2Config) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(config)
    )


def adapter(directory: Path, scale: float, width: int = 4) -> None:
    """Files as PEFT writes them, for a model of one block."""
    rng = np.random.default_rng(0)
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    shapes = {"lora_A": (2, width), "lora_B": (3 * width, 2)}
    directory.mkdir()
    save_file(
        {
            f"{layer}.{name}.weight": (scale * rng.normal(size=shape)).astype(np.float32)
            for name, shape in shapes.items()
        },
        directory / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
    (directory / "adapter_config.json").write_text(
        json.dumps(fields | {"fan_in_fan_out": True, "bias": "none", "task_type": "CAUSAL_LM"})
    )


@pytest.fixture
def door(capsys: pytest.CaptureFixture, place: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(place)
    return Door(capsys)


@pytest.fixture
def compare(door: Door) -> Callable[..., tuple[str, str]]:
    """Runs the script with the small model, which must work; returns stdout and stderr."""

    def run(*flags: object) -> tuple[str, str]:
        code, out, err = door("compare_outputs", "--source", "model", *flags)
        assert code == 0, err
        return out, err

    return run


@pytest.mark.slow
def test_a_base_beside_two_adapters(compare, place):
    flags = ("--lora", "nothing", "--lora", "adapter", "--text", "held_out.txt")
    flags += ("--prompt", "The quick", "--prompt", "A dog", "--max_new_tokens", 4)
    out, err = compare(*flags, "--html", "page.html")
    assert err == "wrote page.html\n"
    assert "held_out.txt: 2 windows of 24 tokens" in out
    assert "Each window starts without context" in out
    assert "adapter: largest changes" in out
    assert "prompt: A dog" in out
    page = (place / "page.html").read_text()
    assert page.count("<h2>Prompt ") == 2

    out, err = compare(*flags, "--json", "--windows", 1)
    fields = json.loads(out)
    assert err == ""
    assert fields["models"] == ["base", "nothing", "adapter"]
    base, nothing, adapted = fields["held_out"]["models"]
    assert nothing == base | {"model": "nothing"}
    assert adapted["difference"] != 0
    assert fields["held_out"]["windows"] == 1
    texts = [text["tokens"] for text in fields["texts"]]
    assert texts[0] == texts[1]
    assert texts[3] == texts[4]


def test_texts_are_those_of_generate(door, compare):
    flags = ("--prompt", "The quick", "--max_new_tokens", 5, "--seed", 4, "--num_samples", 2)
    texts = json.loads(compare("--lora", "adapter", *flags, "--json")[0])["texts"]
    for extra, model in (((), "base"), (("--lora", "adapter"), "adapter")):
        code, out, _ = door("generate", "--source", "model", *flags, *extra, "--json")
        assert code == 0
        expected = [json.loads(line) for line in out.splitlines()]
        found = [text for text in texts if text["model"] == model]
        assert [text["tokens"] for text in found] == [text["tokens"] for text in expected]
        for mine, theirs in zip(found, expected, strict=True):
            own = [losses[0 if model == "base" else 1] for losses in mine["losses"]]
            np.testing.assert_allclose(own, -np.array(theirs["logprobs"]), rtol=1e-4)


def test_a_model_of_another_vocabulary_takes_ids(door):
    flags = ("--source", "three", "--lora", "adapter", "--prompt", "0 2 1", "--max_new_tokens", 3)
    code, out, err = door("compare_outputs", *flags, "--text", "ids.txt", "--greedy")
    assert (code, err) == (0, "")
    assert "ids.txt: 2 windows of 11 tokens" in out
    line = door.refuses("compare_outputs", *flags[:4], "--text", "held_out.txt")
    assert "'The' is no token id" in line


def test_data_is_the_validation_split(door, compare):
    code, _, err = door("prepare_custom_text", "--input", "held_out.txt", "--output", "data")
    assert code == 0, err
    out, _ = compare("--lora", "adapter", "--data", "data", "--sequence_length", 2)
    assert "data, validation split: 2 windows of 2 tokens" in " ".join(out.split())


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ([], "there is nothing to compare on; give --prompt"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--lora", "nowhere"], "adapter nowhere is no directory"),
        (["--prompt", "x", "--lora", "model"], "has no adapter_config.json"),
        (["--prompt", "x", "--lora", "wide"], "does not fit the model"),
        (["--prompt", "x", "--html", "nowhere/x.html"], "cannot write nowhere/x.html"),
        (["--prompt", "x", "--html", "."], "it is a folder"),
        (["--prompt", "x", "--greedy", "--top_k", "3"], "--top_k does not go with --greedy"),
        (["--prompt", "x", "--greedy", "--num_samples", "2"], "num_samples=2 would all be"),
        (["--prompt", "x", "--top_k", "0"], "top_k=0"),
        (["--prompt", "x", "--seed=-1"], "seed=-1 must be"),
        (["--prompt", "x", "--windows", "3"], "--windows goes with --data or --text"),
        (["--prompt", "x " * 30], "more than the context of 24"),
        (["--text", "one.txt"], "has 1 token(s), and a loss needs 2"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8 text"),
        (["--text", "held_out.txt", "--data", "data"], "--text does not go with --data"),
        (["--text", "held_out.txt", "--windows", "0"], "windows=0 must be"),
        (["--text", "held_out.txt", "--sequence_length", "0"], "sequence_length=0 must be"),
        (["--text", "held_out.txt", "--sequence_length", "25"], "the model's context of 24"),
        (["--text", "one.txt", "--sequence_length", "2"], "a loss needs 2"),
        (["--data", "nowhere"], "data nowhere does not exist"),
        (["--data", "model"], "model holds no"),
    ],
)
def test_mistakes(door: Door, flags: list[str], rule: str) -> None:
    lora = [] if "--lora" in flags else ["--lora", "adapter"]
    assert rule in door.refuses("compare_outputs", "--source", "model", *lora, *flags)


def test_mistakes_are_told_before_anything_is_loaded(door, monkeypatch):
    monkeypatch.setattr("gpt2_jax.sources.load_source", None)
    assert "give --lora DIR" in door.refuses("compare_outputs", "--prompt", "x")
    for flags in (
        ["--prompt", "x", "--lora", "nowhere"],
        ["--prompt", "x", "--lora", "adapter", "--html", "nowhere/page.html"],
        ["--prompt", "x", "--lora", "adapter", "--top_p", "2"],
        ["--data", "nowhere", "--lora", "adapter"],
        ["--text", "nowhere", "--lora", "adapter"],
    ):
        door.refuses("compare_outputs", *flags)


def test_help_needs_no_jax():
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(SCRIPTS / 'compare_outputs.py')!r}, run_name='__main__')\n"
        "finally: sys.exit(1 if 'jax' in sys.modules else 0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "--lora" in process.stdout
