"""The benchmark of training: plain Flax is ours in other words, all take turns, ours must work."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import Door
from in_process import InProcess
from rich.console import Console

from gpt2_jax.benchmarks import contestants, matmul_peak, trainers
from gpt2_jax.benchmarks import train as module
from gpt2_jax.benchmarks.matmul_peak import MatmulPeak
from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.benchmarks.plain_flax import PlainGPT2, PlainTrainer, plain_loss
from gpt2_jax.benchmarks.random_start import random_tokens
from gpt2_jax.benchmarks.step_contest import Measured
from gpt2_jax.benchmarks.train import TrainFigures, measure_train
from gpt2_jax.benchmarks.train_load import PEERS, TITLES, TrainLoad, missing_packages
from gpt2_jax.benchmarks.train_report import (
    LEGEND,
    best_of_all,
    comparisons,
    print_train,
    step_table,
    versions,
)
from gpt2_jax.benchmarks.trainers import Program
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.model import GPT2
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.step import batch_loss
from gpt2_jax.training.throughput import flops_per_token

TINY = """
from gpt2_jax.config import GPT2Config
from gpt2_jax.training.settings import DataSettings, TrainSettings

config = TrainSettings(
    run_dir="run",
    steps=3,
    model=GPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=4, eos_token_id=None
    ),
    data=DataSettings("nowhere", sequence_length=16, batch_size=4, micro_batch_size=2),
)
"""


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.py"
    file.write_text(TINY)
    return file


@pytest.fixture
def load(tiny_file: Path) -> TrainLoad:
    return TrainLoad(str(tiny_file), batch=4, sequence_length=16, micro_batch_size=2)


@pytest.fixture
def jax_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def worker(threads: int, device: str | None = None, *, keep_memory: bool = False):
        del keep_memory
        if device == "cpu":
            return Worker(threads, device)
        return InProcess(trainers, "_trainer", "_resident_before")

    monkeypatch.setattr(module, "Worker", worker)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(contestants, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(matmul_peak, "_CPU", (64, 1))
    matmul_peak._product.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"pad_vocab_size_multiple": 64}]
)
def test_plain_flax_is_ours(load: TrainLoad, changes: dict) -> None:
    config = dataclasses.replace(load.config, n_layer=2, **changes)
    params = jax.tree.map(jnp.asarray, random_params(config))
    tokens_BT = random_tokens(load.settings("float32"))[0]
    key = jax.random.key(0)
    expected = jax.value_and_grad(
        lambda params: batch_loss(params, tokens_BT, key, model=GPT2(config))
    )(params)
    found = jax.value_and_grad(
        lambda params: plain_loss(params, tokens_BT, model=PlainGPT2(config, jnp.float32))
    )(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(expected[1]):
        its = dict(jax.tree_util.tree_leaves_with_path(found[1]))[path]
        error = np.linalg.norm(its - gradient) / np.linalg.norm(gradient)
        assert error < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_plain_flax_accumulates(load: TrainLoad) -> None:
    losses = []
    for micro_batch_size in (4, 2, 1):
        split = dataclasses.replace(load, micro_batch_size=micro_batch_size)
        trainer = PlainTrainer(split.settings("float32"))
        trainer.load()
        losses.append(trainer.steps(3))
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)
    assert losses[0][2] < losses[0][0]


def test_plain_flax_is_left_out_where_it_was_not_written_for(load: TrainLoad) -> None:
    settings = load.settings("float32")
    relu = dataclasses.replace(settings.model, activation_function="relu")
    with pytest.raises(ValueError, match="not relu"):
        PlainTrainer(dataclasses.replace(settings, model=relu))


@pytest.mark.slow
@pytest.mark.usefixtures("jax_in_process")
def test_eager_pytorch_does_the_same_step(load: TrainLoad) -> None:
    skip_without("reference", "hf")
    figures = measured_by(load.settings("float32"), "reference", "hf")
    # Losses near 5 are rounded to 5e-7, and AdamW divides small gradients by themselves.
    assert all(figures.loss_difference(name) < 1e-5 for name in ("reference", "hf"))
    first, second = figures.measured["ours"].losses
    assert abs(second - first) > 1e-3
    assert all(of.program.compile_seconds is None for of in of_torch(figures))


@pytest.mark.slow
@pytest.mark.usefixtures("jax_in_process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_contestants_do_the_same_step(load: TrainLoad, dtype: str) -> None:
    skip_without(*PEERS)
    figures = measured_by(load.settings(dtype), *PEERS)
    # bfloat16 has 8 bits, and everyone rounds in other places.
    bound = {"float32": 1e-5, "bfloat16": 5e-3}[dtype]
    assert all(figures.loss_difference(name) < bound for name in PEERS)
    for name in ("reference-compiled", "hf-compiled"):
        assert figures.measured[name].program.compile_seconds > 0


def skip_without(*names: str) -> None:
    missing = sorted({package for name in names for package in missing_packages(name)})
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")


def measured_by(settings: TrainSettings, *peers: str) -> TrainFigures:
    figures = measure_train(peers, settings, steps=1, rounds=2, threads=1)
    assert figures.left_out == {}
    assert list(figures.measured) == ["ours", *peers]
    for of in figures.measured.values():
        assert len(of.seconds) == len(of.cpu_seconds) == 2
        assert of.peak_bytes is None or of.peak_bytes >= 0
    return figures


def of_torch(figures: TrainFigures) -> list[Measured]:
    return [of for name, of in figures.measured.items() if name not in ("ours", "plain")]


@pytest.mark.usefixtures("jax_in_process")
def test_others_that_fail_are_left_out_and_ours_is_no_result(
    load: TrainLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("too\nlarge")

    monkeypatch.setattr("gpt2_jax.benchmarks.plain_flax.PlainTrainer", broken)
    settings = load.settings("float32")
    told: list[str] = []
    figures = measure_train(["plain"], settings, steps=1, rounds=1, threads=1, report=told.append)
    assert (list(figures.measured), figures.left_out) == (
        ["ours"],
        {"plain": "MemoryError: too large"},
    )
    assert (figures.faster("plain"), figures.best_pytorch) == (None, None)
    assert told[-2:] == ["gpt2_jax in float32: round 1 of 1", "gpt2_jax in float32: memory"]
    monkeypatch.setattr(module, "OurTrainer", broken)
    with pytest.raises(MemoryError):
        measure_train([], settings, steps=1, rounds=1, threads=1)


@pytest.mark.usefixtures("jax_in_process")
def test_matrix_products_are_measured() -> None:
    for dtype in ("float32", "bfloat16"):
        peak = matmul_peak.matmul_peak(dtype)
        assert peak.platform == jax.default_backend()
        assert peak.flops > 0


def made_up_figures() -> TrainFigures:
    program = Program("cpu", 123.45)
    settings = TrainLoad(micro_batch_size=1).settings("bfloat16")
    peak = 1024 * flops_per_token(settings.model, 512) / 0.5
    return TrainFigures(
        settings,
        {
            "ours": Measured(program, [5.0, 4.0], [2.0, 1.0, 4.0], peak_bytes=98_765_000_000),
            "plain": Measured(program, [5.0, 4.5], [4.0, 2.5, 4.0]),
            "reference": Measured(Program("cpu"), [5.0, 4.25], [2_000.0, 3.0, 3.0]),
            "hf-compiled": Measured(Program("gpu", 9.0), [5.0, 4.0], [2.5, 2.5, 2.5]),
        },
        [MatmulPeak("cpu", "cpu", flops) for flops in (peak, 2 * peak, peak / 2)],
        {"hf": "OSError: none"},
    )


def test_figures_are_medians() -> None:
    figures = made_up_figures()
    assert figures.tokens_per_second("ours") == 512
    # Of the rounds' own ratios: 2, 2.5, 1 and 1.25, 2.5, 0.625.
    assert (figures.faster("plain"), figures.faster("hf-compiled")) == (2.0, 1.25)
    assert figures.best_pytorch == "hf-compiled"
    # A step in half a second would be all of the peak; the rounds' own shares are all 1/4.
    assert figures.share_of_matmul("ours") == pytest.approx(0.25)
    assert figures.share_of_matmul("hf-compiled") is None
    assert figures.mfu("ours") is None
    h100 = [MatmulPeak("cpu", "NVIDIA H100 80GB HBM3", 1.0)] * 3
    mfu = dataclasses.replace(figures, peaks=h100).mfu("ours")
    assert mfu == pytest.approx(512 * flops_per_token(figures.settings.model, 512) / 989e12)
    assert figures.loss_difference("plain") == 0.5
    written = json.loads(json.dumps(figures.to_json()))
    assert written["contestants"]["plain"]["ours_is_faster_by"] == 2.0
    assert written["contestants"]["ours"]["seconds"] == [2.0, 1.0, 4.0]
    assert len(written["matmul_flops"]) == 3


def test_the_tables_fit_a_terminal() -> None:
    figures = made_up_figures()
    console = Console(width=80, file=io.StringIO())
    console.print(step_table(figures))
    text = console.file.getvalue()
    assert "…" not in text
    assert "2 sequences of 512 tokens a step, 2 passes" in text
    row = next(line for line in text.splitlines() if TITLES["ours"] in line)
    assert row.split() == ["gpt2_jax", "2,000", "512", "25.0%", "123.5", "98,765"]
    assert f"{TITLES['hf-compiled']}, gpu" in text
    float32 = dataclasses.replace(figures, settings=TrainLoad().settings("float32"))
    lines = [*comparisons(figures), *best_of_all([float32, figures])]
    assert [line.split()[-1] for line in lines if line] == [
        "410",
        "1.250",
        "2.000",
        "5.0e-01",
        "1.250",
    ]
    assert max(map(len, [*LEGEND.splitlines(), *lines])) <= 80
    assert best_of_all([figures]) == []
    print_train(console, [figures])
    assert "Hugging Face is left out: OSError: none" in console.file.getvalue()
    assert versions()["jax"] == jax.__version__


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_in_process", "tiny_file")
def test_the_benchmark_at_the_door(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    sizes = ("--model", "tiny.py", "--batch", 4, "--micro_batch_size", 2, "--sequence_length", 16)
    flags = ("--peers", "plain", "hf", "--rounds", 2, "--steps", 1, "--threads", 1)
    files = ("--output", "figures.json", "--plot", "speed.png")
    code, out, err = door("benchmark", "train", *sizes, *flags, *files)
    assert (code, err) == (0, "")
    assert "float32: 4 sequences of 16 tokens a step, 2 passes" in out
    assert "Hugging Face is left out: not installed; pip install torch transformers" in out
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["model"], written["batch"], written["rounds"]) == ("tiny.py", 4, 2)
    assert written["versions"]["jax"] == jax.__version__
    assert [measured["dtype"] for measured in written["measured"]] == ["float32", "bfloat16"]
    for measured, bound in zip(written["measured"], (1e-5, 5e-3), strict=True):
        ours, plain = (measured["contestants"][name] for name in ("ours", "plain"))
        assert plain["largest difference of losses"] < bound
        assert len(ours["seconds"]) == len(measured["matmul_flops"]) == 2
        assert ours["program"]["compile_seconds"] > 0
        assert ours["share_of_matmul"] > 0


@pytest.mark.usefixtures("jax_in_process", "tiny_file")
def test_ours_alone(door: Door) -> None:
    sizes = ("--model", "tiny.py", "--sequence_length", 16, "--dtype", "float32")
    code, out, err = door("benchmark", "train", *sizes, "--peers", "--rounds", 1, "--steps", 1)
    assert (code, err) == (0, "")
    assert "plain Flax" not in out


@pytest.mark.usefixtures("tiny_file")
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--batch", 0), "batch=0 must be a whole number of at least 1"),
        (("--batch", 8, "--micro_batch_size", 3), "not a multiple of micro_batch_size=3"),
        (("--micro_batch_size", 0), "micro_batch_size=0 must be"),
        (("--sequence_length", 2000), "more than the model's context of 1024"),
        (("--model", "tiny.py"), "more than the model's context of 32"),
        (("--model", "gpt3"), "unknown model size 'gpt3'"),
        (("--model", "nowhere.py"), "config file nowhere.py does not exist"),
        (("--dtype", "float16"), "float16"),
        (("--dtype",), "--dtype is empty"),
        (("--peers", "nanogpt"), "nanogpt"),
        (("--steps", 0), "steps=0 must be"),
        (("--rounds", -1), "rounds=-1 must be"),
        (("--threads", 0), "threads=0 must be from 1 to"),
        (("--output", "nowhere/figures.json"), "its folder does not exist"),
        (("--plot", "nowhere/speed.png"), "its folder does not exist"),
        (("--plot", "a", "--output", "a"), "--output and --plot are both a"),
        (("--config", "configs/demo.py"), "unknown flag --config"),
    ],
)
def test_nonsense_is_refused_at_once(door: Door, flags: tuple, complaint: str) -> None:
    assert complaint in door.refuses("benchmark", "train", *flags)


def test_the_flags_are_explained(door: Door) -> None:
    overview = door("benchmark", "--help")[1]
    assert "benchmark.py train" in overview
    assert "benchmark.py loop" in overview
    out = door("benchmark", "train", "--help")[1]
    assert all(flag in out for flag in ("--peers", "--micro_batch_size", "--plot"))
    assert "cannot be measured" in door.refuses("benchmark", "speed")
