"""Checks of flags that several measurements have."""

from gpt2_jax.benchmarks.worker import cpu_cores
from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError


def check_counts(flags: object, *names: str) -> None:
    """Raises UserError unless all of these flags are whole numbers of at least 1."""
    for name in names:
        check_positive_int(name, getattr(flags, name))


def check_not_empty(flags: object, *names: str) -> None:
    """Raises UserError if one of these flags has no value."""
    for name in names:
        if not getattr(flags, name):
            raise UserError(f"--{name} is empty; give at least one, or leave it out")


def check_threads(threads: int | None) -> None:
    """Raises UserError for more threads than there are cores, or none; None takes all."""
    if threads is not None and not 1 <= threads <= cpu_cores():
        raise UserError(f"threads={threads} must be from 1 to {cpu_cores()}, the cores there are")
