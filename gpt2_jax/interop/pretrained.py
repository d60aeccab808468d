"""Pretrained weights from the Hugging Face hub, a directory or a file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.config import SIZES, GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.interop import hub, huggingface, weight_files
from gpt2_jax.model import Params

HUB_IDS = {name: f"openai-community/{name}" for name in SIZES}
DEFAULT_WEIGHTS = Path("data/gpt2_weights.pt")
"""Where this community keeps the 124M model's state dict; used for "gpt2" when it is there."""


def load_pretrained(
    source: str | Path = "gpt2",
    *,
    config: GPT2Config | None = None,
    revision: str | None = None,
) -> tuple[Params, GPT2Config]:
    """Loads a GPT-2 that someone else trained.

    Args:
      source: one of

        - a size, "gpt2" to "gpt2-xl": from `openai-community` on the hub, through its cache
          (HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured); for "gpt2" without a revision
          `data/gpt2_weights.pt` comes first, if there is one;
        - a Hugging Face model directory: config.json and safetensors, whole or in shards;
        - a file: .safetensors, or a .pt state dict.
      config: the architecture, for a file with no config.json beside it; by default it is told
        by the shapes, if they are those of a published size. A directory's own config must
        have the same shapes.
      revision: branch, tag or commit on the hub.

    Returns:
      The float32 parameter tree, and the configuration.

    Raises:
      UserError: if the source is unknown, out of reach or damaged; if a weight is missing,
        extra or of the wrong shape; if the config has a feature that is not supported.
    """
    path = locate(source, revision)
    if path.is_dir():
        state, stored = weight_files.read_directory(path), read_config(path / "config.json")
        if config is not None and _sizes(config) != _sizes(stored):
            raise UserError(
                f"{path} holds a model of {_sizes(stored)}, not of {_sizes(config)}; "
                f"name the size it has, or none"
            )
        config = stored
    else:
        state = weight_files.read_file(path)
        config = config or config_beside(path) or _config_by_shapes(state, path)
    return huggingface.params_from_state_dict(state, config, str(path)), config


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The directory or file of a source, downloaded first if it is a size.

    Raises:
      UserError: if the source is unknown, or the hub out of reach.
    """
    if source in SIZES:
        if source == "gpt2" and revision is None and DEFAULT_WEIGHTS.is_file():
            return DEFAULT_WEIGHTS
        return hub.download(HUB_IDS[str(source)], revision)
    path = Path(source)
    if revision is not None:
        raise UserError(f"revision={revision!r} is for models from the hub; {source} is local")
    if not path.exists() and isinstance(source, Path):
        raise UserError(f"weights {source} do not exist; give a file or a directory")
    if not path.exists():
        raise UserError(
            f"there is no pretrained model {str(source)!r}: it is neither a file or directory "
            f"here nor one of the sizes {', '.join(SIZES)}"
        )
    return path


def read_config(file: Path) -> GPT2Config:
    """Reads a Hugging Face config.json.

    Raises:
      UserError: if it is missing, no JSON, or of a model that is not supported.
    """
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; it must lie beside the weights") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); get it anew") from None
    return huggingface.config_from_json(fields, str(file))


def config_beside(weights: Path) -> GPT2Config | None:
    """The Hugging Face config in the directory of a weight file, if there is one."""
    file = weights.parent / "config.json"
    return read_config(file) if file.is_file() else None


def _config_by_shapes(state: Mapping[str, np.ndarray], source: Path) -> GPT2Config:
    """The published size that a bare state dict has the shapes of; heads leave no trace in it."""
    given = huggingface.strip_prefix(state, str(source))
    shapes = {name: array.shape for name, array in given.items()}
    layers = len({name.split(".")[1] for name in given if name.startswith("h.")})
    for config in SIZES.values():
        tables = {
            "wte.weight": (config.vocab_size, config.n_embd),
            "wpe.weight": (config.n_positions, config.n_embd),
        }
        if layers == config.n_layer and tables.items() <= shapes.items():
            head = given.get("lm_head.weight")
            tied = head is None or np.array_equal(head, given["wte.weight"])
            return dataclasses.replace(config, tie_word_embeddings=tied)
    raise UserError(
        f"{source} has {layers} layers and wte.weight {shapes.get('wte.weight')}, which is no "
        f"published size; put the model's Hugging Face config.json beside it"
    )


def _sizes(config: GPT2Config) -> str:
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    return " ".join(f"{name}={getattr(config, name)}" for name in names)
