"""LoRA fine-tuning put together: a training run beside frozen weights, then its adapter.

The run is one of `gpt2_jax.training` with all that has: mesh, checkpoints, resume, records. When
it has finished, RUN_DIR/adapter holds its best adapter in PEFT's format.
"""

import math
from pathlib import Path
from typing import NamedTuple

from gpt2_jax import experiment
from gpt2_jax.config import GPT2Config
from gpt2_jax.errors import UserError
from gpt2_jax.evaluation.perplexity import number_text
from gpt2_jax.interop.peft import save_adapter
from gpt2_jax.interop.peft_write import check_output
from gpt2_jax.lora import lora_shapes
from gpt2_jax.model import Params
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.distributed import is_primary
from gpt2_jax.training.metrics import read_metrics
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.validation import out_of_patience

ADAPTER = "adapter"


class Adapter(NamedTuple):
    """What a finished run has made."""

    directory: Path
    step: int
    """updates after which the validation loss was lowest, of those with a checkpoint"""
    losses: dict[int, float]
    """validation loss by step; that of step 0 is the base's"""
    size: int
    """bytes of the two files"""


def finetune(
    settings: TrainSettings,
    source: tuple[Params, GPT2Config],
    *,
    base: str | None = None,
    revision: str | None = None,
    **options: bool,
) -> Adapter | None:
    """Trains an adapter and writes the best one to RUN_DIR/adapter.

    Args:
      settings: the run, with `lora` and with `init_from` telling where the base is from.
      source: the base, host arrays, and its config.
      base: where PEFT is to look for it, a hub's name or a directory of Hugging Face's.
      revision: of the base on the hub.
      **options: `resume`, `overwrite`, `allow_changes` and `profile` of `training.loop.train`.

    Returns:
      The adapter; None if a signal stopped the run, and in all processes but one.

    Raises:
      UserError: as `experiment.run` does, or if the adapter cannot be written.
    """
    assert settings.lora is not None
    run_dir, (_, config) = Path(settings.run_dir), source
    directory = run_dir / ADAPTER
    if is_primary():
        check_output(directory, overwrite=True)  # rather now than after all the training
    state = experiment.run(settings, source, **options)
    records = read_metrics(run_dir / "metrics.jsonl") if is_primary() else []
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    finished = int(state.step) == settings.steps
    if not losses or not (finished or out_of_patience(losses, settings.validation.patience)):
        return None
    checkpoints = Checkpoints(run_dir)
    step = checkpoints.best()
    if step is None:
        raise UserError(f"{checkpoints.directory} has no checkpoint with a validation loss")
    lora = checkpoints.restore_params(lora_shapes(config, settings.lora), step)
    save_adapter(
        directory, lora, settings.lora, config, base=base, revision=revision, overwrite=True
    )
    size = sum(file.stat().st_size for file in directory.iterdir())
    return Adapter(directory, step, losses, size)


def describe(adapter: Adapter) -> str:
    """What became of the loss, in one line."""
    before, after = adapter.losses.get(0), adapter.losses[adapter.step]
    perplexity = number_text(math.exp(after))
    text = f"validation loss {after:.4f} (perplexity {perplexity}) at step {adapter.step}"
    if before is None:
        return text
    text += f", the base's {before:.4f} ({number_text(math.exp(before))})"
    return text if after < before else f"{text}: no better, so the adapter is of no use"
