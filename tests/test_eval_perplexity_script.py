"""scripts/eval_perplexity.py at the door: figures of texts and of shards, printed and written."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from doors import Door
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.shards import write_dataset
from gpt2_jax.evaluation.losses import token_losses
from gpt2_jax.evaluation.perplexity import Figures
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.peft import load_adapter
from gpt2_jax.lora import merge
from gpt2_jax.model import Params, init_params
from gpt2_jax.tokenizer import END_OF_TEXT_ID, encode

CONFIG = GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2)
OWN_TOKENS = dataclasses.replace(CONFIG, vocab_size=50, eos_token_id=None)
SHORT = "A text of a few words only: naïve, 日本.\n"
LONG = "".join(f"Line {number} of a text that goes on.\n" for number in range(20))


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text(SHORT, encoding="utf-8")
    (tmp_path / "long.txt").write_text(LONG, encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")
    return Door(capsys)


@pytest.fixture(scope="module", name="params")
def random_params() -> Params:
    """Large enough that texts differ much."""
    initial = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim == 2 else leaf, initial)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    directory = tmp_path_factory.mktemp("perplexity") / "model"
    export_model(directory, params, CONFIG)
    return directory


def loss_of(params: Params, text: str, config: GPT2Config = CONFIG, rolling: bool = False) -> float:
    """Of a text that fits one window, nats/token."""
    tokens = encode(text)
    if rolling:
        tokens = np.concatenate([[END_OF_TEXT_ID], tokens])
    return float(token_losses(params, config, tokens[None]).mean(dtype=np.float64))


def written(file: str = "results.json") -> dict:
    return json.loads(Path(file).read_text())


def test_figures_are_printed_and_written(door, model_dir, params):
    flags = ("--source", model_dir, "--text", "short.txt", "long.txt", "empty.txt")
    code, out, err = door("eval_perplexity", *flags, "--output", "results.json")
    assert code == 0, err
    assert err == "scoring 3 document(s) on 8 device(s) ...\nwrote results.json\n"
    results = written()
    short, long, empty = results["documents"]
    assert [one["name"] for one in results["documents"]] == ["short.txt", "long.txt", "empty.txt"]
    assert short["loss"] == pytest.approx(loss_of(params, SHORT), abs=1e-5)
    assert (short["tokens"], long["tokens"]) == (len(encode(SHORT)) - 1, len(encode(LONG)) - 1)
    assert short["bytes"] == len(SHORT.encode()) - len("A")
    assert (empty["tokens"], empty["bytes"], empty["perplexity"]) == (0, 0, None)
    assert results["tokens"] == short["tokens"] + long["tokens"]
    assert results["bytes"] == short["bytes"] + long["bytes"]
    assert results["nll"] == pytest.approx(short["nll"] + long["nll"], rel=1e-12)
    assert results["perplexity"] == pytest.approx(math.exp(results["nll"] / results["tokens"]))
    assert results["byte_perplexity"] == pytest.approx(2 ** results["bits_per_byte"])
    assert (results["protocol"], results["context"], results["stride"]) == ("strided", 64, 32)
    assert results["versions"]["jax"] == jax.__version__
    assert results["text"] == ["short.txt", "long.txt", "empty.txt"]

    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("perplexity, strided windows as in Hugging Face's documentation\n")
    assert "windows          64 tokens, stride 32\n" in out
    assert re.search(rf" *long\.txt +{long['tokens']} +{long['bytes']} +{long['loss']:.4f} ", out)
    assert re.search(r" *empty\.txt +0 +0 +n/a +n/a +n/a +n/a", out)
    assert f"\nloss             {results['loss']:.4f}\n" in out
    assert f"\nbits per byte    {results['bits_per_byte']:.4f}\n" in out
    assert re.search(r"\nseconds          \d+\.\d\n$", out)


def test_a_rolling_text_has_the_bytes_of_its_file(door, model_dir, params):
    flags = ("--source", model_dir, "--text", "short.txt", "--output", "results.json")
    code, out, _ = door("eval_perplexity", *flags, "--protocol", "rolling", "--context", "40")
    assert code == 0
    assert "windows          40 tokens\n" in out
    results = written()
    assert results["bytes"] == Path("short.txt").stat().st_size
    assert results["tokens"] == len(encode(SHORT))
    assert results["loss"] == pytest.approx(loss_of(params, SHORT, rolling=True), abs=1e-5)
    assert (results["protocol"], results["context"], results["stride"]) == ("rolling", 40, None)


def test_windows_and_batches_change_the_context_and_nothing_else(door, model_dir):
    flags = (
        "--source",
        model_dir,
        "--text",
        "long.txt",
        "--output",
        "results.json",
        "--context",
        24,
    )
    losses = {}
    for stride, batch_size in ((24, 8), (12, 8), (12, 16)):
        code, *_ = door("eval_perplexity", *flags, "--stride", stride, "--batch_size", batch_size)
        assert code == 0
        losses[stride, batch_size] = written()["loss"]
    assert losses[12, 8] == pytest.approx(losses[12, 16], abs=1e-6)
    assert abs(losses[12, 8] - losses[24, 8]) > 1e-3


def test_shards_are_cut_into_documents(door, model_dir, params, tmp_path):
    end = np.array([END_OF_TEXT_ID], np.uint16)
    stream = np.concatenate([encode("The beginning"), end, encode(SHORT), end, end, encode(LONG)])
    write_dataset(tmp_path / "data", {"train": end, "val": stream}, shard_tokens=15)
    flags = ("--source", model_dir, "--data", "data", "--output", "results.json")
    code, out, _ = door("eval_perplexity", *flags, "--documents", 2)
    assert code == 0
    assert re.search(r"\n *2 more +\d", out)
    first, second, empty, last = written()["documents"]
    assert (first["tokens"], first["bytes"]) == (1, len(" beginning"))
    assert second["loss"] == pytest.approx(loss_of(params, SHORT, rolling=True), abs=1e-5)
    assert second["bytes"] == len(SHORT.encode())
    assert (empty["tokens"], last["tokens"]) == (0, len(encode(LONG)))

    code, *_ = door("eval_perplexity", *flags, "--protocol", "rolling", "--limit", 2)
    assert code == 0
    rolling = written()
    assert [one["tokens"] for one in rolling["documents"]] == [2, second["tokens"]]
    assert rolling["documents"][1] == pytest.approx(second | {"name": "2"})
    assert (rolling["data"], rolling["split"], rolling["limit"]) == ("data", "val", 2)

    assert "hold no token after the first" in door.refuses(
        "eval_perplexity", *flags, "--split", "train"
    )


def test_a_model_of_other_tokens_has_no_bytes(door, tmp_path):
    export_model(tmp_path / "own", init_params(OWN_TOKENS, jax.random.key(0)), OWN_TOKENS)
    tokens = np.arange(50, dtype=np.uint16)
    write_dataset(tmp_path / "data", {"val": tokens})
    flags = ("--source", "own", "--data", "data", "--output", "results.json")
    code, out, _ = door("eval_perplexity", *flags)
    assert code == 0
    assert "\nbytes            n/a\n" in out
    results = written()
    assert (results["tokens"], results["bytes"], results["bits_per_byte"]) == (49, None, None)
    assert results["loss"] == pytest.approx(math.log(50), abs=0.1)  # of small random weights

    rolling = door.refuses("eval_perplexity", *flags, "--protocol", "rolling")
    assert "this model has none (eos_token_id=None); use --protocol strided" in rolling
    refusal = door.refuses("eval_perplexity", "--source", "own", "--text", "short.txt")
    assert "vocab_size=50 is not that of GPT-2's tokenizer, 50257" in refusal
    write_dataset(tmp_path / "large", {"val": tokens + 1})
    refusal = door.refuses("eval_perplexity", "--source", "own", "--data", "large")
    assert "document 1 holds token 50, outside the model's vocabulary of 50" in refusal


def test_an_adapter_is_merged_and_named(door, model_dir, params, tmp_path):
    name = "base_model.model.transformer.h.0.mlp.c_proj.lora_{}.weight"
    rng = np.random.default_rng(0)
    shapes = {"A": (2, 64), "B": (16, 2)}
    (tmp_path / "adapter").mkdir()
    save_file(
        {name.format(m): rng.normal(0, 2, shape).astype(np.float32) for m, shape in shapes.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["mlp.c_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    flags = ("--source", model_dir, "--text", "short.txt", "--output", "results.json")
    code, out, _ = door("eval_perplexity", *flags, "--lora", "adapter")
    assert code == 0
    assert "\nlora             adapter\n" in out
    adapted = merge(params, *load_adapter(tmp_path / "adapter", CONFIG))
    results = written()
    assert results["lora"] == "adapter"
    assert results["loss"] == pytest.approx(loss_of(adapted, SHORT), abs=1e-5)
    assert abs(results["loss"] - loss_of(params, SHORT)) > 0.1


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ([], "give either --text FILE or --data DIR"),
        (["--text", "short.txt", "--data", "."], "give either --text FILE or --data DIR"),
        (["--text", "short.txt", "./short.txt"], "--text short.txt is given twice"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["--text", "."], "cannot read .: Is a directory"),
        (["--text", "bytes.txt"], "bytes.txt is not UTF-8 text: byte 0xff at offset 1"),
        (["--data", "nowhere"], "--data nowhere is no directory of shards"),
        (["--data", "short.txt"], "texts go with --text"),
        (["--data", "."], ". holds no val shard"),
        (["--data", ".", "--split", "test"], "--split"),
        (["--text", "short.txt", "--split", "val"], "--split val goes with --data DIR; drop it"),
        (["--text", "short.txt", "--limit", "0"], "limit=0 must be a whole number of at least 1"),
        (["--text", "short.txt", "--stride", "0"], "stride=0 must be a whole number of at least 1"),
        (["--text", "short.txt", "--context", "1"], "context=1 must be from 2 to n_positions"),
        (
            ["--text", "short.txt", "--context", "8", "--stride", "9"],
            "stride=9 must be from 1 to context=8",
        ),
        (
            ["--text", "short.txt", "--protocol", "rolling", "--stride", "9"],
            "--stride 9 goes with --protocol strided; drop it",
        ),
        (["--text", "short.txt", "--documents", "-1"], "documents=-1 must be"),
        (["--text", "short.txt", "--batch_size", "0"], "batch_size=0 must be"),
        (["--text", "short.txt", "--batch_size", "12"], "the rows; 16 fits"),
        (["--text", "short.txt", "--output", "."], "cannot write .: it is a folder"),
        (["--text", "short.txt", "--output", "no/results.json"], "cannot write no/results.json"),
        (["--text", "short.txt", "--protcol", "rolling"], "did you mean --protocol?"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(door, tmp_path, monkeypatch, flags, rule):
    monkeypatch.setattr("gpt2_jax.sources.load_source", None)
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    assert rule in door.refuses("eval_perplexity", *flags)


def test_broken_weights_are_named(door, model_dir, monkeypatch):
    broken = [Figures("short.txt", 9, 40, math.nan)]
    monkeypatch.setattr("gpt2_jax.evaluation.perplexity.score_documents", lambda *_: broken)
    flags = ("--source", model_dir, "--text", "short.txt", "--output", "results.json")
    code, out, err = door("eval_perplexity", *flags)
    assert (code, out) == (2, "")
    assert "error: the model's losses are not finite" in err
    assert not Path("results.json").exists()


def test_what_does_not_fit_the_model_is_refused(door, model_dir):
    flags = ("--source", model_dir, "--output", "results.json", "--text")
    refused = door.refuses("eval_perplexity", *flags, "short.txt", "--context", 65)
    assert "context=65 must be from 2 to n_positions=64 of the model" in refused
    refused = door.refuses("eval_perplexity", *flags, "short.txt", "--stride", 65)
    assert "stride=65 must be from 1 to context=64" in refused
    assert "hold no token after the first" in door.refuses("eval_perplexity", *flags, "empty.txt")
    missing = door.refuses("eval_perplexity", "--source", "nowhere", "--text", "short.txt")
    assert "'nowhere' is no directory" in missing
    assert not Path("results.json").exists()
