"""The benchmark of generation: turns are fair, figures mean what they say, and faults show."""

import dataclasses
import importlib.util
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from doors import Door
from rich.console import Console
from safetensors.numpy import save_file

from gpt2_jax.benchmarks import contest as contest_module
from gpt2_jax.benchmarks import report
from gpt2_jax.benchmarks.contest import Contest
from gpt2_jax.benchmarks.engines import ENGINE_NAMES, ModelFiles, missing_packages
from gpt2_jax.benchmarks.figures import EngineFigures, Load, Measured, Turn, evaluate, weight_bytes
from gpt2_jax.benchmarks.first_word import first_word
from gpt2_jax.benchmarks.generation import check_fits
from gpt2_jax.benchmarks.model_files import write_model
from gpt2_jax.benchmarks.worker import Worker, cpu_cores
from gpt2_jax.config import GPT2Config, config_for_size
from gpt2_jax.errors import UserError
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.interop.pretrained import load_pretrained
from gpt2_jax.model import Params, param_shapes


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


def model_files(directory: Path, params: Params, config: GPT2Config) -> ModelFiles:
    directory.mkdir()
    state = state_dict_from_params(params, config)
    state = {name: np.ascontiguousarray(array) for name, array in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_to_json(config)))
    return ModelFiles(directory, config)


def measured_with(**changes: object) -> Measured:
    measured = Measured(
        Load(batch=2, prompt_tokens=3, new_tokens=5),
        tokens={"ours-f32": [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]},
        turns={
            "ours-f32": [
                Turn(0.1, 0.9, {"a": 1e6, "b": 3e6}),
                Turn(0.2, 1.0, {"a": 2e6, "b": 2e6}),
                Turn(0.7, 9.0, {"a": 9e6, "b": 4e6}),
            ]
        },
    )
    return dataclasses.replace(measured, **changes)


def test_figures_are_medians_of_all_rows(tiny_config: GPT2Config) -> None:
    measured = measured_with()
    assert measured.bandwidth == ("b", 3e6)
    of = evaluate(measured, tiny_config)["ours-f32"]
    assert of.first_token == 0.2
    assert of.overall == pytest.approx(2 * 5 / 1.0)
    assert of.decode == pytest.approx(2 * 4 / 0.8)
    steps_a_second = 4 / 0.8
    at_the_limit = 3e6 / weight_bytes(tiny_config, "f32")
    assert of.share_of_limit == pytest.approx(steps_a_second / at_the_limit)


def test_tokens_agree_up_to_the_first_other_one(tiny_config: GPT2Config) -> None:
    ours = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    # What is equal again after a difference no longer continues the same text.
    other = [[1, 2, 0, 4, 5], [6, 7, 8, 9, 0]]
    turns = [Turn(0.1, 0.9, {"a": 1e6})]
    both = {"ours-f32": turns, "hf-f32": turns}
    measured = measured_with(tokens={"ours-f32": ours, "hf-f32": other}, turns=both)
    of = evaluate(measured, tiny_config)
    assert (of["ours-f32"].same_tokens, of["hf-f32"].same_tokens) == (1.0, 0.7)
    alone = measured_with(tokens={"hf-f32": other}, turns={"hf-f32": turns})
    assert evaluate(alone, tiny_config)["hf-f32"].same_tokens is None


def test_decoding_lost_in_noise_has_no_rate(tiny_config: GPT2Config) -> None:
    measured = measured_with(turns={"ours-f32": [Turn(0.5, 0.4, {"a": 1e6})]})
    of = evaluate(measured, tiny_config)["ours-f32"]
    assert (of.decode, of.share_of_limit) == (None, None)


@pytest.mark.parametrize("size", ["gpt2", "gpt2-medium"])
def test_a_step_reads_every_matrix_once(size: str) -> None:
    config = config_for_size(size)
    shapes = param_shapes(config)
    kernels = [
        leaf.size
        for block in (shapes[f"h_{i}"] for i in range(config.n_layer))
        for layer in ("attn", "mlp")
        for module in block[layer].values()
        for name, leaf in module.items()
        if name == "kernel"
    ]
    weights = sum(kernels) + shapes["wte"]["embedding"].size
    assert weight_bytes(config, "f32") == 4 * weights
    assert weight_bytes(config, "bf16") == 2 * weights
    assert weight_bytes(config, "int8") == weights


