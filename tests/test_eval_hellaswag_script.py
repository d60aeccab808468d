"""scripts/eval_hellaswag.py at the door: one model's scores, printed and written."""

import dataclasses
import http.server
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from doors import Door
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.hellaswag import HellaSwagResult, HellaSwagScore, make_hellaswag
from gpt2_jax.evaluation.hellaswag_items import PROTOCOLS, read_items
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.peft import load_adapter
from gpt2_jax.lora import merge
from gpt2_jax.model import GPT2, Params, init_params
from gpt2_jax.tokenizer import encode

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
            "activity_label": words(1),
            **(parts := {"ctx_a": words(4), "ctx_b": words(1)}),
            "ctx": " ".join(parts.values()),
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


def direct_results(
    params: Params, items: Path, limit: int | None = None, dtype: str = "float32"
) -> dict[str, HellaSwagResult]:
    """By each protocol, on one device, in batches of another size."""
    model, items_read = GPT2(CONFIG, dtype=dtype), read_items(items, limit)
    return {
        protocol: make_hellaswag(model, items_read, 3, protocol=protocol)(params)
        for protocol in PROTOCOLS
    }


def score_of(summary: dict[str, Any], items: int) -> HellaSwagScore:
    return HellaSwagScore(summary["acc"], summary["acc_norm"], items)


def test_both_protocols_are_printed_and_written(door, model_dir, params, tmp_path):
    flags = ("--source", model_dir, "--data", "items.jsonl", "--output", "results.json")
    code, out, err = door("eval_hellaswag", *flags, "--batch_size", 16, "--limit", 25)
    assert code == 0
    expected = direct_results(params, tmp_path / "items.jsonl", 25)
    blocks = [
        rf"""
protocol of {protocol}
acc       {result.score.acc:.4f} \+- {result.score.acc_stderr:.4f}
acc_norm  {result.score.acc_norm:.4f} \+- {result.score.acc_norm_stderr:.4f}
ties      0 items, which 0.001 nats would decide
seconds   \d+\.\d
"""
        for protocol, result in expected.items()
    ]
    head = rf"HellaSwag, 25 items of items.jsonl\nsource    {re.escape(str(model_dir))}\n"
    assert re.fullmatch(head + "".join(blocks), out)
    assert err == "scoring 25 items on 8 device(s) ...\nwrote results.json\n"

    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["items"], written["limit"], written["lora"]) == (25, 25, None)
    assert (written["source"], written["dtype"]) == (str(model_dir), "float32")
    assert written["batch_size"] == 16
    assert written["versions"]["jax"] == jax.__version__
    assert list(written["protocols"]) == list(PROTOCOLS)
    for protocol, result in expected.items():
        summary = written["protocols"][protocol]
        assert score_of(summary, 25) == result.score
        assert summary["acc_stderr"] == result.score.acc_stderr
        assert summary["acc_norm_stderr"] == result.score.acc_norm_stderr
        assert (summary["ties"], summary["cut"]) == (0, 0)
        for number, prediction in enumerate(written["predictions"]):
            assert (prediction["item"], prediction["label"]) == (number, number % 4)
            mine, direct = prediction[protocol], result.prediction(number)
            assert mine["losses"] == pytest.approx(direct["losses"], abs=1e-4)
            assert {**mine, "losses": None} == {**direct, "losses": None}
    assert len(written["predictions"]) == 25
    assert not list(tmp_path.glob(".*"))


