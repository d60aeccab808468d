"""`scripts/validate.py`: its table, its exit status, and that it names what differs."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop import huggingface
from gpt2_jax.training.loop import train
from gpt2_jax.training.settings import DataSettings, MeshSettings, TrainSettings
from parity import reference
from parity.models import Models, pretrained_models

SCRIPT = Path(__file__).parents[1] / "scripts/validate.py"


def validate(capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str, str]:
    """Runs the script in this process; returns its exit status, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


@pytest.fixture
def weights(small: Models, tmp_path: Path) -> Path:
    """A model directory that transformers wrote, vocabulary large enough for GPT-2's tokens."""
    config = huggingface.config_to_json(small.config) | {"vocab_size": 50257, "n_embd": 6}
    torch.manual_seed(0)
    import transformers

    config.pop("model_type")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).save_pretrained(tmp_path)
    return tmp_path


def test_equal_models_exit_0_with_the_table(weights: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = validate(capsys, "--weights", str(weights))
    assert (code, err) == (0, "")
    for row in ("state dict", "JAX - Hugging Face", "JAX - reference", "greedy tokens"):
        assert row in out
    assert "DIFFERS" not in out


def test_a_bare_pt_state_dict_works_too(weights: Path, capsys: pytest.CaptureFixture) -> None:
    models = pretrained_models(weights)
    file = weights / "weights.pt"
    torch.save(models.huggingface.state_dict(), file)
    (weights / "model.safetensors").unlink()
    code, out, _ = validate(capsys, "--weights", str(file), "--max_new_tokens", "5")
    assert code == 0, out


def test_a_changed_weight_exits_1_and_is_named(
    weights: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = huggingface.params_from_state_dict

    def convert_wrongly(*args: object) -> dict:
        params = convert(*args)  # type: ignore[arg-type]
        bias = params["h_2"]["attn"]["c_attn"]["bias"]
        params["h_2"]["attn"]["c_attn"]["bias"] = bias.at[7].add(0.5)
        return params

    monkeypatch.setattr(huggingface, "params_from_state_dict", convert_wrongly)
    code, out, _ = validate(capsys, "--weights", str(weights))
    assert code == 1
    assert "transformer.h.2.attn.c_attn.bias differs by up to 5.0e-01" in out
    assert "DIFFERS" in out


@pytest.mark.slow
def test_layers_and_training_add_their_checks_table_and_files(
    weights: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    page, plot = tmp_path / "report.html", tmp_path / "trajectory.png"
    flags = ["--layers", "--report", str(page), "--training", "--steps", "1", "--plot", str(plot)]
    code, out, _ = validate(capsys, "--source", str(weights), *flags)
    assert code == 0, out
    for row in (
        "JAX's activations against Hugging Face",
        "JAX's activations against reference",
        *("embedding", "h_0", "h_2", "ln_f", "probabilities"),
        *("activations, JAX - Hugging Face", "gradients, JAX - reference", "exp_avg_sq"),
        "training: gradient norms",
    ):
        assert row in out
    assert "DIFFERS" not in out
    assert "h_2.residual" in page.read_text(encoding="utf-8")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_layers_name_the_first_place_that_differs(
    weights: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = reference.MLP.forward

    def forward_wrongly(self: reference.MLP, x_BTD: torch.Tensor) -> torch.Tensor:
        return 1.01 * forward(self, x_BTD)

    monkeypatch.setattr(reference.MLP, "forward", forward_wrongly)
    page = tmp_path / "report.html"
    code, out, _ = validate(capsys, "--weights", str(weights), "--layers", "--report", str(page))
    assert code == 1
    assert "the first that is more than rounding (!!): h_0.residual" in out
    assert "activations, JAX - reference: first at h_0.residual, by " in out
    assert "activations, JAX - Hugging Face: " not in out
    assert "h_0.residual" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One with another vocabulary than GPT-2's, which gets random tokens for prompts."""
    config = GPT2Config(
        vocab_size=61, n_positions=12, n_embd=8, n_layer=1, n_head=2, eos_token_id=None
    )
    settings = TrainSettings(
        run_dir=str(tmp_path / "run"),
        steps=1,
        model=config,
        data=DataSettings(sequence_length=8, batch_size=2, micro_batch_size=2),
        mesh=MeshSettings(data=1),
    )
    tokens_BT = np.arange(18, dtype=np.int32).reshape(2, 9)
    train(settings, lambda _, rows: tokens_BT[rows], tokens_BT)
    code, out, err = validate(capsys, "--source", settings.run_dir, "--layers")
    assert code == 0, out
    assert "a vocabulary of 61 is not GPT-2's" in err


def test_a_prompt_too_short_is_told(weights: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = validate(capsys, "--weights", str(weights), "--prompt", "")
    assert (code, out) == (2, "")
    assert "shorter than 2 tokens" in err


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--model", "gpt3"], "the sizes are gpt2, gpt2-medium"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--random_init", "--weights", "x.pt"], "drop one"),
        (["--random_init", "--source", "runs/demo"], "drop one"),
        (["--source", "nowhere"], "nowhere"),
        (["--source", ".", "--model", "gpt2-xl"], "goes with --source pretrained"),
        (["--weights", "gpt2"], "weights gpt2 do not exist"),
        (["--random_init", "--source", "gpt2", "--model", "gpt2-xl"], "drop one"),
        (["--random_init", "--report", "x.html"], "add --layers"),
        (["--random_init", "--plot", "x.png"], "add --training"),
        (
            ["--random_init", "--layers", "--report", "no/such/x.html"],
            "a directory that can be written",
        ),
        (["--random_init", "--training", "--steps", "0"], "at least 1"),
        (["--random_init", "--max_new_tokens", "0"], "at least 1"),
        (["--random_int"], "did you mean --random_init?"),
    ],
)
def test_mistakes_exit_2_with_one_line(
    capsys: pytest.CaptureFixture, flags: list[str], rule: str
) -> None:
    code, out, err = validate(capsys, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert rule in err
