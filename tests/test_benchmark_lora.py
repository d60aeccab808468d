"""The benchmark of LoRA: all do the same step, by turns, and ours computes no frozen gradient."""

import dataclasses
import importlib.util
import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from doors import Door
from in_process import InProcess
from rich.console import Console

from gpt2_jax.benchmarks import contestants, lora_load, trainers
from gpt2_jax.benchmarks import lora as lora_module
from gpt2_jax.benchmarks.lora import LoraFigures, measure_lora
from gpt2_jax.benchmarks.lora_load import TITLES, LoraLoad, missing_packages
from gpt2_jax.benchmarks.lora_report import LEGEND, comparisons, step_table
from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.benchmarks.random_start import random_tokens
from gpt2_jax.benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from gpt2_jax.benchmarks.step_contest import Measured
from gpt2_jax.benchmarks.trainers import Program
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.config import GPT2Config
from gpt2_jax.lora_settings import TARGETS, LoraSettings
from gpt2_jax.model import GPT2, apply
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.loss import cross_entropy
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.settings import DataSettings, TrainSettings

# Wide beside its vocabulary and its sequences: nearly all is spent in the layers' products.
WIDE = GPT2Config(
    vocab_size=200,
    n_positions=16,
    n_embd=128,
    n_layer=1,
    n_head=4,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    eos_token_id=None,
)
D, F, V = WIDE.n_embd, WIDE.mlp_width, WIDE.vocab_size
FROZEN_SHAPES = {tuple(sorted(shape)) for shape in ((D, 3 * D), (D, D), (D, F), (V, D))}


def compiled(**changes: object):
    """The step of WIDE on one device; 4 x 12 tokens, a number that is no width of it."""
    data = DataSettings("unused", sequence_length=12, batch_size=4, micro_batch_size=4)
    settings = dataclasses.replace(LoraLoad().settings("float32"), model=WIDE, data=data, **changes)
    return make_engine(settings, make_layout(settings)).lower_step(12).compile()


def weight_products(program) -> list[tuple[int, ...]]:
    """Of all matrix products and scatters, the results of a weight's shape, either way round."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|scatter|custom-call)\(", program.as_text())
    shapes = [tuple(int(size) for size in shape.split(",") if size) for shape in found]
    return [shape for shape in shapes if tuple(sorted(shape)) in FROZEN_SHAPES]


def test_the_compiled_step_holds_no_gradient_of_a_frozen_weight() -> None:
    full = compiled(lora=None)
    # The search finds what it looks for: every kernel, and the table, which is used twice.
    assert len(weight_products(full)) >= 4 * WIDE.n_layer + 2
    assert {tuple(sorted(shape)) for shape in weight_products(full)} == FROZEN_SHAPES
    all_flops = full.cost_analysis()["flops"]
    for targets, dtype in ((LoraSettings().targets, "float32"), (TARGETS, "bfloat16")):
        program = compiled(lora=LoraSettings(targets, rank=4), dtype=dtype)
        assert weight_products(program) == []
        # Forward and one of two products backward are left, and next to no optimizer.
        assert program.cost_analysis()["flops"] / all_flops < 0.72


def in_process(_threads: int, device: str | None = None, **_: object) -> InProcess:
    del device
    return InProcess(trainers, "_trainer", "_resident_before")


@pytest.fixture
def ours_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def worker(threads: int, device: str | None = None, *, keep_memory: bool):
        assert keep_memory == (device is None)  # as finetune_lora.py does, and PEFT does not
        return Worker(threads, device) if device == "cpu" else in_process(threads)

    monkeypatch.setattr(lora_module, "Worker", worker)
    monkeypatch.setattr(contestants, "SETTLE_SECONDS", 0)


def tiny_settings(config: GPT2Config) -> TrainSettings:
    return dataclasses.replace(
        LoraLoad(targets=TARGETS, rank=4).settings("float32"),
        model=config,
        data=DataSettings("unused", sequence_length=16, batch_size=4, micro_batch_size=2),
    )


@pytest.fixture(scope="session")
def small_config(shallow_config: GPT2Config) -> GPT2Config:
    """With room for the benchmark's default length."""
    return dataclasses.replace(shallow_config, n_positions=512)


