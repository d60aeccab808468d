"""Where a run begins: at its newest intact checkpoint, or at step 0."""

from gpt2_jax.errors import UserError
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.distributed import agree, is_primary

_PARTS = ["params", "opt_state"]


def first_step(checkpoints: Checkpoints, fingerprint: str | None) -> int:
    """Finds the checkpoint to go on from, and clears away what is newer or unfinished.

    Process 0 looks, all get its answer.

    Args:
      checkpoints: of the run.
      fingerprint: of the training data; None does not compare.

    Returns:
      Its step; 0 if the run was stopped before it saved one.

    Raises:
      UserError: if all checkpoints are damaged, or the training data have changed since.
    """
    step = _find(checkpoints, fingerprint) if is_primary() else 0
    return agree(step)


def _find(checkpoints: Checkpoints, fingerprint: str | None) -> int:
    step = checkpoints.newest_intact(_PARTS)
    if step is None and checkpoints.finished():
        raise UserError(
            f"no checkpoint in {checkpoints.directory} is intact; restore one from a backup, "
            f"or pass --overwrite to start anew"
        )
    if step is not None and fingerprint is not None:
        before = checkpoints.facts(step)["data"]
        if before is not None and before != fingerprint:
            raise UserError(
                f"the training data have changed since checkpoint {step} of "
                f"{checkpoints.directory} was written; bring back the old --data.path, or pass "
                f"--allow_changes to go on with the new data"
            )
    checkpoints.set_aside_newer_than(step)
    return step or 0