class InProcess:
    """Stands for `Worker`: the same, in this process. Keeps each engine apart."""

    def __init__(self, _threads: int) -> None:
        self._engine: object = None

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine = None

    def run(self, function, *args):
        contest_module._engine = self._engine
        result = function(*args)
        self._engine = contest_module._engine
        return result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What made-up engines are asked for: (engine, rows, new tokens)."""
    made: list[tuple] = []

    def open_engine(name, _model):
        if name == "ct2-f32":
            raise OSError("no such\nlibrary")

        def generate(prompts, max_new_tokens):
            made.append((name, len(prompts), max_new_tokens))
            tokens = max_new_tokens - (name == "hf-f32")
            return [[7] * tokens for _ in prompts]

        return SimpleNamespace(device="cpu", generate=generate)

    monkeypatch.setattr(contest_module, "Worker", InProcess)
    monkeypatch.setattr(contest_module, "open_engine", open_engine)
    monkeypatch.setattr(contest_module, "read_bandwidth", lambda: made.append("memory") or {"m": 1})
    monkeypatch.setattr(contest_module, "SETTLE_SECONDS", 0)
    return made


def test_engines_take_turns(calls: list[tuple], tiny_config: GPT2Config) -> None:
    model = ModelFiles(Path("model"), tiny_config)
    with Contest(["ours-f32", "llama-f32"], model, threads=1) as contest:
        calls.clear()
        measured = contest.measure(Load(batch=2, prompt_tokens=3, new_tokens=5), rounds=2)
    # The first call of a turn only wakes the engine up.
    ours, our_turn = ("ours-f32", 2, 1), [("ours-f32", 2, 1), ("ours-f32", 2, 5)]
    llama, its_turn = ("llama-f32", 2, 1), [("llama-f32", 2, 1), ("llama-f32", 2, 5)]
    each_round = ["memory", ours, *our_turn, "memory", llama, *its_turn]
    assert calls == [*our_turn, *its_turn, *each_round, *each_round]
    assert [len(turns) for turns in measured.turns.values()] == [2, 2]
    assert contest.failures == {}
    assert contest.devices == {"ours-f32": "cpu", "llama-f32": "cpu"}


@pytest.mark.usefixtures("calls")
def test_others_that_fail_are_left_out_and_named(tiny_config: GPT2Config) -> None:
    names = ["ours-f32", "hf-f32", "ct2-f32"]
    with Contest(names, ModelFiles(Path("model"), tiny_config), threads=1) as contest:
        measured = contest.measure(Load(batch=1, prompt_tokens=3, new_tokens=5), rounds=1)
    assert list(measured.tokens) == list(measured.turns) == ["ours-f32"]
    assert contest.failures == {
        "ct2-f32": "OSError: no such library",
        "hf-f32": "ValueError: made 4 tokens where 5 were asked for",
    }


def test_our_own_failure_is_no_result(
    calls: list[tuple], tiny_config: GPT2Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_):
        raise OSError("ours")

    monkeypatch.setattr(contest_module, "open_engine", broken)
    contest = Contest(["ours-f32"], ModelFiles(Path("model"), tiny_config), threads=1)
    with pytest.raises(OSError, match="ours"), contest:
        pass
    assert calls == []


def test_a_worker_is_another_process_with_fewer_cores() -> None:
    with Worker(1, device="cpu") as worker:
        assert worker.run(os.getpid) != os.getpid()
        assert worker.run(cpu_cores) == 1
        assert worker.run(os.getenv, "OMP_NUM_THREADS") == "1"
        with pytest.raises(UserError, match="unknown model size 'huge'") as error:
            worker.run(config_for_size, "huge")
        assert "config_for_size" in error.value.__notes__[0]
        assert worker.run(abs, -1) == 1


def test_a_worker_that_dies_is_reported() -> None:
    with Worker(1) as worker, pytest.raises(RuntimeError, match="its process ended with 7"):
        worker.run(os._exit, 7)


def test_errors_that_cannot_be_sent_are_told() -> None:
    code = "class Odd(Exception): pass\nraise Odd('text')"
    with Worker(1) as worker, pytest.raises(RuntimeError, match=r"^Odd: text"):
        worker.run(exec, code, {})


def test_the_model_of_all_engines_has_no_end(
    tmp_path: Path, tiny_params: Params, tiny_config: GPT2Config
) -> None:
    ends = dataclasses.replace(tiny_config, eos_token_id=3)
    source = model_files(tmp_path / "source", tiny_params, ends)
    (tmp_path / "model").mkdir()
    files = write_model(tmp_path / "model", str(source.directory), None)
    params, config = load_pretrained(files.directory)
    assert config == files.config
    assert config.eos_token_id is None
    jax.tree.map(np.testing.assert_array_equal, params, tiny_params)


def test_the_table_fits_a_terminal() -> None:
    of = EngineFigures(12.3456, 123_456.7, 999.94, 0.999, 1.0)
    measured = measured_with()
    engines = dict.fromkeys(ENGINE_NAMES, of)
    table = report.speed_table(measured, engines, {"hf-bf16": "gpu"}, GPT2Config())
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "…" not in text
    row = next(line for line in text.splitlines() if "Hugging Face bf16 gpu" in line)
    # What runs elsewhere has another memory; and 99.9% is not all.
    assert row.split()[3:] == ["gpu", "12,346", "123,457", "999.9", "100%", *["1.00"] * 3]
    ours = next(line for line in text.splitlines() if "gpt2_jax int8" in line)
    assert ours.split()[5:7] == ["99%", "100%"]
    assert max(map(len, report.LEGEND.splitlines())) <= 80


def test_missing_packages_are_named_as_pip_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert missing_packages("llama-q8_0") == ["llama-cpp-python", "gguf"]
    assert missing_packages("ct2-int8") == ["ctranslate2"]
    assert missing_packages("ours-f32") == []


def test_a_load_must_fit_the_context(tiny_config: GPT2Config) -> None:
    check_fits(Load(1, 16, 16), tiny_config)
    with pytest.raises(UserError, match="more than the model's context of 32; take fewer"):
        check_fits(Load(1, 17, 16), tiny_config)


@pytest.mark.parametrize(
    ("body", "fails"),
    [
        ("print('0', flush=True); print('1 2'); open(cache + '.made', 'a').write('x')", False),
        ("print(end='0')", True),
        ("raise SystemExit(3)", True),
    ],
)
def test_the_first_word_is_what_follows_the_prompt(
    tmp_path: Path, tiny_config: GPT2Config, body: str, fails: bool
) -> None:
    script, cache = tmp_path / "generate.py", tmp_path / "cache"
    script.write_text(f"import os; cache = os.environ['JAX_COMPILATION_CACHE_DIR']; {body}")
    arguments = script, ModelFiles(tmp_path, tiny_config), "f32", cache
    if fails:
        with pytest.raises(RuntimeError, match="failed with exit status"):
            first_word(*arguments)
    else:
        assert all(seconds > 0 for seconds in first_word(*arguments))
        assert (tmp_path / "cache.made").read_text() == "xx"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-f32", "ct2-f32", "llama-f32"])
def test_others_continue_as_we_do(
    name, tmp_path: Path, tiny_params: Params, tiny_config: GPT2Config
) -> None:
    missing = missing_packages(name)
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    model = model_files(tmp_path / "model", tiny_params, tiny_config)
    with Contest(["ours-f32", name], model, cpu_cores()) as contest:
        measured = contest.measure(Load(batch=3, prompt_tokens=5, new_tokens=20), rounds=1)
    assert contest.failures == {}
    assert measured.tokens[name] == measured.tokens["ours-f32"]
    assert len({token for row in measured.tokens[name] for token in row}) > 3


@pytest.mark.slow
def test_the_benchmark_at_the_door(
    door: Door, tmp_path: Path, tiny_params: Params, tiny_config: GPT2Config
) -> None:
    model_files(tmp_path / "model", tiny_params, tiny_config)
    flags = ("--source", "model", "--engines", "ours-f32", "--batch", 2, "--rounds", 1)
    sizes = ("--prompt_tokens", 4, "--new_tokens", 6, "--output", "figures.json")
    code, out, err = door("benchmark", "generate", *flags, *sizes)
    assert (code, err) == (0, "")
    assert "batch 2, prompts of 4 tokens, 6 new ones" in out
    assert "gpt2_jax f32" in out
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [load["batch"] for load in written["loads"]] == [2]
    of = written["loads"][0]["engines"]["ours-f32"]
    assert of["same_tokens"] == 1
    assert of["overall"] == pytest.approx(2 * 6 / of["turns"][0]["last"])
    assert len(written["first_words"]["f32"]) == 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--batch", 0), "batch=0 must be a whole number of at least 1"),
        (("--batch",), "--batch is empty"),
        (("--rounds", 0), "rounds=0 must be"),
        (("--new_tokens", 1), "new_tokens=1 must be at least 2"),
        (("--threads", 0), "threads=0 must be from 1 to"),
        (("--engines", "vllm"), "vllm"),
        (("--config", "configs/demo.py"), "unknown flag --config"),
    ],
)
def test_nonsense_is_refused_at_once(door: Door, flags: tuple, complaint: str) -> None:
    assert complaint in door.refuses("benchmark", "generate", *flags)


def test_what_to_measure_is_explained(door: Door) -> None:
    code, out, err = door("benchmark", "--help")
    assert (code, err) == (0, "")
    assert all(what in out for what in ("train", "memory", "generate"))
    assert "--engines" in door("benchmark", "generate", "--help")[1]
    line = door.refuses("benchmark", "sampling", "--rounds", 3)
    assert "'sampling' cannot be measured; give one of train, loop, memory, generate" in line
