"""One GPT-2 in three implementations, from random or pretrained weights."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import transformers

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop import huggingface, weight_files
from gpt2_jax.interop.pretrained import load_pretrained, locate
from gpt2_jax.model import Params
from parity.reference import ReferenceGPT2


@dataclasses.dataclass(frozen=True)
class Models:
    """The same weights three times. Hugging Face's is the model the others are held to."""

    huggingface: transformers.GPT2LMHeadModel
    reference: ReferenceGPT2
    params: Params
    config: GPT2Config


def random_models(config: GPT2Config, seed: int = 0) -> Models:
    """Initialises Hugging Face's model from a seed and gives its weights to the others.

    Biases and layer norms are drawn too, so that none of them hides behind a zero or a one.
    """
    torch.manual_seed(seed)
    theirs = transformers.GPT2LMHeadModel(huggingface_config(config))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(config.initializer_range * torch.randn_like(parameter))
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = huggingface.params_from_state_dict(state, config, "the random state dict")
    return _models(theirs, params, config)


def pretrained_models(
    source: str | Path, config: GPT2Config | None = None, revision: str | None = None
) -> Models:
    """Loads a source of `load_pretrained` with its reader, and with Hugging Face's own.

    Raises:
      UserError: as `load_pretrained` does.
    """
    path = locate(source, revision)
    params, config = load_pretrained(path, config=config)
    if path.is_dir():
        theirs = transformers.GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32)
    else:
        theirs = transformers.GPT2LMHeadModel(huggingface_config(config))
        state = huggingface.strip_prefix(weight_files.read_file(path), str(path))
        named = {
            name if name == "lm_head.weight" else huggingface.PREFIX + name: torch.tensor(array)
            for name, array in state.items()
            if name in huggingface.expected_shapes(config) or name == "lm_head.weight"
        }
        if config.tie_word_embeddings:
            named["lm_head.weight"] = named[f"{huggingface.PREFIX}wte.weight"]
        theirs.load_state_dict(named, strict=True)
    return _models(theirs, params, config)


def trained_models(params: Params, config: GPT2Config) -> Models:
    """Gives the weights of a model trained here to the PyTorch models."""
    theirs = transformers.GPT2LMHeadModel(huggingface_config(config))
    state = huggingface.state_dict_from_params(params, config)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return _models(theirs, params, config)


def huggingface_config(config: GPT2Config) -> transformers.GPT2Config:
    """The configuration as transformers has it."""
    fields = huggingface.config_to_json(config)
    return transformers.GPT2Config(**{k: v for k, v in fields.items() if k != "model_type"})


def _models(theirs: transformers.GPT2LMHeadModel, params: Params, config: GPT2Config) -> Models:
    reference = ReferenceGPT2(config)
    reference.load_state_dict(theirs.state_dict(), strict=True)
    return Models(theirs.eval(), reference.eval(), params, config)


def random_tokens(config: GPT2Config, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Uniform token ids, int64 [B, T]."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)
