"""Contestants of a benchmark, each in a process of its own, called one at a time.

A process sleeps while another is measured. Who is not installed, or fails, is left out and told.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Generic, ParamSpec, TypeVar

from gpt2_jax.benchmarks.contest import SETTLE_SECONDS
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.errors import UserError

Name = TypeVar("Name", bound=str)
P = ParamSpec("P")
R = TypeVar("R")


class Contestants(Generic[Name]):
    """Those that are installed; a context that ends their processes.

    Args:
      missing: the packages that each contestant would need, and that are not installed.
      worker: starts the process of one.
      forgiven: the errors that leave a contestant out; others are bugs of ours.
      report: told who does what.

    Attributes:
      working: names of those that have not failed.
      left_out: those that are not installed or have failed, and why.

    Raises:
      UserError: if nobody is installed.
    """

    def __init__(
        self,
        missing: Mapping[Name, Sequence[str]],
        worker: Callable[[Name], Worker],
        forgiven: Mapping[Name, tuple[type[Exception], ...]],
        report: Callable[[Name, str], None],
    ) -> None:
        self.left_out: dict[Name, str] = {
            name: f"not installed; pip install {' '.join(packages)}"
            for name, packages in missing.items()
            if packages
        }
        self.working = [name for name, packages in missing.items() if not packages]
        if not self.working:
            reasons = "; ".join(map(": ".join, self.left_out.items()))
            raise UserError(f"no contestant is left: {reasons}")
        self._worker, self._forgiven, self._report = worker, forgiven, report
        self._stack = ExitStack()

    def __enter__(self) -> "Contestants[Name]":
        with ExitStack() as stack:
            self._workers = {name: stack.enter_context(self._worker(name)) for name in self.working}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def call(
        self, name: Name, doing: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R | None:
        """Calls a function in a contestant's process; None if it is now left out."""
        self._report(name, doing)
        time.sleep(SETTLE_SECONDS)
        try:
            return self._workers[name].run(function, *args, **kwargs)
        except self._forgiven[name] as error:
            self.left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())
            self.working.remove(name)
            return None
