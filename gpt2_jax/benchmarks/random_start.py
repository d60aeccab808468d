"""What the trainers of a benchmark start from, beside `model_files.random_params`.

Everything is drawn from fixed seeds, so that each process makes the same by itself.
"""

import jax
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.lora import Lora, lora_shapes
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.training.settings import TrainSettings


def random_adapter(config: GPT2Config, settings: LoraSettings) -> Lora:
    """An adapter in the middle of its training: B is not zero, so that it matters."""
    rng = np.random.default_rng(1)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        deviation = leaf.shape[0] ** -0.5 if path[-1].key == "lora_a" else 0.1
        return np.float32(deviation) * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, lora_shapes(config, settings))


def random_tokens(settings: TrainSettings) -> np.ndarray:
    """The batch of every step: int32 [N, B, T + 1], N passes of B sequences."""
    data = settings.data
    passes = data.batch_size // data.micro_batch_size
    shape = (passes, data.micro_batch_size, data.sequence_length + 1)
    rng = np.random.default_rng(2)
    return rng.integers(0, settings.model.vocab_size, shape, dtype=np.int32)
