"""The same LoRA step by Hugging Face's PEFT, transformers and PyTorch; the adapter is float32."""

import warnings
from typing import Any

from flax import traverse_util

from gpt2_jax.benchmarks.random_start import random_adapter
from gpt2_jax.benchmarks.torch_trainers import HuggingFaceTrainer, huggingface_model, tensors
from gpt2_jax.interop.peft_names import tensor_name
from gpt2_jax.training.settings import TrainSettings


class PeftTrainer(HuggingFaceTrainer):
    """GPT-2 of transformers with PEFT's adapter, from the weights that the other side has."""

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__(settings)
        import peft  # noqa: F401  before memory is looked at

    def _model(self) -> Any:
        import peft

        config, lora = self._settings.model, self._settings.lora
        assert lora is not None
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
            model = peft.get_peft_model(huggingface_model(config), adapter)
        flat = traverse_util.flatten_dict(random_adapter(config, lora), sep=".")
        named = {
            tensor_name(path).replace(".weight", ".default.weight"): array.T
            for path, array in flat.items()
        }
        unknown = model.load_state_dict(tensors(named), strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"PEFT has no {unknown[0]}")
        return model
