"""The same step by PyTorch, on a GPU if it has one, with the settings that are fastest there.

Weights are float32; in bfloat16, products are those of `torch.autocast`.
"""

import contextlib
import dataclasses
import os
import time
import warnings
from typing import Any

import numpy as np

from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.benchmarks.random_start import random_tokens
from gpt2_jax.benchmarks.trainers import Program
from gpt2_jax.benchmarks.worker import cpu_cores
from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.training.settings import TrainSettings


class TorchTrainer:
    """A model of PyTorch and its AdamW; a child has `_model` and `_logits`. See `Trainer`.

    Args:
      settings: the run.
      compiled: with `torch.compile` for model and loss.
    """

    def __init__(self, settings: TrainSettings, *, compiled: bool = False) -> None:
        # What an earlier run compiled must not shorten this one's compiling.
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        import torch

        if compiled:
            import torch._inductor.compile_fx
        torch.set_num_threads(cpu_cores())
        self._settings, self._is_compiled = settings, compiled
        self._cuda = torch.cuda.is_available()
        self.program = Program("gpu" if self._cuda else "cpu")
        self._first_step_done = False

    def load(self) -> None:
        """See `Trainer`."""
        import torch

        self._network = self._model().to("cuda" if self._cuda else "cpu").train()
        self._trained = [p for p in self._network.parameters() if p.requires_grad]
        self._optimizer = self._adamw()
        self._loss = torch.compile(self._eager_loss) if self._is_compiled else self._eager_loss
        self._tokens_NBT = torch.from_numpy(random_tokens(self._settings)).long().to(self._device)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def steps(self, count: int) -> list[float]:
        """See `Trainer`."""
        if self._is_compiled and not self._first_step_done:
            return self._first_steps(count)
        return self._timed_steps(count)[0]

    def device_peak_bytes(self) -> int | None:
        """See `Trainer`."""
        import torch

        return torch.cuda.max_memory_allocated() if self._cuda else None

    def _model(self) -> Any:
        """The module to train, with its first weights."""
        raise NotImplementedError

    def _logits(self, tokens_BT: Any) -> Any:
        """What `_network` says of tokens: [B, T, V]."""
        raise NotImplementedError

    @property
    def _device(self) -> Any:
        return self._trained[0].device

    def _adamw(self) -> Any:
        """PyTorch's fused AdamW, if the device has it; matrices and embeddings decay."""
        import torch

        optimizer = self._settings.optimizer
        groups = [
            {
                "params": [p for p in self._trained if p.ndim >= 2],
                "weight_decay": optimizer.weight_decay,
            },
            {"params": [p for p in self._trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {
            "lr": optimizer.learning_rate,
            "betas": (optimizer.beta1, optimizer.beta2),
            "eps": optimizer.epsilon,
        }
        try:
            return torch.optim.AdamW(groups, **options, fused=True)
        except RuntimeError:
            return torch.optim.AdamW(groups, **options)

    def _first_steps(self, count: int) -> list[float]:
        """Compiling takes what the first step takes more than the second."""
        with warnings.catch_warnings():
            # That no earlier run's knowledge is used, as asked for.
            warnings.filterwarnings("ignore", "dynamo_pgo force disabled", UserWarning)
            first, compiling = self._timed_steps(1)
        second, warm = self._timed_steps(1)
        self._first_step_done = True
        self.program = dataclasses.replace(self.program, compile_seconds=compiling - warm)
        return [*first, *second, *self._timed_steps(count - 2)[0]]

    def _timed_steps(self, count: int) -> tuple[list[float], float]:
        import torch

        start = time.perf_counter()
        losses = [self._step() for _ in range(count)]
        if self._cuda:
            torch.cuda.synchronize()
        return [float(loss) for loss in losses], time.perf_counter() - start

    def _step(self) -> Any:
        import torch

        total = torch.zeros((), device=self._device)
        for tokens_BT in self._tokens_NBT:
            with self._autocast():
                loss = self._loss(tokens_BT)
            (loss / len(self._tokens_NBT)).backward()
            total += loss.detach() / len(self._tokens_NBT)
        torch.nn.utils.clip_grad_norm_(self._trained, self._settings.optimizer.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _eager_loss(self, tokens_BT: Any) -> Any:
        import torch

        logits_BTV = self._logits(tokens_BT[:, :-1])
        return torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten()
        )

    def _autocast(self) -> contextlib.AbstractContextManager:
        import torch

        if self._settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)


class ReferenceTrainer(TorchTrainer):
    """The plain model of `parity/reference.py`."""

    def _model(self) -> Any:
        from parity.reference import ReferenceGPT2

        config = self._settings.model
        network = ReferenceGPT2(config)
        network.load_state_dict(_random_state(config))
        return network

    def _logits(self, tokens_BT: Any) -> Any:
        return self._network(tokens_BT)


class HuggingFaceTrainer(TorchTrainer):
    """The model of transformers, with PyTorch's own attention."""

    def __init__(self, settings: TrainSettings, *, compiled: bool = False) -> None:
        super().__init__(settings, compiled=compiled)
        import transformers  # noqa: F401  before memory is looked at

    def _model(self) -> Any:
        return huggingface_model(self._settings.model)

    def _logits(self, tokens_BT: Any) -> Any:
        return self._network(tokens_BT, use_cache=False).logits


def huggingface_model(config: GPT2Config) -> Any:
    """GPT-2 of transformers with `random_params`."""
    import transformers

    fields = {k: v for k, v in config_to_json(config).items() if k != "model_type"}
    fields["attn_implementation"] = "sdpa"
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields))
    network.load_state_dict(_random_state(config))
    return network


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as PyTorch has them."""
    import torch

    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}


def _random_state(config: GPT2Config) -> dict[str, Any]:
    return tensors(state_dict_from_params(random_params(config), config))
