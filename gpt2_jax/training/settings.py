"""Everything a training run depends on, as frozen dataclasses that are also the flags.

A file in `configs/` holds one `TrainSettings` value named `config`; flags override its fields
(`--optimizer.learning_rate 3e-4`); the run directory keeps the result as `config.json`.
"""

import dataclasses
import difflib
import json
import math
import re
import runpy
import traceback
from pathlib import Path
from typing import Any, Literal

from gpt2_jax.config import GPT2Config, check_positive_int, is_number
from gpt2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What the model learns from, and in what portions."""

    path: str = "data/shakespeare"
    """directory of token shards (scripts/prepare_*.py), or pydoc_data.topics: Python's own docs"""
    sequence_length: int = 1024
    """T, tokens in one training window; at most model.n_positions"""
    batch_size: int = 512
    """sequences in the global batch of one optimizer step; 512 x 1024 = 524,288 tokens"""
    micro_batch_size: int = 64
    """sequences in one forward and backward pass; gradients accumulate over the batch"""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 6e-4
    """peak, reached at the end of the warm-up"""
    final_learning_rate: float = 6e-5
    """reached at the last step"""
    warmup_steps: int = 715
    """steps of linear warm-up"""
    beta1: float = 0.9
    """decay of the gradient's running mean"""
    beta2: float = 0.95
    """decay of the squared gradient's running mean"""
    epsilon: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled decay, on matrices and embeddings only"""
    clip_norm: float = 1.0
    """the global gradient norm is scaled down to this"""


@dataclasses.dataclass(frozen=True)
class ValidationSettings:
    """When and on how much the validation loss is measured."""

    every: int = 250
    """steps between measurements; also before the first step and after the last"""
    windows: int = 1024
    """validation windows used, always the first ones"""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training run.

    Raises:
      UserError: if a value is out of its range, or two don't go together.
    """

    run_dir: str
    """where config.json, metrics.jsonl, loss.png and checkpoints go"""
    steps: int
    """optimizer steps"""
    model: GPT2Config = GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    """the architecture"""
    data: DataSettings = DataSettings()
    """tokens and batches"""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and its schedule"""
    validation: ValidationSettings = ValidationSettings()
    """held-out loss"""
    checkpoint_every: int = 1000
    """steps between checkpoints; also after the last step"""
    log_every: int = 10
    """steps between printed lines where the output is not a terminal; metrics.jsonl has all"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype; parameters and optimizer state are always float32"""
    seed: int = 1337
    """fixes initial weights, order of the data and dropout"""

    def __post_init__(self) -> None:
        positive = {
            "steps": self.steps,
            "data.sequence_length": self.data.sequence_length,
            "data.batch_size": self.data.batch_size,
            "data.micro_batch_size": self.data.micro_batch_size,
            "validation.every": self.validation.every,
            "validation.windows": self.validation.windows,
            "checkpoint_every": self.checkpoint_every,
            "log_every": self.log_every,
        }
        for name, value in positive.items():
            check_positive_int(name, value)
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed} must be a whole number in [0, 2^31)")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype={self.dtype!r} must be bfloat16 or float32")
        self._check_data()
        self._check_optimizer()

    def _check_data(self) -> None:
        data = self.data
        if data.sequence_length > self.model.n_positions:
            raise UserError(
                f"data.sequence_length={data.sequence_length} is more than "
                f"model.n_positions={self.model.n_positions}; lower the one or raise the other"
            )
        if data.batch_size % data.micro_batch_size:
            raise UserError(
                f"data.batch_size={data.batch_size} is not a multiple of "
                f"data.micro_batch_size={data.micro_batch_size}; choose sizes that divide"
            )

    def _check_optimizer(self) -> None:
        optimizer = self.optimizer
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            value = getattr(optimizer, name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise UserError(f"optimizer.{name}={value!r} must be finite and not negative")
        for name in ("epsilon", "clip_norm"):
            value = getattr(optimizer, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise UserError(f"optimizer.{name}={value!r} must be finite and above 0")
        for name in ("beta1", "beta2"):
            value = getattr(optimizer, name)
            if not is_number(value) or not 0 <= value < 1:
                raise UserError(f"optimizer.{name}={value!r} must be in [0, 1)")
        warmup = optimizer.warmup_steps
        if type(warmup) is not int or warmup < 0:
            raise UserError(f"optimizer.warmup_steps={warmup} must be a whole number, 0 or more")


def load_config_file(path: Path) -> TrainSettings:
    """Runs a Python config file and returns its `config`. The file is trusted code.

    Raises:
      UserError: if the file does not exist, fails, or defines no `config`; a misspelt field is
        named together with the nearest known one.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; the ready ones are in configs/")
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from None
    except Exception as error:
        raise UserError(f"config file {path}, {_where(error, path)}: {_reason(error)}") from None
    if not isinstance(config, TrainSettings):
        raise UserError(f"config file {path} must define config = TrainSettings(...)")
    return config


def to_json(settings: TrainSettings) -> str:
    """The settings as JSON text, nested as the dataclasses are."""
    return json.dumps(dataclasses.asdict(settings), indent=2) + "\n"


def from_json(text: str, source: str) -> TrainSettings:
    """Reads back what `to_json` wrote.

    Args:
      text: the JSON.
      source: where it came from, for the error message.

    Raises:
      UserError: if it is not JSON, or has an unknown or missing field.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        for name, kind in _SECTIONS.items():
            fields[name] = kind(**fields[name])
        return TrainSettings(**fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source} is not the config of a run ({error})") from None


_SECTIONS: dict[str, type] = {
    "model": GPT2Config,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "validation": ValidationSettings,
}


def _reason(error: Exception) -> str:
    """The error's text; for a misspelt field, with the nearest one there is."""
    kinds = (TrainSettings, *_SECTIONS.values())
    names = "|".join(kind.__name__ for kind in kinds)
    misspelt = re.search(rf"(?:{names})\.__init__.* keyword argument '(\w+)'", str(error))
    if not misspelt:
        return str(error)
    known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(misspelt[1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists every setting"
    return f"unknown setting {misspelt[1]!r}; {hint}"


def _where(error: Exception, path: Path) -> str:
    """The line of the config file an error came from."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"line {lines[-1]}, {type(error).__name__}" if lines else type(error).__name__
