"""What `benchmark.py lora` measures: one optimizer step of each contestant, as plain values."""

import dataclasses
import importlib.util
from typing import Literal, get_args

from gpt2_jax.config import GPT2Config, check_positive_int, config_for_size
from gpt2_jax.errors import UserError
from gpt2_jax.lora_settings import LoraSettings, adapted_layers
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
    sequences_per_pass,
)

Contestant = Literal["lora", "full", "peft"]
CONTESTANTS: tuple[Contestant, ...] = get_args(Contestant)
TITLES: dict[Contestant, str] = {
    "lora": "gpt2_jax LoRA",
    "full": "gpt2_jax full",
    "peft": "PEFT LoRA",
}
Dtype = Literal["bfloat16", "float32"]

_PEFT_PACKAGES = ("torch", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class LoraLoad:
    """The step that all contestants do; the defaults are those of finetune_lora.py.

    Raises:
      UserError: if a value is out of its range, or two don't go together.
    """

    model: str = "gpt2"
    """size of the model, whose weights are random: gpt2, gpt2-medium, gpt2-large or gpt2-xl"""
    batch: int = 8
    """sequences in a step"""
    sequence_length: int = 512
    """T, tokens in each"""
    micro_batch_size: int | None = None
    """sequences in one pass, gradients are accumulated; None takes finetune_lora.py's default"""
    rank: int = 8
    """R, the inner width of the adapter's two matrices"""
    alpha: float = 8.0
    """strength of the adapter, A B is multiplied by alpha / R"""
    targets: tuple[str, ...] = ("attn.c_attn",)
    """names of the layers to adapt"""

    def __post_init__(self) -> None:
        for name in ("batch", "sequence_length", "rank"):
            check_positive_int(name, getattr(self, name))
        check_positive_int("micro_batch_size", self.pass_size)
        if self.batch % self.pass_size:
            raise UserError(
                f"batch={self.batch} is not a multiple of micro_batch_size={self.pass_size}; "
                f"choose sizes that divide"
            )
        longest = self.config.n_positions
        if self.sequence_length > longest:
            raise UserError(
                f"sequence_length={self.sequence_length} is more than the model's context of "
                f"{longest}; take less"
            )
        adapted_layers(self.config, self.adapter)

    @property
    def config(self) -> GPT2Config:
        """The model, without dropout."""
        size = config_for_size(self.model)
        return dataclasses.replace(size, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)

    @property
    def adapter(self) -> LoraSettings:
        """The adapter, without dropout."""
        return LoraSettings(self.targets, self.rank, self.alpha)

    @property
    def pass_size(self) -> int:
        """Sequences in one pass."""
        if self.micro_batch_size is None:
            return sequences_per_pass(self.batch, 1, self.sequence_length)
        return self.micro_batch_size

    def settings(self, dtype: Dtype) -> TrainSettings:
        """The run on one device, with an adapter; without it, all weights are trained."""
        return TrainSettings(
            run_dir="unused",
            steps=500,
            model=self.config,
            data=DataSettings("unused", self.sequence_length, self.batch, self.pass_size),
            optimizer=OptimizerSettings(
                learning_rate=1e-3,
                final_learning_rate=1e-3,
                warmup_steps=0,
                beta2=0.999,
                weight_decay=0.0,
            ),
            mesh=MeshSettings(data=1),
            init_from=self.model,
            lora=self.adapter,
            dtype=dtype,
        )


def missing_packages(name: Contestant) -> list[str]:
    """What pip would have to install for a contestant."""
    wanted = _PEFT_PACKAGES if name == "peft" else ()
    return [package for package in wanted if importlib.util.find_spec(package) is None]
