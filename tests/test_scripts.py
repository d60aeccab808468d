"""The scripts at their doors: what they do end to end, and what they say to mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doors import SCRIPTS, Door

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60


@pytest.fixture
def door(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.chdir(tmp_path)
    return Door(capsys)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run of seconds on data/text."""
    file = tmp_path / "config.py"
    file.write_text(
        """
from gpt2_jax.config import GPT2Config
from gpt2_jax.training.settings import DataSettings, MeshSettings, OptimizerSettings, TrainSettings

config = TrainSettings(
    run_dir="run",
    steps=3,
    model=GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2),
    data=DataSettings("data/text", sequence_length=16, batch_size=4, micro_batch_size=2),
    optimizer=OptimizerSettings(warmup_steps=1),
    mesh=MeshSettings(data=1),
)
"""
    )
    return file


@pytest.fixture
def dataset(door: Door, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, _ = door("prepare_custom_text", "--input", "text.txt", "--output", "data/text")
    assert code == 0
    assert "961 tokens from 1 file(s) in data/text: 865 for training, 96 for validation" in out
    return tmp_path / "data/text"


@pytest.mark.slow
def test_text_to_shards_to_run_to_samples(door: Door, dataset: Path, config_file: Path) -> None:
    code, out, err = door("train", "--config", config_file, "--steps", 4)
    assert (code, err) == (0, "")
    assert "validation loss" in out
    run = dataset.parents[1] / "run"
    assert {"config.json", "metrics.jsonl", "loss.png", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    assert json.loads((run / "config.json").read_text())["steps"] == 4

    flags = ("--source", "run", "--prompt", "The quick", "--max_new_tokens", 6, "--seed", 3)
    code, out, err = door("generate", *flags)
    assert (code, err) == (0, "")
    assert out.startswith("The quick")
    assert door("generate", *flags)[1] == out
    two = door("generate", *flags, "--num_samples", 2)[1]
    assert two.startswith(out)
    assert two.count("The quick") >= 2


def test_training_works_from_any_directory(
    door: Door, dataset: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = dataset.parents[1] / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, _, err = door("train", "--config", config_file, "--data.path", dataset)
    assert code == 0, err
    assert (elsewhere / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_checkpoint_cut_short_is_refused(door: Door, dataset: Path, config_file: Path) -> None:
    assert door("train", "--config", config_file)[0] == 0
    for file in (dataset.parents[1] / "run/checkpoints/3/params").rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            file.write_bytes(file.read_bytes()[:-5000])
    # In a process of its own, so that nothing but these lines may come.
    flags = [str(SCRIPTS / "generate.py"), "--source", "run", "--prompt", "x"]
    process = subprocess.run([sys.executable, *flags], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout) == (2, "")
    assert re.fullmatch(
        r"checkpoint .*/3 is left out: its file params/.* has \d+ bytes, not \d+\n"
        r"error: no checkpoint in .* is intact; .*\n",
        process.stderr,
    )


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ([], "--config is missing"),
        (["--config", "nowhere.py"], "config file nowhere.py does not exist"),
        (["--config", "config.py", "--optimizer.lerning_rate", "1"], "--optimizer.learning_rate?"),
        (["--config", "config.py", "--stesp", "1"], "did you mean --steps?"),
        (["--config", "config.py", "--steps", "many"], "--steps"),
        (["--config", "config.py", "--steps", "0"], "steps=0 must be"),
        (["--config", "config.py", "--data.path", "nowhere"], "nowhere does not exist"),
        (["--config", "config.py", "--data.batch_size", "5"], "not a multiple"),
        (["--config", "config.py", "--data.batch_size", "500"], "fewer than one batch"),
        (["--config", "config.py", "--model.vocab_size", "300"], "outside the vocabulary of 300"),
        (["--config", "config.py", "--run_dir", "text.txt"], "cannot write run directory"),
    ],
)
@pytest.mark.usefixtures("config_file")
def test_train_refuses(door: Door, dataset: Path, flags: list[str], rule: str) -> None:
    assert rule in door.refuses("train", *flags)
    assert not (dataset.parents[1] / "run").exists()


def test_a_misspelt_config_key_is_named(door: Door, config_file: Path) -> None:
    config_file.write_text(config_file.read_text().replace("warmup_steps", "warmup_stesp"))
    line = door.refuses("train", "--config", config_file)
    assert "'warmup_stesp'; did you mean 'warmup_steps'?" in line
    assert "line 10" in line


@pytest.mark.slow
@pytest.mark.usefixtures("dataset")
def test_a_run_directory_is_never_mixed(door: Door, config_file: Path, tmp_path: Path) -> None:
    assert door("train", "--config", config_file)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    line = door.refuses("train", "--config", config_file, "--seed", 5)
    assert "run already holds a run with other settings: seed was 1337, now 5;" in line
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    assert door("train", "--config", config_file, "--steps", 2, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 2


def test_text_that_is_not_utf8_is_refused(door: Door, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    line = door.refuses("prepare_custom_text", "--input", "latin.txt", "--output", "data/x")
    assert "latin.txt is not UTF-8 text: byte 0xe9 at offset 1" in line
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--input", "nowhere", "--output", "out"], "nowhere does not exist"),
        (["--input", ".", "--output", "out", "--pattern", "*.md"], "matches '*.md'"),
        (["--input", "empty.txt", "--output", "out"], "too little text"),
        (["--input", "empty.txt", "--output", "out", "--validation_fraction", "1"], "between"),
        (["--output", "out"], "--input"),
    ],
)
def test_prepare_refuses(door: Door, tmp_path: Path, flags: list[str], rule: str) -> None:
    (tmp_path / "empty.txt").touch()
    assert rule in door.refuses("prepare_custom_text", *flags)
    assert not (tmp_path / "out").exists()


def test_other_text_is_not_shakespeare(door: Door, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT)
    line = door.refuses("prepare_shakespeare", "--input", "other.txt")
    assert "other.txt is not tiny Shakespeare: its sha256 is" in line
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_every_script_explains_its_flags(door: Door, name: str) -> None:
    code, out, err = door(name, "--help")
    assert (code, err) == (0, "")
    assert "--help" in out


def test_help_shows_the_configs_values(door: Door, config_file: Path) -> None:
    _, out, _ = door("train", "--config", config_file, "--help")
    assert "optimizer steps (default: 3)" in out
    assert "--optimizer.learning_rate FLOAT" in out


@pytest.mark.slow
@pytest.mark.usefixtures("config_file")
def test_the_benchmark_measures_loop_and_memory_without_data(door: Door, tmp_path: Path) -> None:
    flags = ("--config", "config.py", "--output", "figures.json")
    code, out, _ = door("benchmark", "loop", *flags, "--measured_steps", 2, "--rounds", 1)
    assert code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ratio"] == pytest.approx(figures["loop"] / figures["step"])
    assert "loop / step" in out
    assert not (tmp_path / "run").exists()

    code, out, _ = door("benchmark", "memory", *flags, "--data.sequence_length", 8)
    assert code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    parts = figures["parameters and moments"], figures["temporary"]
    # 50,257 x 8 float32 numbers of the embedding alone, with two moments each.
    assert parts[0] > 3 * 4 * 50_257 * 8
    assert figures["in all"] == sum(parts)
    assert "gigabytes of each device" in out
    line = door.refuses("benchmark", "loop", *flags, "--rounds", 0)
    assert "rounds=0 must be" in line
