"""`scripts/validate.py`: its table, its exit status, and that it names what differs."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from gpt2_jax.interop import huggingface
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


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--model", "gpt3"], "the sizes are gpt2, gpt2-medium"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--random_init", "--weights", "x.pt"], "drop one"),
        (["--random_init", "--prompt", ""], "shorter than 2 tokens"),
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
