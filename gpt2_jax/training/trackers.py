"""TensorBoard and Weights & Biases: copies of metrics.jsonl for those who watch runs there."""

import importlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_jax.errors import UserError
from gpt2_jax.files import write_text
from gpt2_jax.training.config_files import to_json
from gpt2_jax.training.metrics import Record
from gpt2_jax.training.settings import TrainSettings


class Tracker:
    """Where records go, beside metrics.jsonl.

    Args:
      write: takes a step, its numbers by name, and its texts by name.
      close: ends it.
    """

    def __init__(
        self,
        write: Callable[[int, dict[str, float], dict[str, str]], Any],
        close: Callable[[], Any],
    ) -> None:
        self._write = write
        self.close = close

    def write(self, record: Record) -> None:
        """Passes one record of metrics.jsonl on."""
        numbers = {
            name: value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        texts = {
            name: "\n\n".join(value) for name, value in record.items() if isinstance(value, list)
        }
        self._write(record["step"], numbers, texts)


def check_trackers(settings: TrainSettings) -> None:
    """Raises UserError if a package that the settings ask for is missing."""
    if settings.wandb is None:
        return
    try:
        importlib.import_module("wandb")
    except ModuleNotFoundError:
        raise UserError(
            "--wandb needs a package that is not installed: pip install wandb"
        ) from None


def open_trackers(settings: TrainSettings, run_dir: Path, first_step: int) -> list[Tracker]:
    """Opens what the settings ask for; `first_step` is where a resumed run goes on.

    Raises:
      UserError: if a package is missing or the service refuses.
    """
    trackers = []
    if settings.tensorboard:
        trackers.append(_tensorboard(run_dir / "tensorboard", first_step))
    if settings.wandb is not None:
        trackers.append(_wandb(settings, settings.wandb, run_dir))
    return trackers


def _tensorboard(directory: Path, first_step: int) -> Tracker:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(directory), purge_step=first_step)

    def write(step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        for name, text in texts.items():
            writer.add_text(name, text, step)

    return Tracker(write, writer.close)


def _wandb(settings: TrainSettings, project: str, run_dir: Path) -> Tracker:
    check_trackers(settings)
    import wandb

    # A resumed run is the same run there; one that replaced another is not.
    identity = run_dir / "wandb" / "run_id"
    if not identity.exists():
        identity.parent.mkdir(parents=True, exist_ok=True)
        write_text(identity, uuid.uuid4().hex)
    try:
        run = wandb.init(
            project=project,
            name=run_dir.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config={"config.json": to_json(settings)},
        )
    except wandb.Error as error:
        raise UserError(
            f"--wandb {project}: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from None

    def write(step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        run.log({**numbers, **texts}, step=step)

    return Tracker(write, run.finish)
