"""scripts/eval_hellaswag.py at the door: one model's scores, printed and written."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from doors import Door
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.hellaswag import HellaSwagScore, make_hellaswag, read_items
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.peft import load_adapter
from gpt2_jax.lora import merge
from gpt2_jax.model import GPT2, Params, init_params

CONFIG = GPT2Config(n_positions=128, n_embd=16, n_layer=1, n_head=2)
ITEMS = 30


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    write_items(tmp_path / "items.jsonl")
    return Door(capsys)


def write_items(file: Path) -> None:
    """Random words, the endings of 1 to 6, so that acc and acc_norm need not agree."""
    rng = np.random.default_rng(0)
    vocabulary = ["dog", "cat", "barks", "reads", "the", "a", "very", "good", "book", "far"]

    def words(count: int) -> str:
        return " ".join(rng.choice(vocabulary, count))

    lines = [
        {
            "ctx": words(5),
            "endings": [words(count) for count in rng.integers(1, 7, 4)],
            "label": number % 4,
        }
        for number in range(ITEMS)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def params() -> Params:
    """Large enough that the endings' losses are far apart, in bfloat16 too."""
    initial = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim == 2 else leaf, initial)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    directory = tmp_path_factory.mktemp("hellaswag") / "model"
    export_model(directory, params, CONFIG)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter that changes every loss much."""
    directory = tmp_path_factory.mktemp("adapter")
    rng = np.random.default_rng(0)
    name = "base_model.model.transformer.h.0.mlp.c_proj.lora_{}.weight"
    shapes = {"A": (2, 64), "B": (16, 2)}
    save_file(
        {name.format(m): rng.normal(0, 2, shape).astype(np.float32) for m, shape in shapes.items()},
        directory / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["mlp.c_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def direct_score(
    params: Params, items: Path, limit: int | None = None, dtype: str = "float32"
) -> HellaSwagScore:
    """On one device, in batches of another size."""
    return make_hellaswag(GPT2(CONFIG, dtype=dtype), read_items(items, limit), 4)(params)


def test_the_scores_are_printed_and_written(door, model_dir, params, tmp_path):
    flags = ("--source", model_dir, "--data", "items.jsonl", "--output", "results.json")
    code, out, err = door("eval_hellaswag", *flags, "--batch_size", 16, "--limit", 25)
    assert code == 0
    expected = direct_score(params, tmp_path / "items.jsonl", 25)
    assert re.fullmatch(
        rf"""HellaSwag, protocol of build-nanogpt
source    {re.escape(str(model_dir))}
acc       {expected.acc:.4f} \+- {expected.acc_stderr:.4f}
acc_norm  {expected.acc_norm:.4f} \+- {expected.acc_norm_stderr:.4f}
items     25
seconds   \d+\.\d
""",
        out,
    )
    assert err == "scoring 25 items on 8 device(s) ...\nwrote results.json\n"

    written = json.loads((tmp_path / "results.json").read_text())
    assert HellaSwagScore(written["acc"], written["acc_norm"], written["items"]) == expected
    assert written["acc_stderr"] == math.sqrt(expected.acc * (1 - expected.acc) / 25)
    assert written["acc_norm_stderr"] == expected.acc_norm_stderr
    assert (written["protocol"], written["lora"]) == ("build-nanogpt", None)
    assert (written["source"], written["dtype"]) == (str(model_dir), "float32")
    assert written["versions"]["jax"] == jax.__version__
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_is_merged_and_named(door, model_dir, adapter, params, tmp_path):
    flags = ("--source", model_dir, "--data", "items.jsonl", "--output", "results.json")
    code, out, _ = door("eval_hellaswag", *flags, "--batch_size", 16, "--lora", adapter)
    assert code == 0
    assert f"\nlora      {adapter}\n" in out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["lora"] == str(adapter)
    adapted = merge(params, *load_adapter(adapter, CONFIG))
    expected = direct_score(adapted, tmp_path / "items.jsonl")
    assert HellaSwagScore(written["acc"], written["acc_norm"], ITEMS) == expected
    assert expected != direct_score(params, tmp_path / "items.jsonl")


@pytest.mark.skipif("GPT2_JAX_SHARED" not in os.environ, reason="GPT2_JAX_SHARED is not set")
def test_items_of_the_validation_set(door, model_dir, params):
    file = Path(os.environ["GPT2_JAX_SHARED"]) / "data" / "hellaswag_val.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    flags = ("--source", model_dir, "--data", file, "--limit", 20)
    code, out, _ = door("eval_hellaswag", *flags, "--dtype", "bfloat16")
    assert code == 0
    expected = direct_score(params, file, 20, "bfloat16")
    assert f"acc       {expected.acc:.4f} +- " in out
    assert f"acc_norm  {expected.acc_norm:.4f} +- " in out
    assert "items     20\n" in out


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--limit", "0"], "limit=0 must be a whole number of at least 1"),
        (["--limit", "few"], "--limit"),
        (["--batch_size", "0"], "batch_size=0 must be a whole number of at least 1"),
        (["--batch_size", "-8"], "batch_size=-8 must be"),
        (["--batch_size", "12"], "batch_size=12 must be a multiple of the 8 devices"),
        (["--batch_size", "12"], "the rows; 16 fits"),
        (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl: No such file"),
        (["--data", "nowhere.jsonl"], "from github.com/rowanz/hellaswag"),
        (["--data", "."], "cannot read .: Is a directory"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 1 is not JSON"),
        (["--data", "empty.jsonl"], "empty.jsonl is empty"),
        (["--dtype", "float16"], "--dtype"),
        (["--output", "nowhere/results.json"], "cannot write nowhere/results.json"),
        (["--output", "items.jsonl/results.json"], "cannot write items.jsonl/results.json"),
        (["--output", "."], "cannot write .: it is a folder"),
        (["--lmit", "3"], "did you mean --limit?"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(door, tmp_path, monkeypatch, flags, rule):
    monkeypatch.setattr("gpt2_jax.sources.load_source", None)
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("")
    assert rule in door.refuses("eval_hellaswag", "--data", "items.jsonl", *flags)


def test_data_is_looked_for_where_training_does(door):
    assert "cannot read data/hellaswag_val.jsonl" in door.refuses("eval_hellaswag")


def test_models_and_adapters_that_do_not_do_are_refused(door, model_dir, tmp_path):
    flags = ("--data", "items.jsonl", "--output", "results.json")
    assert "'nowhere' is no directory" in door.refuses(
        "eval_hellaswag", *flags, "--source", "nowhere"
    )
    assert "adapter nowhere is no directory" in door.refuses(
        "eval_hellaswag", *flags, "--source", model_dir, "--lora", "nowhere"
    )
    small = dataclasses.replace(CONFIG, vocab_size=50, eos_token_id=None)
    export_model(tmp_path / "small", init_params(small, jax.random.key(0)), small)
    assert "vocab_size=50 is less than the 50257" in door.refuses(
        "eval_hellaswag", *flags, "--source", "small"
    )
    assert not (tmp_path / "results.json").exists()


def test_standard_errors_are_those_of_a_share():
    result = HellaSwagScore(acc=0.25, acc_norm=0.5, items=10_042)
    assert result.acc_stderr == pytest.approx(0.00432, abs=1e-5)
    assert result.acc_norm_stderr == pytest.approx(0.00499, abs=1e-5)
    assert HellaSwagScore(1.0, 0.0, 3).acc_stderr == 0
