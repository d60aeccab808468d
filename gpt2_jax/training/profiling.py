"""A JAX trace of a few steps, for TensorBoard's profile plugin, Perfetto or XProf."""

from pathlib import Path

import jax

STEPS = 3


class Trace:
    """A context that traces three steps, from the third one on: the first two still warm up.

    Args:
      directory: where the trace goes; None traces nothing.
      first_step: where the run begins.
    """

    def __init__(self, directory: Path | None, first_step: int) -> None:
        self._directory = directory
        self._begin = first_step + 2
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts or stops the trace, if it is time to."""
        if self._directory is not None and step == self._begin:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif step == self._begin + STEPS:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