def test_one_protocol_needs_its_own_fields_alone(door, model_dir, params, tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    for line in lines:
        del line["activity_label"], line["ctx_a"], line["ctx_b"]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--source", model_dir, "--data", "few.jsonl")
    code, out, _ = door("eval_hellaswag", *flags, "--protocols", "build-nanogpt")
    assert code == 0
    expected = direct_results(params, tmp_path / "items.jsonl")["build-nanogpt"].score
    assert f"acc_norm  {expected.acc_norm:.4f} +- " in out
    assert "lm-evaluation-harness" not in out
    assert "few.jsonl, line 1: activity_label=None must be" in door.refuses(
        "eval_hellaswag", *flags
    )


def test_an_adapter_is_merged_and_named(door, model_dir, adapter, params, tmp_path):
    flags = ("--source", model_dir, "--data", "items.jsonl", "--output", "results.json")
    code, out, _ = door("eval_hellaswag", *flags, "--batch_size", 16, "--lora", adapter)
    assert code == 0
    assert f"\nlora      {adapter}\n" in out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["lora"] == str(adapter)
    expected = direct_results(
        merge(params, *load_adapter(adapter, CONFIG)), tmp_path / "items.jsonl"
    )
    plain = direct_results(params, tmp_path / "items.jsonl")
    for protocol in PROTOCOLS:
        assert score_of(written["protocols"][protocol], ITEMS) == expected[protocol].score
        assert (expected[protocol].sums_NE != plain[protocol].sums_NE).any()


def test_items_longer_than_the_context_are_counted(door, params, tmp_path):
    short = dataclasses.replace(CONFIG, n_positions=10)
    cut = {**params, "wpe": {"embedding": params["wpe"]["embedding"][:10]}}
    export_model(tmp_path / "short", cut, short)
    flags = ("--source", "short", "--data", "items.jsonl", "--protocols", "build-nanogpt")
    code, out, _ = door("eval_hellaswag", *flags, "--limit", 10)
    assert code == 0
    items = read_items(tmp_path / "items.jsonl", 10)
    longer = sum(max(len(encode(f"{i.ctx} {e}")) for e in i.endings) > 11 for i in items)
    assert 0 < longer < 10
    assert f"cut       {longer} items, longer than the model's context\n" in out


def test_weights_that_give_no_number_are_refused(door, params, tmp_path):
    broken = {**params, "ln_f": jax.tree.map(lambda leaf: leaf * np.nan, params["ln_f"])}
    export_model(tmp_path / "broken", broken, CONFIG)
    flags = ("--source", "broken", "--data", "items.jsonl", "--output", "results.json")
    code, out, err = door("eval_hellaswag", *flags)
    assert (code, out) == (2, "")
    assert "error: the model's losses are not finite" in err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
@pytest.mark.skipif("GPT2_JAX_SHARED" not in os.environ, reason="GPT2_JAX_SHARED is not set")
def test_items_of_the_validation_set(door, model_dir, params, tmp_path):
    """From the cached copy, in bfloat16."""
    file = Path(os.environ["GPT2_JAX_SHARED"]) / "data" / "hellaswag_val.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hellaswag_val.jsonl.gz").symlink_to(file)
    flags = ("--source", model_dir, "--limit", 20, "--dtype", "bfloat16")
    code, out, _ = door("eval_hellaswag", *flags)
    assert code == 0
    assert out.startswith("HellaSwag, 20 items of data/hellaswag_val.jsonl.gz\n")
    for result in direct_results(params, file, 20, "bfloat16").values():
        assert f"acc       {result.score.acc:.4f} +- " in out
        assert f"acc_norm  {result.score.acc_norm:.4f} +- " in out


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
        (["--protocols"], "--protocols"),
        (["--protocols", "mine"], "--protocols"),
        (["--output", "nowhere/results.json"], "cannot write nowhere/results.json"),
        (["--output", "items.jsonl/results.json"], "cannot write items.jsonl/results.json"),
        (["--output", "items.jsonl"], "cannot write items.jsonl: it is what is read"),
        (["--output", "/dev/null"], "cannot write /dev/null: it is no ordinary file"),
        (["--output", "/proc/results.json"], "cannot write /proc/results.json"),
        (["--output", 255 * "r"], "File name too long"),
        (["--url", "http://127.0.0.1:1/"], "is for the validation set; drop it, or --data"),
        (["--output", "."], "cannot write .: it is a folder"),
        (["--lmit", "3"], "did you mean --limit?"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(door, tmp_path, monkeypatch, flags, rule):
    monkeypatch.setattr("gpt2_jax.sources.load_source", None)
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("")
    assert rule in door.refuses("eval_hellaswag", "--data", "items.jsonl", *flags)


def test_without_data_the_validation_set_is_downloaded_and_checked(door, serve, tmp_path):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write((tmp_path / "items.jsonl").read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    with serve(Other) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/hellaswag_val.jsonl"
        code, out, error = door("eval_hellaswag", "--url", url)
    assert (code, out) == (2, "")
    assert error.startswith(f"downloading {url} to data/hellaswag_val.jsonl ...\nerror: ")
    assert f"{url} is not HellaSwag's validation set: its sha256 is " in error
    assert not (tmp_path / "data").exists()
    assert "pass it with --data" in door("eval_hellaswag", "--url", url)[2]


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
    assert "vocab_size=50 is not that of GPT-2's tokenizer" in door.refuses(
        "eval_hellaswag", *flags, "--source", "small"
    )
    assert not (tmp_path / "results.json").exists()
