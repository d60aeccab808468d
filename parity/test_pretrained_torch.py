"""Weights that PyTorch saved: state dicts of all habits are read, pickled code never runs."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from gpt2_jax import load_pretrained
from gpt2_jax.errors import UserError
from parity.models import Models


def assert_same_params(params: dict, models: Models) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, models.params)


def test_keys_without_prefix_and_with_stored_masks(small: Models, tmp_path: Path) -> None:
    state = {
        name.removeprefix("transformer."): tensor
        for name, tensor in small.huggingface.state_dict().items()
    }
    mask = torch.ones(1, 1, 48, 48, dtype=torch.bool).tril()
    for layer in range(3):
        state[f"h.{layer}.attn.bias"] = mask
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "weights.pt")
    params, config = load_pretrained(tmp_path / "weights.pt", config=small.config)
    assert config == small.config
    assert_same_params(params, small)


def test_a_state_dict_inside_a_checkpoint(small: Models, tmp_path: Path) -> None:
    torch.save({"model": small.huggingface.state_dict(), "step": 3}, tmp_path / "checkpoint.pt")
    params, _ = load_pretrained(tmp_path / "checkpoint.pt", config=small.config)
    assert_same_params(params, small)


def test_half_precision_is_widened_exactly(small: Models, tmp_path: Path) -> None:
    state = {k: v.bfloat16() for k, v in small.huggingface.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    params, _ = load_pretrained(tmp_path / "weights.pt", config=small.config)
    kernel = params["h_0"]["attn"]["c_attn"]["kernel"]
    assert kernel.dtype == np.float32
    theirs = state["transformer.h.0.attn.c_attn.weight"].float().numpy()
    np.testing.assert_array_equal(kernel, theirs)


def test_the_size_of_a_bare_state_dict_is_told_by_its_shapes(
    gpt2_124m: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "gpt2" without a revision means this file, where it is there; nothing is downloaded.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("data").mkdir()
    torch.save(gpt2_124m.huggingface.state_dict(), "data/gpt2_weights.pt")
    params, config = load_pretrained("gpt2")
    assert config == gpt2_124m.config
    assert_same_params(params, gpt2_124m)


def test_a_bare_state_dict_of_no_published_size_needs_a_config(
    small: Models, tmp_path: Path
) -> None:
    torch.save(small.huggingface.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"3 layers .* config.json beside it"):
        load_pretrained(tmp_path / "weights.pt")


class Command:
    """Unpickles into a call of os.mkdir."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.directory),)


def test_pickled_code_is_refused_and_does_not_run(small: Models, tmp_path: Path) -> None:
    state = dict(small.huggingface.state_dict())
    state["transformer.wte.weight"] = Command(tmp_path / "harm")
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="refused"):
        load_pretrained(tmp_path / "weights.pt", config=small.config)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("contents", [b"", b"hello", None])
def test_damaged_files_are_named(small: Models, tmp_path: Path, contents: bytes | None) -> None:
    file = tmp_path / "weights.pt"
    torch.save(small.huggingface.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-2000] if contents is None else contents)
    with pytest.raises(UserError, match=r"weights.pt are damaged"):
        load_pretrained(file, config=small.config)


def test_things_other_than_tensors_are_named(small: Models, tmp_path: Path) -> None:
    torch.save({"weights": [1, 2]}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="'weights' is a list"):
        load_pretrained(tmp_path / "weights.pt", config=small.config)
