"""What `benchmark.py train` measures: one optimizer step of all weights, as plain values."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Literal, get_args

from gpt2_jax.config import GPT2Config, check_positive_int, config_for_size
from gpt2_jax.errors import UserError
from gpt2_jax.training.config_files import load_config_file
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
)

Peer = Literal["plain", "reference", "reference-compiled", "hf", "hf-compiled"]
PEERS: tuple[Peer, ...] = get_args(Peer)
Contestant = Literal["ours"] | Peer
TITLES: dict[Contestant, str] = {
    "ours": "gpt2_jax",
    "plain": "plain Flax",
    "reference": "PyTorch",
    "reference-compiled": "PyTorch compiled",
    "hf": "Hugging Face",
    "hf-compiled": "Hugging Face compiled",
}
ON_PYTORCH: tuple[Contestant, ...] = ("reference", "reference-compiled", "hf", "hf-compiled")
Dtype = Literal["float32", "bfloat16"]
KeepMemory = Literal["ours", "all", "none"]


@dataclasses.dataclass(frozen=True)
class TrainLoad:
    """The step that all contestants do, with AdamW, clipping and no dropout.

    Raises:
      UserError: if a value is out of its range, or two don't go together.
    """

    model: str = "gpt2"
    """size of the model, whose weights are random: gpt2, gpt2-medium, gpt2-large or gpt2-xl; or a
    config file, one of configs/*.py or your own, of which only the model is taken"""
    batch: int = 2
    """sequences in a step"""
    sequence_length: int = 512
    """T, tokens in each"""
    micro_batch_size: int | None = None
    """sequences in one pass, gradients are accumulated; None takes the whole batch in one"""
    remat: Literal["none", "dots", "block"] = "none"
    """what our backward pass computes again, as for train.py"""
    loss_chunk: int | None = None
    """tokens whose logits ours holds at a time, as for train.py"""

    def __post_init__(self) -> None:
        for name in ("batch", "sequence_length"):
            check_positive_int(name, getattr(self, name))
        check_positive_int("micro_batch_size", self.pass_size)
        if self.loss_chunk is not None:
            check_positive_int("loss_chunk", self.loss_chunk)
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

    @functools.cached_property
    def config(self) -> GPT2Config:
        """The model, without dropout."""
        file = Path(self.model)
        is_file = file.suffix in (".py", ".json")
        config = load_config_file(file).model if is_file else config_for_size(self.model)
        return dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)

    @property
    def pass_size(self) -> int:
        """Sequences in one pass."""
        return self.batch if self.micro_batch_size is None else self.micro_batch_size

    def settings(self, dtype: Dtype) -> TrainSettings:
        """The run on one device."""
        return TrainSettings(
            run_dir="unused",
            steps=500,
            model=self.config,
            data=DataSettings("unused", self.sequence_length, self.batch, self.pass_size),
            optimizer=OptimizerSettings(
                learning_rate=6e-4, final_learning_rate=6e-4, warmup_steps=0
            ),
            mesh=MeshSettings(data=1),
            dtype=dtype,
            remat=self.remat,
            loss_chunk=self.loss_chunk,
        )


def missing_packages(name: Contestant) -> list[str]:
    """What pip would have to install for a contestant."""
    wanted = {
        "reference": ("torch",),
        "reference-compiled": ("torch",),
        "hf": ("torch", "transformers"),
        "hf-compiled": ("torch", "transformers"),
    }.get(name, ())
    return [package for package in wanted if importlib.util.find_spec(package) is None]
