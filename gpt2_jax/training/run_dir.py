"""The run directory: who may write to it, and what a resumed run finds there.

RUN_DIR/config.json     every setting; the mark of a run
        metrics.jsonl   one record a step, see `gpt2_jax.training.metrics`
        loss.png        drawn from it
        checkpoints/    see `gpt2_jax.training.checkpoint`
        adapter/        of a finished LoRA run, see `gpt2_jax.finetuning`
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt2_jax.errors import UserError
from gpt2_jax.files import held, read_text, write_text
from gpt2_jax.training.config_files import differences, from_json, is_free_on_resume, to_json
from gpt2_jax.training.distributed import is_primary
from gpt2_jax.training.settings import TrainSettings

_CONTENTS = (
    "config.json",
    "metrics.jsonl",
    "loss.png",
    "checkpoints",
    "adapter",
    "damaged",
    "tensorboard",
    "wandb",
    "profile",
)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes the directory and holds it, so that no second process trains in it.

    Raises:
      UserError: if it cannot be made or written, or another process holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write run directory {run_dir}: {error.strerror}; give another --run_dir"
        ) from None
    with held(run_dir, "training in"):
        yield


def check_run(
    settings: TrainSettings, *, resume: bool, overwrite: bool, allow_changes: bool
) -> bool:
    """Decides what becomes of the run directory, without touching it.

    Args:
      settings: the run to be.
      resume: insist on a run to resume.
      overwrite: replace the run that is there.
      allow_changes: resume even with other settings.

    Returns:
      Whether there is a run to go on with.

    Raises:
      UserError: if the flags exclude one another, or the run that is there has other settings.
    """
    run_dir = Path(settings.run_dir)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; choose one")
    file = run_dir / "config.json"
    remains = [name for name in _CONTENTS if (run_dir / name).exists()]
    if overwrite:
        if file.exists() and _is_foreign(file):
            raise UserError(
                f"{file} is not the config of a run, so --overwrite leaves {run_dir} alone; "
                f"give another --run_dir"
            )
        return False
    if not file.exists():
        if resume:
            raise UserError(f"--resume: {run_dir} holds no run; leave the flag out to start one")
        if remains:
            raise UserError(
                f"{run_dir} already holds {remains[0]} without the config.json of a run; "
                f"give another --run_dir, or --overwrite to replace it"
            )
        return False
    stored = from_json(read_text(file), str(file))
    changes = differences(stored, settings)
    free = [name for name in changes if is_free_on_resume(name, settings)]
    fixed = [name for name in changes if name not in free]
    if fixed and not allow_changes:
        raise UserError(
            f"{run_dir} already holds a run with other settings: {_list(changes, fixed)}; "
            f"give another --run_dir, --allow_changes to go on with the new settings, or "
            f"--overwrite to replace the run"
        )
    if changes and is_primary():
        print(f"resuming with changed settings: {_list(changes, list(changes))}", file=sys.stderr)
    return True


def _is_foreign(file: Path) -> bool:
    """Whether a config.json is someone else's, such as a Hugging Face model's."""
    try:
        return "run_dir" not in json.loads(file.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _list(changes: dict[str, tuple[object, object]], names: list[str]) -> str:
    return ", ".join(f"{name} was {changes[name][0]!r}, now {changes[name][1]!r}" for name in names)


def clear(run_dir: Path) -> None:
    """Removes what a run has written, and nothing else."""
    for name in _CONTENTS:
        path = run_dir / name
        if path.is_symlink() and path.is_dir():  # a folder on another disk stays linked
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def store_settings(settings: TrainSettings) -> None:
    """Writes config.json.

    Raises:
      UserError: if it cannot be written.
    """
    run_dir = Path(settings.run_dir)
    try:
        write_text(run_dir / "config.json", to_json(settings))
    except OSError as error:
        raise UserError(
            f"cannot write run directory {run_dir}: {error.strerror}; give another --run_dir"
        ) from None