@pytest.mark.slow
@pytest.mark.usefixtures("ours_in_process")
def test_all_contestants_do_the_same_step(small_config: GPT2Config) -> None:
    missing = missing_packages("peft")
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    settings = tiny_settings(small_config)
    figures = measure_lora(["lora", "full", "peft"], settings, steps=1, rounds=2, threads=1)
    assert figures.left_out == {}
    # Losses near 5 are rounded to 5e-7, and AdamW divides small gradients by themselves.
    assert figures.loss_difference("peft") < 1e-5
    assert figures.loss_difference("full") < 1e-5
    first, second = figures.measured["lora"].losses
    assert abs(second - first) > 1e-3
    # It was no comparison of bare models.
    tokens_BT = random_tokens(settings).reshape(4, -1)
    logits_BTV = apply(GPT2(small_config), random_params(small_config), tokens_BT[:, :-1])
    bare = cross_entropy(logits_BTV, jnp.asarray(tokens_BT[:, 1:])).mean()
    assert abs(first - bare) > 1e-3
    for of in figures.measured.values():
        assert len(of.seconds) == len(of.cpu_seconds) == 2
        assert of.peak_bytes is None or of.peak_bytes >= 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What made-up contestants are asked for: (contestant, steps)."""
    made: list[tuple[str, int]] = []

    class Made:
        program = Program("gpu")

        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> None:
            made.append((self.name, 0))

        def steps(self, count: int) -> list[float]:
            made.append((self.name, count))
            if self.name == "peft" and len(made) > 8:
                raise OSError("no\nmemory")
            return [1.0] * count

        def device_peak_bytes(self) -> int:
            return 7

    def trainer(settings: TrainSettings, **_: object) -> Made:
        return Made("full" if settings.lora is None else "lora")

    monkeypatch.setattr(lora_module, "Worker", in_process)
    monkeypatch.setattr(lora_module, "OurTrainer", trainer)
    monkeypatch.setattr("gpt2_jax.benchmarks.lora_peft.PeftTrainer", lambda _: Made("peft"))
    monkeypatch.setattr(contestants, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(lora_module, "missing_packages", lambda _: [])
    return made


def test_contestants_take_turns(calls: list[tuple[str, int]]) -> None:
    settings = LoraLoad().settings("float32")
    figures = measure_lora(["lora", "full"], settings, steps=3, rounds=2, threads=1)
    begun = [("lora", 0), ("lora", 2), ("full", 0), ("full", 2)]
    assert calls == [*begun, *[("lora", 3), ("full", 3)] * 2]
    assert [of.peak_bytes for of in figures.measured.values()] == [7, 7]
    assert figures.left_out == {}


@pytest.mark.usefixtures("calls")
def test_peft_that_fails_is_left_out_and_named() -> None:
    settings = LoraLoad().settings("float32")
    figures = measure_lora(["lora", "full", "peft"], settings, steps=3, rounds=2, threads=1)
    assert list(figures.measured) == ["lora", "full"]
    assert figures.left_out == {"peft": "OSError: no memory"}
    assert (figures.ratio("peft", "lora"), figures.loss_difference("peft")) == (None, None)


def test_our_own_failure_is_no_result(
    calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: TrainSettings, **_: object) -> None:
        raise RuntimeError("no memory") if settings.lora is None else OSError("ours")

    monkeypatch.setattr(lora_module, "OurTrainer", broken)
    settings = LoraLoad().settings("float32")
    with pytest.raises(OSError, match="ours"):
        measure_lora(["lora"], settings, steps=1, rounds=1, threads=1)
    assert calls == []
    # But an adapter may well be trained where there is no room for all weights.
    figures = measure_lora(["peft", "full"], settings, steps=1, rounds=1, threads=1)
    assert figures.left_out == {"full": "RuntimeError: no memory"}
    assert list(figures.measured) == ["peft"]


def made_up_figures() -> LoraFigures:
    program = Program("cpu", 123.45, 9_876.5e9, 98_765_000_000)
    return LoraFigures(
        LoraLoad(micro_batch_size=4).settings("bfloat16"),
        {
            "lora": Measured(program, [5.0, 4.0], [2.0, 1.0, 3.0], peak_bytes=98_765_000_000),
            "full": Measured(
                dataclasses.replace(program, flops=2 * program.flops), [5.5, 1.0], [4.0, 2.5, 4.0]
            ),
            "peft": Measured(Program("cpu"), [5.0, 4.25], [2_000.0, 3.0, 3.0]),
        },
        {},
    )


def test_figures_are_medians() -> None:
    figures = made_up_figures()
    assert figures.measured["lora"].step_seconds == 2.0
    # Of the rounds' own ratios: 0.5, 0.4, 0.75 and 1000, 3, 1.
    assert (figures.ratio("lora", "full"), figures.ratio("peft", "lora")) == (0.5, 3.0)
    assert figures.flops_ratio == 0.5
    # All weights go another way after the first step.
    assert (figures.loss_difference("full"), figures.loss_difference("peft")) == (0.5, 0.25)
    written = json.loads(json.dumps(figures.to_json()))
    assert written["peft / lora"] == 3.0
    assert written["contestants"]["lora"]["seconds"] == [2.0, 1.0, 3.0]
    assert written["contestants"]["full"]["program"]["compile_seconds"] == 123.45


def test_the_table_fits_a_terminal() -> None:
    figures = made_up_figures()
    console = Console(width=80, file=io.StringIO())
    console.print(step_table(figures))
    text = console.file.getvalue()
    assert "…" not in text
    assert "8 sequences of 512 tokens a step, 2 passes" in text
    row = next(line for line in text.splitlines() if TITLES["lora"] in line)
    cells = ["2,000", "2,048", "16.7", "123.5", "9,876.5", "98,765", "98,765"]
    assert row.split()[2:] == cells
    lines = comparisons(figures)
    assert len(lines) == 5
    assert lines[2].split()[-1] == "3.00"
    assert max(map(len, [*LEGEND.splitlines(), *lines])) <= 80


def test_what_a_process_held_at_most_is_told() -> None:
    before = resident_bytes()
    if before is None or not reset_peak():
        pytest.skip("only Linux tells what a process holds")
    size = 100_000_000
    np.ones(size, np.uint8)
    # The kernel counts a few pages late.
    assert 0.95 * size < peak_resident_bytes() - before < 1.5 * size
    assert resident_bytes() - before < 0.5 * size


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


@pytest.mark.usefixtures("ours_in_process")
def test_the_benchmark_at_the_door(
    door: Door, tmp_path, small_config: GPT2Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_load, "config_for_size", lambda _: small_config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    sizes = ("--batch", 4, "--micro_batch_size", 2, "--sequence_length", 16, "--rank", 4)
    flags = ("--targets", *TARGETS, "--rounds", 2, "--steps", 1, "--threads", 1)
    dtype = ("--dtype", "float32")
    code, out, err = door("benchmark", "lora", *sizes, *flags, *dtype, "--output", "figures.json")
    assert (code, err) == (0, "")
    assert "float32: 4 sequences of 16 tokens a step, 2 passes" in out
    reason = "not installed; pip install torch transformers peft"
    assert f"PEFT LoRA is left out: {reason}" in out
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["rank"], written["targets"], written["rounds"]) == (4, list(TARGETS), 2)
    (measured,) = written["measured"]
    assert measured["left_out"] == {"peft": reason}
    lora, full = (measured["contestants"][name] for name in ("lora", "full"))
    assert measured["largest difference of losses"]["full"] < 1e-5
    assert len(lora["seconds"]) == 2
    assert lora["program"]["flops"] < full["program"]["flops"]
    assert lora["program"]["planned_bytes"] < full["program"]["planned_bytes"]
    assert lora["program"]["compile_seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--batch", 0), "batch=0 must be a whole number of at least 1"),
        (("--batch", 8, "--micro_batch_size", 3), "not a multiple of micro_batch_size=3"),
        (("--micro_batch_size", 0), "micro_batch_size=0 must be"),
        (("--sequence_length", 2000), "more than the model's context of 1024"),
        (("--rank", 0), "rank=0 must be"),
        (("--alpha", 0), "alpha=0.0 must be"),
        (("--targets", "lm_head"), "'lm_head' is no linear layer"),
        (("--targets",), "targets is empty"),
        (("--model", "gpt3"), "gpt3"),
        (("--dtype", "float16"), "float16"),
        (("--dtype",), "--dtype is empty"),
        (("--steps", 0), "steps=0 must be"),
        (("--rounds", -1), "rounds=-1 must be"),
        (("--threads", 0), "threads=0 must be from 1 to"),
        (("--contestants", "unsloth"), "unsloth"),
        (("--contestants",), "--contestants is empty"),
        (("--config", "configs/demo.py"), "unknown flag --config"),
    ],
)
def test_nonsense_is_refused_at_once(door: Door, flags: tuple, complaint: str) -> None:
    assert complaint in door.refuses("benchmark", "lora", *flags)


def test_nothing_to_measure_is_refused(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    line = door.refuses("benchmark", "lora", "--contestants", "peft")
    assert "no contestant is left: peft: not installed" in line


def test_the_flags_are_explained(door: Door) -> None:
    assert "benchmark.py lora" in door("benchmark", "--help")[1]
    out = door("benchmark", "lora", "--help")[1]
    assert all(flag in out for flag in ("--contestants", "--micro_batch_size", "--targets"))
