"""scripts/generate.py at the door: prompts in, text out as it is made, mistakes in one line."""

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from doors import SCRIPTS, Door
from safetensors.numpy import save_file

from gpt2_jax import tokenizer
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation import decode
from gpt2_jax.generation.presentation import write_samples_page
from gpt2_jax.generation.samples import Sample
from gpt2_jax.generation.text_stream import Notation
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.model import init_params

SHARED = os.environ.get("GPT2_JAX_SHARED")


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


def model_directory(directory: Path, config: GPT2Config) -> Path:
    """A Hugging Face directory with random weights."""
    import jax

    state = state_dict_from_params(init_params(config, jax.random.key(0)), config)
    state = {name: np.ascontiguousarray(array) for name, array in state.items()}
    directory.mkdir()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_to_json(config)))
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with GPT-2's vocabulary."""
    config = GPT2Config(n_positions=24, n_embd=4, n_layer=1, n_head=1)
    return model_directory(tmp_path_factory.mktemp("small") / "model", config)


@pytest.fixture(scope="module")
def three_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a vocabulary of its own, without <|endoftext|>."""
    config = GPT2Config(
        vocab_size=3,
        n_positions=11,
        n_embd=6,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    return model_directory(tmp_path_factory.mktemp("three") / "model", config)


def adapter_directory(directory: Path, seed: int) -> str:
    """A random adapter of the small model's mlp.c_proj, strong enough to change every text."""
    rng = np.random.default_rng(seed)
    name = "base_model.model.transformer.h.0.mlp.c_proj.lora_{}.weight"
    shapes = {"A": (2, 16), "B": (4, 2)}
    directory.mkdir()
    save_file(
        {name.format(m): rng.normal(0, 9, shape).astype(np.float32) for m, shape in shapes.items()},
        directory / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 9, "target_modules": ["mlp.c_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return str(directory)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two for the small model."""
    base = tmp_path_factory.mktemp("adapters")
    return [adapter_directory(base / name, seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Pipes something in."""

    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return pipe


@pytest.fixture
def generate(door: Door, model_dir: Path) -> Callable[..., str]:
    """Runs the script with the small model, which must work without a word on stderr."""

    def run(*flags: object) -> str:
        code, out, err = door("generate", "--source", model_dir, "--max_new_tokens", 6, *flags)
        assert (code, err) == (0, "")
        return out

    return run


def samples(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_piped_output_is_the_text_alone(generate):
    out = generate("--prompt", "The quick")
    assert out.startswith("The quick")
    assert out.endswith("\n")
    assert len(tokenizer.encode(out)) > 6
    assert generate("--prompt", "The quick") == out
    assert generate("--prompt", "The quick", "--seed", 1) != out


def test_prompts_and_samples_come_in_their_order(generate):
    def texts(*flags):
        return [(s["prompt"], s["text"]) for s in samples(generate("--json", *flags))]

    prompts = ("--prompt", "one", "--prompt", "two three")
    both = texts(*prompts, "--num_samples", 2)
    assert [prompt for prompt, _ in both] == ["one", "one", "two three", "two three"]
    assert len(set(both)) == 4
    # A prompt's samples don't depend on what else is asked for.
    assert both[::2] == texts("--prompt", "one") + texts("--prompt", "two three")
    lines = "".join(f"{prompt}{text}\n" for prompt, text in both)
    assert generate(*prompts, "--num_samples", 2) == lines


def test_prompts_from_files_and_pipes_are_those_of_flags(generate, stdin, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("Ünïcode\r\n two\n".encode())
    flags = ("--prompt", "Ünïcode\r\n two")
    expected = generate(*flags)
    assert generate("--prompt_file", "prompt.txt") == expected
    stdin("Ünïcode\r\n two\r\n".encode())
    assert generate() == expected
    stdin("\ufeffÜnïcode\r\n two".encode())
    assert generate("--prompt_file", "-") == expected
    stdin(b"not asked for")
    assert generate("--prompt", "x", "--prompt_file", "prompt.txt") == (
        generate("--prompt", "x") + expected
    )
    stdin(b"\n two lines stay\n\n")
    assert samples(generate("--json"))[0]["prompt"] == "\n two lines stay\n"


def test_json_says_all_about_a_sample(generate):
    flags = ("--prompt", "one", "--num_samples", 2)
    out = generate(*flags, "--json", "--alternatives", 3)
    assert out.isascii()
    first, second = samples(out)
    assert (first["prompt_index"], first["sample_index"]) == (0, 0)
    assert (second["prompt_index"], second["sample_index"]) == (0, 1)
    assert first["prompt"] == "one"
    assert first["prompt_tokens"] == tokenizer.encode("one").tolist()
    assert first["text"] == tokenizer.decode(first["tokens"])
    assert first["finish_reason"] == "length"
    assert len(first["tokens"]) == len(first["logprobs"]) == len(first["alternatives"]) == 6
    for token, logprob, likeliest in zip(
        first["tokens"], first["logprobs"], first["alternatives"], strict=True
    ):
        assert [other for _, other in likeliest] == sorted(
            (other for _, other in likeliest), reverse=True
        )
        assert len(likeliest) == 3
        assert logprob <= likeliest[0][1] <= 0
        assert dict(map(tuple, likeliest)).get(token, logprob) == logprob
    assert "alternatives" not in samples(generate(*flags, "--json"))[0]


@pytest.mark.slow
def test_json_is_greedy_where_asked(generate):
    (sample,) = samples(generate("--prompt", "one", "--json", "--greedy", "--alternatives", 1))
    assert [[token] for token in sample["tokens"]] == [
        [token for token, _ in likeliest] for likeliest in sample["alternatives"]
    ]
    assert generate("--prompt", "one", "--top_k", 1) == generate("--prompt", "one", "--greedy")
    assert generate("--prompt", "one", "--temperature", 0) == generate(
        "--prompt", "one", "--greedy"
    )


def test_the_end_of_text_token_ends_a_text_and_is_not_in_it(door, model_dir, tmp_path):
    """With a token that this model likes as the last one."""
    flags = ("--prompt", "one", "--greedy", "--max_new_tokens", 9, "--json")
    (free,) = samples(door("generate", "--source", model_dir, *flags)[1])
    directory = tmp_path / "ends"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(model_dir / "model.safetensors")
    end = free["tokens"][3]
    config = json.loads((model_dir / "config.json").read_text()) | {"eos_token_id": end}
    (directory / "config.json").write_text(json.dumps(config))
    (sample,) = samples(door("generate", "--source", directory, *flags)[1])
    length = free["tokens"].index(end) + 1
    assert sample["finish_reason"] == "stop"
    assert sample["tokens"] == free["tokens"][:length]
    assert sample["text"] == tokenizer.decode(free["tokens"][: length - 1])
    out = door("generate", "--source", directory, *flags[:-1])[1]
    assert out == "one" + sample["text"] + "\n"


def test_the_end_of_text_token_may_be_the_prompt(generate):
    flags = ("--prompt", "<|endoftext|>", "--json")
    assert samples(generate(*flags, "--allow_end_of_text"))[0]["prompt_tokens"] == [50256]
    assert 50256 not in samples(generate(*flags))[0]["prompt_tokens"]


def made_by(monkeypatch: pytest.MonkeyPatch, made: Callable[[], Iterator[decode.NewToken]]) -> None:
    """Has the tokens made by a function instead of the model."""
    monkeypatch.setattr(decode, "stream", lambda *_, **__: made())


def test_text_is_shown_before_the_next_token_is_made(door, model_dir, monkeypatch, capsys):
    shown = []

    def made():
        for row in (1, 0):
            for token in (*tokenizer.encode(" my\u2603").tolist(), 11):
                shown.append(capsys.readouterr().out)
                yield decode.NewToken(row, token, -1.0, [], "length" if token == 11 else None)

    made_by(monkeypatch, made)
    code, rest, _ = door("generate", "--source", model_dir, "--prompt", "A", "--prompt", "B")
    assert code == 0
    # The first row is shown as it grows, though the second was there before it.
    assert shown == ["A", "", "", "", "", " my", "", "\u2603"]
    assert rest == ",\nB my\u2603,\n"


def test_a_sample_of_json_is_printed_when_it_is_finished(door, model_dir, monkeypatch, capsys):
    shown = []

    def made():
        for row in (0, 1):
            for reason in (None, "length"):
                shown.append(capsys.readouterr().out)
                yield decode.NewToken(row, 616, -1.0, [], reason)

    made_by(monkeypatch, made)
    flags = ("--source", model_dir, "--prompt", "A", "--num_samples", 2, "--json")
    rest = door("generate", *flags)[1]
    assert [out.count("\n") for out in [*shown, rest]] == [0, 0, 1, 0, 1]


def test_a_model_without_gpt2s_vocabulary_speaks_in_ids(door, three_tokens, stdin):
    flags = ("generate", "--source", three_tokens, "--max_new_tokens", 6)
    code, out, err = door(*flags, "--prompt", "0 2 1, 1 0 2")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"0 2 1 1 0 2( [012]){6}\n", out)
    assert samples(door(*flags, "--prompt", "2", "--json")[1])[0]["prompt_tokens"] == [2]
    stdin(b"0\n1 2\n")
    assert len(door(*flags, "--interactive")[1].splitlines()) == 2
    assert "'hello' is no token id" in door.refuses(*flags, "--prompt", "hello")
    assert "token 3 is outside the model's vocabulary of 3" in door.refuses(*flags, "--prompt", "3")


@pytest.mark.skipif(SHARED is None, reason="GPT2_JAX_SHARED is not set")
def test_the_published_sorter_sorts(door):
    flags = ("--source", f"{SHARED}/fixtures/nano-sort", "--greedy", "--max_new_tokens", 6)
    for symbols in ("2 0 1 1 0 2", "1 1 0 2 2 2", "0 1 0 1 0 1"):
        code, out, err = door("generate", *flags, "--prompt", symbols)
        assert (code, err) == (0, "")
        assert out == f"{symbols} {' '.join(sorted(symbols.split()))}\n"


def test_ids_of_gpt2s_vocabulary(generate):
    (sample,) = samples(generate("--prompt", "one two", "--json"))
    ids = " ".join(map(str, sample["prompt_tokens"]))
    (same,) = samples(generate("--ids", "--prompt", ids, "--json"))
    assert same["tokens"] == sample["tokens"]
    assert same["prompt"] == ids
    assert same["text"] == " ".join(map(str, same["tokens"]))
    assert generate("--ids", "--prompt", ids) == f"{ids} {same['text']}\n"


def test_asking_for_more_than_the_context_is_noted(door, model_dir):
    flags = ("--source", model_dir, "--prompt", "one two three four five", "--max_new_tokens", 99)
    code, out, err = door("generate", *flags, "--json")
    assert code == 0
    assert err.startswith(
        "note: only 20 of 99 new tokens fit after the prompt into the context of 24; "
    )
    assert err.count("\n") == 1
    (stopped,) = samples(out)
    assert (len(stopped["tokens"]), stopped["finish_reason"]) == (20, "context")

    code, out, err = door("generate", *flags, "--json", "--overflow", "slide")
    assert (code, err) == (0, "")
    (slid,) = samples(out)
    assert (len(slid["tokens"]), slid["finish_reason"]) == (99, "length")
    assert slid["tokens"][:20] == stopped["tokens"]

    err = door("generate", *flags, "--prompt", "short", "--max_new_tokens", 21)[2]
    assert err.startswith("note: only 20 of 21 new tokens fit after prompt 0 into")
    assert err.count("\n") == 1


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_precisions(generate, precision):
    (sample,) = samples(generate("--prompt", "one", "--precision", precision, "--json"))
    assert len(sample["tokens"]) == 6


@pytest.mark.slow
def test_every_rule_reaches_the_sampling(generate):
    flags = ("--prompt", "one", "--temperature", 3)
    texts = {
        generate(*flags, *rule)
        for rule in (
            ("--top_k", 2),
            ("--top_k", "None", "--top_p", 1e-6),
            ("--top_k", "None", "--min_p", 0.99),
            ("--top_k", 1, "--repetition_penalty", 9.0),
            (),
        )
    }
    assert len(texts) >= 4  # top_p and min_p may both leave the likeliest token alone
    likeliest = generate("--prompt", "one", "--greedy")
    assert generate(*flags, "--top_k", "None", "--top_p", 1e-6) == likeliest


def test_explain_shows_a_table_beside_the_text(door, model_dir):
    flags = ("--source", model_dir, "--max_new_tokens", 3, "--prompt", "one", "--num_samples", 2)
    code, out, err = door("generate", *flags, "--explain", "--alternatives", 2)
    assert code == 0
    assert out == door("generate", *flags)[1]
    assert err.count("perplexity") == 2
    assert err.count("%") >= 2 * 3 * 3


def test_explain_gives_each_token_one_line_where_it_is_piped(door, model_dir):
    flags = ("--source", model_dir, "--max_new_tokens", 3, "--prompt", "one")
    code, _, err = door("generate", *flags, "--explain", "--alternatives", 12)
    assert code == 0
    assert [line.count("%") for line in err.splitlines()] == [0, 0, 13, 13, 13, 0]


def test_html_is_a_page_about_all_samples(door, model_dir, tmp_path):
    flags = ("--source", model_dir, "--max_new_tokens", 3, "--prompt", "one", "--num_samples", 2)
    code, out, err = door("generate", *flags, "--html", "page.html")
    assert (code, err) == (0, "")
    assert out == door("generate", *flags)[1]
    page = (tmp_path / "page.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "Sample 2" in page
    assert "Sample 3" not in page


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "x " * 40], "more than the context of 24"),
        (["--prompt", "\udcff"], "not valid Unicode"),
        (["--prompt_file", "nowhere"], "cannot read nowhere"),
        (["--prompt_file", "latin.txt"], "latin.txt is not UTF-8 text: byte 0xe9 at offset 1"),
        (["--prompt_file", "-", "--prompt_file", "-"], "given twice"),
        (["--prompt", "x", "--top_p", "0"], "top_p=0.0 must be a number in (0, 1]"),
        (["--prompt", "x", "--top_p", "1.5"], "top_p=1.5 must be a number in (0, 1]"),
        (["--prompt", "x", "--top_p", "nan"], "top_p=nan must be a number in (0, 1]"),
        (["--prompt", "x", "--min_p", "-1"], "min_p=-1.0"),
        (["--prompt", "x", "--repetition_penalty", "0"], "repetition_penalty=0.0"),
        (["--prompt", "x", "--top_k", "0"], "top_k=0 must be a whole number of at least 1"),
        (["--prompt", "x", "--top_k", "-5"], "top_k=-5 must be a whole number of at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be a finite number"),
        (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens=0 must be"),
        (["--prompt", "x", "--num_samples", "0"], "num_samples=0 must be"),
        (["--prompt", "x", "--seed", "-1"], "seed=-1 must be in"),
        (["--prompt", "x", "--precision", "f16"], "--precision"),
        (["--prompt", "x", "--overflow", "wrap"], "--overflow"),
        (["--prompt", "x", "--model", "gpt2"], "goes with --source pretrained"),
        (["--prompt", "x", "--lora", "nowhere"], "nowhere"),
        (["--promt", "x"], "--prompt"),
        (["--prompt", "x", "--greedy", "--temperature", "1"], "--temperature does not go with"),
        (["--prompt", "x", "--greedy", "--top_k=50"], "--top_k does not go with --greedy"),
        (["--prompt", "x", "--greedy", "--top-p", "0.5"], "--top_p does not go with --greedy"),
        (["--prompt", "x", "--greedy", "--min_p", "0.5"], "--min_p does not go with --greedy"),
        (["--prompt", "x", "--greedy", "--num_samples", "2"], "num_samples=2 would all be"),
        (["--prompt", "x", "--temperature", "0", "--num_samples", "2"], "num_samples=2 would all"),
        (["--prompt", "x", "--interactive"], "--prompt does not go with --interactive"),
        (["--prompt_file", "x", "--interactive"], "--prompt_file does not go with --interactive"),
        (["--interactive", "--html", "x.html"], "--html does not go with --interactive"),
        (["--prompt", "x", "--json", "--explain"], "--explain does not go with --json"),
        (["--prompt", "x", "--alternatives", "3"], "--alternatives goes with --explain"),
        (["--prompt", "x", "--explain", "--alternatives", "0"], "alternatives=0 must be"),
        (["--prompt", "x", "--html", "nowhere/x.html"], "cannot write nowhere/x.html"),
        (["--prompt", "x", "--html", "."], "cannot write .: it is a folder"),
        (["--prompt", "1", "--ids", "--allow_end_of_text"], "--allow_end_of_text does not go"),
        (["--prompt", "one", "--ids"], "'one' is no token id"),
        (["--prompt", "50257", "--ids"], "token 50257 is outside"),
    ],
)
def test_mistakes(door: Door, model_dir: Path, tmp_path: Path, flags: list[str], rule: str) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    assert rule in door.refuses("generate", "--source", model_dir, *flags)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--model", "gpt3"], "unknown model size 'gpt3'; the sizes are gpt2, gpt2-medium"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--source", "nowhere"], "'nowhere' is no directory"),
        (["--source", "."], ". holds no weights"),
    ],
)
def test_models_that_are_not_there(door: Door, flags: list[str], rule: str) -> None:
    assert rule in door.refuses("generate", "--prompt", "x", *flags)


def test_weights_of_another_size_are_named(door: Door, model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    line = door.refuses("generate", "--prompt", "x", "--weights", file, "--model", "gpt2")
    assert "missing h.1." in line
    assert str(file) in line


def test_truncated_weights_are_refused(door: Door, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/config.json").write_bytes((model_dir / "config.json").read_bytes())
    data = (model_dir / "model.safetensors").read_bytes()
    (tmp_path / "cut/model.safetensors").write_bytes(data[:-1000])
    line = door.refuses("generate", "--source", "cut", "--prompt", "x")
    assert "model.safetensors are damaged" in line


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"\x89PNG\r\n", "standard input is not UTF-8 text: byte 0x89 at offset 0"),
        (b"\x7fELF\0\0", "standard input is no text: it has a NUL byte"),
        (b"", "the prompt is empty"),
        (b"\n", "the prompt is empty"),
    ],
)
def test_what_is_piped_in_must_be_text(door, model_dir, stdin, data, rule):
    stdin(data)
    assert rule in door.refuses("generate", "--source", model_dir)


def test_a_prompt_is_missed(door, model_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no prompt; give --prompt" in door.refuses("generate", "--source", model_dir)
    line = door.refuses("generate", "--source", model_dir, "--prompt_file", "-")
    assert "standard input is closed" in line


def test_mistakes_in_flags_are_told_before_anything_is_loaded(door, monkeypatch):
    monkeypatch.setattr("gpt2_jax.sources.load_source", None)
    for flags in (
        ["--prompt", ""],
        ["--prompt", "\ud800"],
        ["--prompt", "x", "--top_k", "0"],
        ["--prompt", "x", "--html", "nowhere/page.html"],
        ["--interactive", "--seed=-1"],
    ):
        door.refuses("generate", *flags)


def test_interactive_answers_line_after_line(door, generate, model_dir, stdin, monkeypatch):
    from gpt2_jax import sources

    loaded = []
    load = sources.load_source
    monkeypatch.setattr(sources, "load_source", lambda *a, **k: loaded.append(1) or load(*a, **k))
    flags = ("generate", "--source", model_dir, "--max_new_tokens", 6)
    stdin("one\n\ncaf\u00e9\n".encode() + b"\xff\xfe\n" + b"x " * 40 + b"\ntwo three")
    code, out, err = door(*flags, "--interactive")
    assert code == 0
    assert loaded == [1]
    assert [line.split(";")[0] for line in err.splitlines()] == [
        "error: the prompt is empty",
        "error: the line is not UTF-8 text: byte 0xff at offset 0",
        "error: the prompt has 41 tokens, more than the context of 24",
    ]
    texts = [generate("--prompt", prompt) for prompt in ("one", "caf\u00e9", "two three")]
    assert out == "".join(texts)

    stdin(b"one\n\n\ntwo three\n")
    answers = samples(door(*flags, "--interactive", "--json", "--num_samples", 2)[1])
    places = [(answer["prompt_index"], answer["sample_index"]) for answer in answers]
    assert places == [(0, 0), (0, 1), (3, 0), (3, 1)]


def test_every_adapter_answers_in_turn_as_it_does_alone(generate, adapters):
    first, second = (("--lora", adapter) for adapter in adapters)
    flags = ("--prompt", "one", "--prompt", "two three", "--num_samples", 2)
    alone = [generate(*flags, *lora) for lora in (first, second)]
    assert len({generate(*flags), *alone}) == 3
    headed = [f"== {adapter}\n{out}" for adapter, out in zip(adapters, alone, strict=True)]
    assert generate(*flags, *first, *second) == headed[0] + headed[1]
    assert generate(*flags, *second, *first) == headed[1] + headed[0]


def test_json_names_the_adapter(generate, adapters):
    flags = ("--prompt", "one", "--num_samples", 2, "--json")
    loras = [("--lora", adapter) for adapter in adapters]
    both = samples(generate(*flags, *loras[0], *loras[1]))
    assert both == [sample for lora in loras for sample in samples(generate(*flags, *lora))]
    assert [sample["lora"] for sample in both] == [a for a in adapters for _ in range(2)]
    assert [(sample["prompt_index"], sample["sample_index"]) for sample in both] == 2 * [
        (0, 0),
        (0, 1),
    ]
    assert [sample["lora"] for sample in samples(generate(*flags))] == [None, None]


def test_tables_and_page_name_the_adapters(door, model_dir, adapters, tmp_path):
    flags = ("--source", model_dir, "--max_new_tokens", 3, "--prompt", "one", "--num_samples", 2)
    loras = ("--lora", adapters[0], "--lora", adapters[1])
    code, out, err = door("generate", *flags, *loras, "--explain", "--html", "page.html")
    assert code == 0
    assert out == door("generate", *flags, *loras)[1]
    assert [line for line in err.splitlines() if line.startswith("==")] == [
        f"== {adapter}" for adapter in adapters
    ]
    assert err.count("perplexity") == 4
    note = f"Samples 1 to 2: {adapters[0]}; samples 3 to 4: {adapters[1]}"
    assert note in (tmp_path / "page.html").read_text()
    door("generate", *flags, *loras[:2], "--html", "page.html")
    assert adapters[0] not in (tmp_path / "page.html").read_text()

    sample = Sample(0, 0, [3198], [decode.NewToken(0, 616, -1.0, [], "length")])
    write_samples_page(tmp_path / "page.html", [sample] * 2, ["<a>", "b"], Notation(ids=False))
    assert "Sample 1: &lt;a&gt;; sample 2: b" in (tmp_path / "page.html").read_text()


def test_a_full_context_is_noted_once_for_all_adapters(door, model_dir, adapters):
    flags = ("--source", model_dir, "--prompt", "one two three four five", "--max_new_tokens", 99)
    loras = ("--lora", adapters[0], "--lora", adapters[1])
    code, out, err = door("generate", *flags, "--json", *loras)
    assert code == 0
    assert err.startswith("note: only 20 of 99 new tokens fit")
    assert err.count("\n") == 1
    assert [sample["finish_reason"] for sample in samples(out)] == ["context"] * 2


def test_interactive_asks_every_adapter(door, generate, model_dir, adapters, stdin):
    flags = ("generate", "--source", model_dir, "--max_new_tokens", 6)
    loras = ("--lora", adapters[0], "--lora", adapters[1])
    stdin(b"one\n" + b"x " * 40 + b"\ntwo three\n")
    code, out, err = door(*flags, "--interactive", *loras)
    assert code == 0
    assert err.startswith("error: the prompt has 41 tokens, more than the context of 24")
    assert err.count("\n") == 1
    assert out == "".join(generate("--prompt", text, *loras) for text in ("one", "two three"))


def test_adapters_are_checked_before_anything_is_shown(
    door, model_dir, adapters, tmp_path, monkeypatch
):
    good = ("--prompt", "x", "--lora", adapters[0])
    other = Path(adapter_directory(tmp_path / "other", 2))
    fields = json.loads((other / "adapter_config.json").read_text()) | {"target_modules": ["h.1.x"]}
    (other / "adapter_config.json").write_text(json.dumps(fields))
    refused = door.refuses("generate", "--source", model_dir, *good, "--lora", other)
    assert "target_modules" in refused

    monkeypatch.setattr("gpt2_jax.sources.load_source", None)
    assert "adapter nowhere is no directory" in door.refuses("generate", *good, "--lora", "nowhere")
    twice = door.refuses("generate", *good, "--lora", adapters[0] + "/.")
    assert f"--lora {adapters[0]} is given twice" in twice


def script(*flags: object, before: str = "") -> list[str]:
    """A command that runs the script in a process of its own, after some Python."""
    code = "import runpy, sys\n" + before + "\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    argv = [str(SCRIPTS / "generate.py"), *map(str, flags)]
    return [sys.executable, "-c", f"import sys; sys.argv = {argv!r}\n{code}"]


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_ends_it_quietly(model_dir):
    command = script("--source", model_dir, "--interactive", "--max_new_tokens", 2)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(b"one")
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"two\n" * 1000)
            process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_full_disk_is_told_in_one_line(model_dir):
    command = script("--source", model_dir, "--prompt", "one", "--max_new_tokens", 2)
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (
        process.stderr
        == b"error: cannot write the output: No space left on device; make room and try again\n"
    )
    assert process.returncode == 2


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_imports_little(model_dir, tmp_path):
    heavy = {"torch", "transformers", "orbax", "grain", "optax", "matplotlib"}
    command = script(
        *("--source", model_dir, "--prompt", "one", "--max_new_tokens", 6),
        before=f"import atexit; atexit.register(lambda: print({heavy!r} & sys.modules.keys()))",
    )
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run() -> tuple[str, set[Path]]:
        process = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=True
        )
        assert process.stderr == ""
        return process.stdout, set((tmp_path / "programs").glob("*-cache"))

    first, programs = run()
    assert first.endswith("\nset()\n")
    assert programs
    assert run() == (first, programs)


class Terminal:
    """A person's terminal: what is typed, and what stands on the screen."""

    def __init__(self, command: list[str], *, piped: bool = False) -> None:
        self._master, slave = pty.openpty()
        # Without colours and the like from readline.
        self._process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=subprocess.PIPE if piped else slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "JAX_PLATFORMS": "cpu"},
        )
        os.close(slave)
        self._screen = b""

    def types(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def shows(self, text: str, insisting: str = "") -> str:
        """Waits for a text; returns all that came before it since the last one waited for.

        Keys to insist with are typed again where nothing happens: Python misses a Ctrl-C that
        comes just before it begins to wait for keys.
        """
        wanted = text.replace("\n", "\r\n").encode()
        patience = 60
        while wanted not in self._screen:
            ready, _, _ = select.select([self._master], [], [], 5)
            if not ready:
                self.types(insisting)
                patience -= 1
                assert patience, f"{text!r} is not in {self._screen!r}"
                continue
            try:
                self._screen += os.read(self._master, 4096)
            except OSError:  # the other end is closed
                raise AssertionError(f"{text!r} is not in {self._screen!r}") from None
        before, _, self._screen = self._screen.partition(wanted)
        return before.decode()

    def ends(self) -> tuple[int, str]:
        """Waits for the end; returns the exit status, and what was piped out."""
        out, _ = self._process.communicate(timeout=300)
        return self._process.returncode, (out or b"").decode()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        os.close(self._master)


# The terminal becomes the one that Ctrl-C comes from, and each sample is " my my"; what follows
# the prompt "wait" never comes to an end.
FIXED_TEXT = f"""
import fcntl, threading
fcntl.ioctl(0, {termios.TIOCSCTTY}, 0)
from gpt2_jax.generation import decode

def stream(params, config, prompts, **options):
    for row, prompt in enumerate(prompts):
        yield decode.NewToken(row, 616, -1.0, [], None)
        if prompt == {tokenizer.encode("wait").tolist()}:
            while not threading.Event().wait(0.1):  # so that a signal is never seen late
                pass
        yield decode.NewToken(row, 616, -1.0, [], "length")

decode.stream = stream
"""


def test_a_person_at_a_terminal(model_dir):
    flags = ("--source", model_dir, "--max_new_tokens", 2, "--interactive")
    with Terminal(script(*flags, before=FIXED_TEXT)) as person:
        person.shows("> ")
        person.types("one\n")
        person.shows("one my my\n> ")
        person.types("wait\n")
        person.shows("wait my")
        person.types("\x03")  # Ctrl-C stops the text
        person.shows("\n> ")
        person.types("\n")
        person.shows("error: the prompt is empty")
        person.shows("\n> ")
        person.types("\x10\x10e\n")  # readline: the line before the last one, and a letter more
        person.shows("onee my my\n> ")
        person.types("\x04")  # Ctrl-D
        assert person.ends()[0] == 0


def test_ctrl_c_at_the_sign_ends_it(model_dir):
    flags = ("--source", model_dir, "--interactive")
    with Terminal(script(*flags, before=FIXED_TEXT)) as person:
        person.shows("> ")
        person.types("\x03")
        person.shows("\ninterrupted\n", insisting="\x03")
        assert person.ends()[0] == 130


def test_a_person_who_pipes_the_output_gets_the_text_alone(model_dir):
    flags = ("--source", model_dir, "--max_new_tokens", 2, "--interactive", "--num_samples", 2)
    with Terminal(script(*flags, before=FIXED_TEXT), piped=True) as person:
        person.shows("> ")
        person.types("caf\u00e9\n")
        person.shows("> ")
        person.types("\x04")
        assert person.ends() == (0, "caf\u00e9 my my\ncaf\u00e9 my my\n")


def test_samples_on_a_terminal_are_divided_by_a_line(model_dir):
    flags = ("--source", model_dir, "--max_new_tokens", 2, "--prompt", "one", "--num_samples", 2)
    with Terminal(script(*flags, before=FIXED_TEXT)) as person:
        assert person.shows(f"one my my\n{'-' * 40}\none my my\n") == ""
        assert person.ends()[0] == 0


def test_at_a_terminal_a_prompt_is_asked_for_in_one_line(model_dir):
    with Terminal(script("--source", model_dir)) as person:
        person.shows("error: there is no prompt; give --prompt TEXT, ")
        assert person.ends()[0] == 2
