"""Checkpoints of a run, through Orbax; the only module that knows it.

    RUN_DIR/checkpoints/STEP/{params, opt_state}

Orbax writes beside and renames, so a checkpoint is there whole or not at all. Parameters and
optimizer state are separate, so that generation reads the parameters alone.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from gpt2_jax.errors import UserError
from gpt2_jax.model import Params
from gpt2_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for pending writes on exit."""

    def __init__(self, run_dir: Path) -> None:
        self._checkpointer = ocp.training.Checkpointer((run_dir / "checkpoints").resolve())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def save(self, state: TrainState) -> None:
        """Starts writing the state; returns once it is copied and may be donated again."""
        items = {"params": state.params, "opt_state": state.opt_state}
        self._checkpointer.save_checkpointables_async(int(state.step), items, force=True)

    def restore(self, like: TrainState) -> TrainState:
        """Reads the latest state into the shapes of `like` (arrays or ShapeDtypeStructs)."""
        items = self._load({"params": like.params, "opt_state": like.opt_state})
        step = jnp.asarray(self.latest_step, jnp.int32)
        return TrainState(step, items["params"], items["opt_state"])

    def restore_params(self, like: Params) -> Params:
        """Reads the latest parameters into the shapes of `like`."""
        return self._load({"params": like})["params"]

    @property
    def latest_step(self) -> int:
        """Step of the newest checkpoint.

        Raises:
          UserError: if there is none.
        """
        latest = self._checkpointer.latest
        if latest is None:
            raise UserError(
                f"{self._checkpointer.directory} holds no finished checkpoint; "
                f"train the run until it saves one"
            )
        return latest.step

    def _load(self, like: dict[str, Any]) -> dict[str, Any]:
        step = self.latest_step
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device), like
        )
        checkpoint = self._checkpointer.directory / str(step)
        try:
            stored = self._checkpointer.checkpointables_metadata(step).metadata["params"]
            _check_shapes(_shapes(stored), _shapes(like["params"]), str(checkpoint))
            return self._checkpointer.load_checkpointables(step, like)
        except UserError:
            raise
        except Exception as error:
            # Orbax passes on whatever its storage layers raise.
            raise UserError(
                f"checkpoint {checkpoint} cannot be restored ({type(error).__name__}); "
                f"it is damaged: delete that folder to use the one before"
            ) from error


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
