"""A process of its own for whatever is measured, with no more CPU cores than it may use."""

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from gpt2_jax.allocator import KEEP_MEMORY, VARIABLE

P = ParamSpec("P")
R = TypeVar("R")

_SECONDS_TO_END = 5


class Worker:
    """Runs functions, one at a time, in a fresh process; a context that ends it.

    Args:
      threads: CPU cores it may use.
      device: "cpu" keeps JAX from using an accelerator; None leaves it the choice.
      keep_memory: it allocates memory as training scripts do, see `gpt2_jax.allocator`.
    """

    def __init__(
        self, threads: int, device: str | None = None, *, keep_memory: bool = False
    ) -> None:
        processes = get_context("spawn")
        self._connection, theirs = processes.Pipe()
        self._process = processes.Process(
            target=_serve, args=(theirs, threads, device), daemon=True
        )
        with _environment(VARIABLE, KEEP_MEMORY if keep_memory else None):
            self._process.start()
        self._busy = False
        theirs.close()  # so that the end of either process is seen by the other

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._busy:
            # Of its own accord, so that libraries give back what is the system's.
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(_SECONDS_TO_END)
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls a module's function there; what it raises is raised here.

        Raises:
          RuntimeError: if the process ends.
        """
        self._busy = True
        try:
            self._connection.send((function, args, kwargs))
            result, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"its process ended with {self._process.exitcode}") from None
        self._busy = False
        if error is not None:
            raise error
        return result


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Sets a variable for the processes that are started meanwhile; None leaves it as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def cpu_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def _serve(connection: Connection, threads: int, device: str | None) -> None:
    """What the process does, until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    # Libraries make as many threads as they see cores; OpenMP may be told otherwise by its user.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Several processes share a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device is not None:
        os.environ["JAX_PLATFORMS"] = device
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if asked is None:
            return
        function, args, kwargs = asked
        try:
            connection.send((function(*args, **kwargs), None))
        except Exception as error:
            connection.send((None, _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error, with the lines it came from; a plainer one if it cannot be sent."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
