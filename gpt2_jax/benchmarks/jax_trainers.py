"""Trainers on JAX: what they share, and ours."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.benchmarks.random_start import random_adapter, random_tokens
from gpt2_jax.benchmarks.trainers import Program
from gpt2_jax.lora import merge
from gpt2_jax.lora_settings import LoraSettings
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.settings import TrainSettings


class JaxTrainer:
    """A step that JAX compiled; a child has `load` and `_step`. See `Trainer`.

    Args:
      settings: the run.
      lower: traces the step.
    """

    def __init__(self, settings: TrainSettings, lower: Callable[[], jax.stages.Lowered]) -> None:
        self._settings = settings
        start = time.perf_counter()
        self._compiled = lower().compile()
        seconds = time.perf_counter() - start
        costs, memory = self._compiled.cost_analysis(), self._compiled.memory_analysis()
        planned = None
        if memory is not None:
            planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            planned += memory.output_size_in_bytes - memory.alias_size_in_bytes
        flops = None if costs is None else costs.get("flops")
        self.program = Program(jax.default_backend(), seconds, flops, planned)
        self._state: Any = None

    def load(self) -> None:
        """See `Trainer`; sets `_state`."""
        raise NotImplementedError

    def steps(self, count: int) -> list[float]:
        """See `Trainer`."""
        losses = [self._step() for _ in range(count)]
        jax.block_until_ready(self._state)
        return [float(loss) for loss in losses]

    def device_peak_bytes(self) -> int | None:
        """See `Trainer`; what loading took counts too."""
        if self.program.device == "cpu":
            return None
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def _step(self) -> jax.Array:
        """Replaces `_state`; returns the loss, which need not be ready."""
        raise NotImplementedError


class OurTrainer(JaxTrainer):
    """The compiled step of `gpt2_jax.training`.

    Args:
      settings: with an adapter, that is trained; all weights without.
      merged: an adapter that all weights have in them when they start.
    """

    def __init__(self, settings: TrainSettings, *, merged: LoraSettings | None = None) -> None:
        def lower() -> jax.stages.Lowered:
            engine = make_engine(settings, make_layout(settings))
            return engine.lower_step(settings.data.sequence_length)

        super().__init__(settings, lower)
        self._merged = merged

    def load(self) -> None:
        """See `Trainer`."""
        config, lora = self._settings.model, self._settings.lora
        base = trained = random_params(config)
        if lora is not None:
            trained = random_adapter(config, lora)
        elif self._merged is not None:
            adapter = random_adapter(config, self._merged)
            trained = jax.tree.map(np.asarray, merge(base, adapter, self._merged))
        layout = make_layout(self._settings)
        engine = make_engine(self._settings, layout, None if lora is None else base)
        self._key = jax.random.key(self._settings.seed)
        self._state = engine.first_state(self._key, trained)
        self._frozen = engine.frozen
        self._tokens_NBT = jax.device_put(random_tokens(self._settings), layout.batch)
        jax.block_until_ready((self._state, self._frozen, self._tokens_NBT))

    def _step(self) -> jax.Array:
        self._state, metrics = self._compiled(
            self._state, self._tokens_NBT, self._key, self._frozen
        )
        return metrics.loss
