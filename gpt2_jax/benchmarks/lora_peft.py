"""The same LoRA step by Hugging Face's PEFT, transformers and PyTorch.

The adapter is float32; in bfloat16, products are those of `torch.autocast`.
"""

import contextlib
import warnings
from typing import Any

import numpy as np
from flax import traverse_util

from gpt2_jax.benchmarks.lora_trainers import Program, random_adapter, random_tokens
from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.benchmarks.worker import cpu_cores
from gpt2_jax.interop.huggingface import config_to_json, state_dict_from_params
from gpt2_jax.interop.peft_names import tensor_name
from gpt2_jax.training.settings import TrainSettings


class PeftTrainer:
    """PEFT's model and PyTorch's AdamW; on a GPU if PyTorch has one. See `Trainer`."""

    def __init__(self, settings: TrainSettings) -> None:
        import peft  # noqa: F401  imported before memory is looked at
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(cpu_cores())
        self._settings = settings
        self._cuda = torch.cuda.is_available()
        self.program = Program("gpu" if self._cuda else "cpu")

    def load(self) -> None:
        """See `Trainer`."""
        import torch

        optimizer = self._settings.optimizer
        self._model = _model(self._settings).to("cuda" if self._cuda else "cpu").train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
        tokens_NBT = torch.from_numpy(random_tokens(self._settings)).long()
        self._tokens_NBT = tokens_NBT.to(self._model.device)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def steps(self, count: int) -> list[float]:
        """See `Trainer`."""
        import torch

        losses = [self._step() for _ in range(count)]
        if self._cuda:
            torch.cuda.synchronize()
        return [float(loss) for loss in losses]

    def device_peak_bytes(self) -> int | None:
        """See `Trainer`."""
        import torch

        return torch.cuda.max_memory_allocated() if self._cuda else None

    def _step(self) -> Any:
        import torch

        total = torch.zeros((), device=self._model.device)
        for tokens_BT in self._tokens_NBT:
            with self._autocast():
                logits_BTV = self._model(tokens_BT[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten()
                )
            (loss / len(self._tokens_NBT)).backward()
            total += loss.detach() / len(self._tokens_NBT)
        torch.nn.utils.clip_grad_norm_(self._trained, self._settings.optimizer.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _autocast(self) -> contextlib.AbstractContextManager:
        import torch

        if self._settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._model.device.type, torch.bfloat16)


def _model(settings: TrainSettings) -> Any:
    """GPT-2 of transformers with PEFT's adapter, from the weights that the other side has."""
    import peft
    import transformers

    config, lora = settings.model, settings.lora
    assert lora is not None
    fields = {k: v for k, v in config_to_json(config).items() if k != "model_type"}
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields))
    network.load_state_dict(_tensors(state_dict_from_params(random_params(config), config)))
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float does as well
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        fan_in_fan_out=True,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(network, adapter)
    flat = traverse_util.flatten_dict(random_adapter(config, lora), sep=".")
    named = {
        tensor_name(path).replace(".weight", ".default.weight"): array.T
        for path, array in flat.items()
    }
    unknown = model.load_state_dict(_tensors(named), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"PEFT has no {unknown[0]}")
    return model


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}
