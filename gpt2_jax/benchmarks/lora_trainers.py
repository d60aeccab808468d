"""Our side of `benchmark.py lora`, and what both sides start from: weights, adapter and tokens.

Everything is drawn from fixed seeds, so that each process makes the same by itself.
"""

import dataclasses
import time
from typing import Protocol

import jax
import numpy as np

from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.config import GPT2Config
from gpt2_jax.lora import Lora, lora_shapes, merge
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.model import Params
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a contestant before it runs; None where nothing can be known.

    Attributes:
      device: where it runs, "cpu" or "gpu".
      compile_seconds: to trace and compile the step.
      flops: of one pass and the optimizer, by XLA's analysis of the compiled program.
      planned_bytes: arguments, results and temporary buffers of the compiled program.
    """

    device: str
    compile_seconds: float | None = None
    flops: float | None = None
    planned_bytes: int | None = None


class Trainer(Protocol):
    """A contestant in its process."""

    program: Program

    def load(self) -> None:
        """Puts weights, adapter and tokens where they are used."""
        ...

    def steps(self, count: int) -> list[float]:
        """Does so many steps and waits for them; the loss of each before its update."""
        ...

    def device_peak_bytes(self) -> int | None:
        """The most an accelerator held; None for a CPU, whose memory is the process's."""
        ...


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


class OurTrainer:
    """The compiled step of `gpt2_jax.training`.

    Args:
      settings: with an adapter.
      train_all: train all weights, which start as base and adapter merged.
    """

    def __init__(self, settings: TrainSettings, *, train_all: bool) -> None:
        self._adapted, self._train_all = settings, train_all
        self._settings = dataclasses.replace(settings, lora=None) if train_all else settings
        start = time.perf_counter()
        engine = make_engine(self._settings, make_layout(self._settings))
        self._step = engine.lower_step(settings.data.sequence_length).compile()
        seconds = time.perf_counter() - start
        costs, memory = self._step.cost_analysis(), self._step.memory_analysis()
        planned = None
        if memory is not None:
            planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            planned += memory.output_size_in_bytes - memory.alias_size_in_bytes
        flops = None if costs is None else costs.get("flops")
        self.program = Program(jax.default_backend(), seconds, flops, planned)

    def load(self) -> None:
        """See `Trainer`."""
        lora = self._adapted.lora
        assert lora is not None
        config = self._settings.model
        base, trained = random_params(config), random_adapter(config, lora)
        if self._train_all:
            trained = jax.tree.map(np.asarray, merge(base, trained, lora))
        layout = make_layout(self._settings)
        engine = make_engine(self._settings, layout, None if self._train_all else base)
        self._key = jax.random.key(self._settings.seed)
        self._state = engine.first_state(self._key, trained)
        self._frozen: Params | None = engine.frozen
        self._tokens_NBT = jax.device_put(random_tokens(self._settings), layout.batch)
        jax.block_until_ready((self._state, self._frozen, self._tokens_NBT))

    def steps(self, count: int) -> list[float]:
        """See `Trainer`."""
        losses = []
        for _ in range(count):
            self._state, metrics = self._step(
                self._state, self._tokens_NBT, self._key, self._frozen
            )
            losses.append(metrics.loss)
        jax.block_until_ready(self._state)
        return [float(loss) for loss in losses]

    def device_peak_bytes(self) -> int | None:
        """See `Trainer`; what loading took counts too."""
        if self.program.device == "cpu":
            return None
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
