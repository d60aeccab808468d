"""The model that all engines load: a Hugging Face directory whose texts never end."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from gpt2_jax.benchmarks.engines import ModelFiles
from gpt2_jax.config import SIZES, GPT2Config, config_for_size
from gpt2_jax.interop.export import write_model_files
from gpt2_jax.interop.model_directory import CONFIG
from gpt2_jax.interop.pretrained import read_config
from gpt2_jax.model import Params, param_shapes
from gpt2_jax.sources import PRETRAINED, load_source

# Wide enough for the likeliest token to change from position to position, as in a trained model;
# freshly initialised ones repeat one token, and then an engine that goes wrong can look right.
_KERNEL_DEVIATION = 0.06


def write_model(directory: Path, source: str | None, model: str | None) -> ModelFiles:
    """Writes a model that tells of no token to end a text, and no tokenizer.

    Args:
      directory: it exists.
      source: as `load_source` takes it; None for random weights.
      model: a published size, as `load_source` takes it; for random weights, "gpt2" if None.

    Raises:
      UserError: if there is no such model.
    """
    if source is None:
        config = config_for_size(model or "gpt2")
        params = random_params(config)
    else:
        params, config = load_source(source, model=model)
    write_model_files(directory, params, dataclasses.replace(config, eos_token_id=None))
    return ModelFiles(directory, read_config(directory / CONFIG))


def weights_text(source: str | None, model: str | None) -> str:
    """Which weights `write_model` takes for these arguments, in a few words."""
    if source is None:
        return f"{model or 'gpt2'} with random weights"
    if source == PRETRAINED or source in SIZES:
        return f"{model or (source if source in SIZES else 'gpt2')} with pretrained weights"
    return source


def random_params(config: GPT2Config) -> Params:
    """Weights as if trained: no bias is zero, no scale is one, no token is always the likeliest."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean, deviation = {
            "scale": (1.0, 0.1),
            "bias": (0.0, 0.1),
            "embedding": (0.0, 0.02),
            "kernel": (0.0, _KERNEL_DEVIATION),
        }[path[-1].key]
        array = rng.standard_normal(leaf.shape, np.float32)
        return np.float32(mean) + np.float32(deviation) * array

    return jax.tree_util.tree_map_with_path(draw, param_shapes(config))
