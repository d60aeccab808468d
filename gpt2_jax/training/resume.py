"""Where a run begins: at its newest intact checkpoint, or at step 0."""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.model import Params
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.distributed import agree, is_primary

_PARTS = ["params", "opt_state"]
_REMEDIES = {
    "data": ("training data", "bring back the old ones, or pass --allow_changes to go on"),
    "base": ("frozen weights", "an adapter belongs to its base; start another run, or --overwrite"),
}


def fingerprint(params: Params) -> str:
    """A sha256 of host parameters: their names, shapes and every value."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def first_step(checkpoints: Checkpoints, fingerprints: Mapping[str, str]) -> int:
    """Finds the checkpoint to go on from, and clears away what is newer or unfinished.

    Process 0 looks, all get its answer.

    Args:
      checkpoints: of the run.
      fingerprints: of "data" and "base"; what is left out is not compared.

    Returns:
      Its step; 0 if the run was stopped before it saved one.

    Raises:
      UserError: if all checkpoints are damaged, or data or base have changed since.
    """
    step = _find(checkpoints, fingerprints) if is_primary() else 0
    return agree(step)


def _find(checkpoints: Checkpoints, fingerprints: Mapping[str, str]) -> int:
    step = checkpoints.newest_intact(_PARTS)
    if step is None and checkpoints.finished():
        raise UserError(
            f"no checkpoint in {checkpoints.directory} is intact; restore one from a backup, "
            f"or pass --overwrite to start anew"
        )
    stored = {} if step is None else checkpoints.facts(step)
    for name, mine in fingerprints.items():
        if stored.get(name) not in (None, mine):
            what, remedy = _REMEDIES[name]
            raise UserError(
                f"the {what} have changed since checkpoint {step} of {checkpoints.directory} was "
                f"written; {remedy}"
            )
    checkpoints.set_aside_newer_than(step)
    return step or 0
