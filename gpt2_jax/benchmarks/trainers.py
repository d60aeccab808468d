"""What is measured of training steps in a contestant's process: time, memory and losses."""

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from gpt2_jax.benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from gpt2_jax.training.settings import TrainSettings

Name = TypeVar("Name", bound=str)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a contestant before it is measured; None where nothing can be known.

    Attributes:
      device: where it runs, "cpu" or "gpu".
      compile_seconds: to trace and compile the step.
      flops: of one pass and the optimizer, by XLA's analysis of the compiled program.
      planned_bytes: arguments, results and temporary buffers of the compiled program.
    """

    device: str
    compile_seconds: float | None = None
    flops: float | None = None
    planned_bytes: int | None = None


class Trainer(Protocol):
    """A contestant in its process."""

    program: Program
    """whole once the first steps are done"""

    def load(self) -> None:
        """Puts weights and tokens where they are used."""
        ...

    def steps(self, count: int) -> list[float]:
        """Does so many steps and waits for them; the loss of each before its update."""
        ...

    def device_peak_bytes(self) -> int | None:
        """The most an accelerator held; None for a CPU, whose memory is the process's."""
        ...


MakeTrainer = Callable[[Name, TrainSettings], Trainer]
"""makes the contestant of a name, in its process; a function of a module, which is sent there"""

_trainer: Trainer | None = None
_resident_before: int | None = None


def open_trainer(
    make: MakeTrainer[Name], name: Name, settings: TrainSettings, steps: int
) -> tuple[Program, list[float]]:
    """Makes the contestant ready; what is known of it, and the losses of its first steps."""
    global _trainer, _resident_before
    _trainer = make(name, settings)
    _resident_before = resident_bytes()
    _trainer.load()
    losses = _trainer.steps(steps)
    resident_bytes()  # gives back what only loading and compiling took
    if not reset_peak():
        _resident_before = None
    return _trainer.program, losses


def time_steps(steps: int) -> tuple[float, float]:
    """Seconds of a step, and CPU seconds."""
    assert _trainer is not None
    start, cpu_start = time.perf_counter(), time.process_time()
    _trainer.steps(steps)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds / steps, cpu_seconds / steps


def peak_bytes() -> int | None:
    """The most that weights and steps held since the first steps; None if that is not told."""
    assert _trainer is not None
    if _trainer.program.device != "cpu":
        return _trainer.device_peak_bytes()
    peak = peak_resident_bytes()
    if peak is None or _resident_before is None:
        return None
    return max(0, peak - _resident_before)  # a tiny model may take less than was given back
