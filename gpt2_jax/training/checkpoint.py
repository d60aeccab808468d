"""Checkpoints of a run, through Orbax; the only module that knows it.

    RUN_DIR/checkpoints/STEP/{params, opt_state, manifest.json}

Orbax writes in the background, beside the final place, and renames; the manifest follows. So a
checkpoint is there whole or does not count. Parameters and optimizer state are separate, so that
generation reads the parameters alone.
"""

import contextlib
import logging
import shutil
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from gpt2_jax.errors import UserError
from gpt2_jax.model import Params
from gpt2_jax.training.distributed import is_primary
from gpt2_jax.training.manifest import NAME, DamagedError, read_manifest, verify, write_manifest
from gpt2_jax.training.step import TrainState

# When a write fails, each thread of Orbax logs a traceback of what is told here in one line.
logging.getLogger("absl").addFilter(
    lambda record: "_SignalingThread" not in str(record.msg) or record.exc_info is None
)

DAMAGED = "damaged"
"""folder in the run directory that damaged checkpoints are moved to"""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for pending writes on exit.

    Args:
      run_dir: the run; checkpoints go to its folder "checkpoints".
      keep: how many of the latest stay, besides the one of the lowest validation loss.
    """

    def __init__(self, run_dir: Path, keep: int = 3) -> None:
        self.directory = (run_dir / "checkpoints").absolute()
        self._keep = keep
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def save(self, state: TrainState, facts: dict[str, Any] | None = None) -> None:
        """Starts writing the state; returns once it is copied and may be donated again.

        Args:
          state: what to keep.
          facts: JSON values to record with it; "val_loss" decides which checkpoint is best.

        Raises:
          UserError: if this or the checkpoint before cannot be written.
        """
        self.wait()
        step = int(state.step)
        facts = {"step": step, "val_loss": None, **(facts or {})}
        items = {"params": state.params, "opt_state": state.opt_state}
        try:
            self._check_writable()
            response = ocp.save_checkpointables_async(self.directory / str(step), items)
        except Exception as error:
            raise self._cannot_write(step, error) from error
        self._pending = step, self._worker.submit(self._finish, step, response, facts)

    def check(self) -> None:
        """Raises the error of a background write that has failed, without waiting for any."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          UserError: if it could not be.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._cannot_write(step, error) from error

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of a step into the shapes and shardings of `like`."""
        items = self._load(step, {"params": like.params, "opt_state": like.opt_state})
        # Of int32 and replicated as a step leaves it, or resuming would compile once more.
        number = jax.device_put(jnp.asarray(step, jnp.int32), like.step.sharding)
        return TrainState(number, items["params"], items["opt_state"])

    def restore_params(self, like: Params, step: int | None = None) -> Params:
        """Reads parameters into the shapes of `like`, on one device.

        Args:
          like: shapes and dtypes.
          step: of the checkpoint; None takes the newest that is intact.

        Raises:
          UserError: if there is no intact checkpoint, or it is of another model.
        """
        if step is None:
            step = self.newest_intact(["params"])
        else:
            self._check_intact(step)
        if step is None and self.finished():
            raise UserError(f"no checkpoint in {self.directory} is intact; restore a backup")
        if step is None:
            raise UserError(
                f"{self.directory} holds no finished checkpoint; train the run until it saves one"
            )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like
        )
        # Each of several processes reads for itself, so none waits for another.
        alone = ocp.Context()
        alone.multiprocessing.primary_host = jax.process_index()
        alone.multiprocessing.active_processes = {jax.process_index()}
        with alone:
            return self._load(step, {"params": like})["params"]

    def newest_intact(self, parts: list[str]) -> int | None:
        """Step of the newest checkpoint whose parts are as they were written; None if none is.

        Every newer one is named on stderr, with what is wrong with it.
        """
        for step in reversed(self.steps()):
            try:
                verify(self.directory / str(step), parts)
            except DamagedError as error:
                print(
                    f"checkpoint {self.directory / str(step)} is left out: {error}", file=sys.stderr
                )
            else:
                return step
        return None

    def _check_intact(self, step: int) -> None:
        try:
            verify(self.directory / str(step), ["params"])
        except DamagedError as error:
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be used: {error}; restore a backup"
            ) from None

    def best(self) -> int | None:
        """Step of the checkpoint of the lowest validation loss; None if none was measured.

        Those that were written for other data than the newest do not count.
        """
        facts = self._all_facts()
        data = facts[max(facts)].get("data") if facts else None
        measured = {
            step: fact["val_loss"]
            for step, fact in facts.items()
            if fact["val_loss"] is not None and fact.get("data") == data
        }
        return min(measured, key=measured.__getitem__, default=None)

    def _all_facts(self) -> dict[int, dict[str, Any]]:
        """What was recorded with each finished checkpoint."""
        facts = {}
        for step in self.finished():
            with contextlib.suppress(DamagedError):
                facts[step] = self.facts(step)
        return facts

    def steps(self) -> list[int]:
        """Steps of all checkpoints, finished or not, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def finished(self) -> list[int]:
        """Steps of the checkpoints that have a manifest, in order."""
        return [step for step in self.steps() if (self.directory / str(step) / NAME).exists()]

    def describe_last_good(self) -> str:
        """What is safe, as half a sentence."""
        finished = self.finished()
        if not finished:
            return "no checkpoint was saved before"
        return f"the checkpoint of step {finished[-1]} is intact"

    def facts(self, step: int) -> dict[str, Any]:
        """What `save` was given to record with a checkpoint."""
        return read_manifest(self.directory / str(step))

    def set_aside_newer_than(self, step: int | None) -> None:
        """Moves what is newer than `step`, or has no manifest, to RUN_DIR/damaged.

        What lay there goes, so that damage cannot fill the disk; so does what Orbax itself left
        half-written.
        """
        newer = {number for number in self.steps() if step is None or number > step}
        useless = newer | (set(self.steps()) - set(self.finished()))
        aside = self.directory.parent / DAMAGED
        if useless:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        for number in useless:
            shutil.move(self.directory / str(number), aside / str(number))
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _check_writable(self) -> None:
        """Fails where Orbax would wait for its directory for minutes."""
        if is_primary():
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass

    def _finish(self, step: int, response: ocp.AsyncResponse[None], facts: dict[str, Any]) -> None:
        """Runs in the background: waits for Orbax, seals the checkpoint, drops old ones."""
        response.result()
        if is_primary():
            write_manifest(self.directory / str(step), facts)
            self._drop_old()

    def _drop_old(self) -> None:
        steps = sorted(self._all_facts())
        for step in set(steps[: -self._keep]) - {self.best()}:
            # Without its manifest it does not count, should the removal be cut short.
            (self.directory / str(step) / NAME).unlink()
            shutil.rmtree(self.directory / str(step), ignore_errors=True)

    def _load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        checkpoint = self.directory / str(step)
        try:
            stored = ocp.checkpointables_metadata(checkpoint).metadata["params"]
            _check_shapes(_shapes(stored), _shapes(like["params"]), str(checkpoint))
            return ocp.load_checkpointables(checkpoint, like)
        except UserError:
            raise
        except Exception as error:
            # Orbax passes on whatever its storage layers raise.
            raise UserError(
                f"checkpoint {checkpoint} cannot be restored ({type(error).__name__}: {error}); "
                f"it was written by another version or for another optimizer"
            ) from error

    def _cannot_write(self, step: int, error: Exception) -> UserError:
        # Storage layers tell where before what; the path is told already.
        reason = str(error).strip().rpartition('": ')[2] or type(error).__name__
        return UserError(
            f"cannot write the checkpoint of step {step} to {self.directory} ({reason}); "
            f"{self.describe_last_good()}; free space or permissions, then run the same "
            f"command to go on"
        )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _check_shapes(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], checkpoint: str
) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {checkpoint} is of another model: its {name} is "
                f"{stored.get(name, 'missing')}, the config's {wanted.get(name, 'missing')}; "
                f"use the config.json it was trained with"
            )
