"""A LoRA step against training all weights and against PEFT: same weights, same batch, by turns.

Every contestant has a process of its own, which sleeps while another is measured; a round measures
each once, so that whatever else the machine does hits all alike.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpt2_jax.benchmarks.contestants import Contestants
from gpt2_jax.benchmarks.lora_load import TITLES, Contestant, missing_packages
from gpt2_jax.benchmarks.lora_trainers import OurTrainer, Program, Trainer
from gpt2_jax.benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.training.settings import TrainSettings

# The second loss depends on the first update: on gradients, clipping and AdamW.
COMPARED_STEPS = 2

# What leaves a contestant out; the rest are bugs of ours. Where memory is short, that is a result.
_FORGIVEN: dict[Contestant, tuple[type[Exception], ...]] = {
    "lora": (),
    "full": (RuntimeError,),
    "peft": (Exception,),
}


@dataclasses.dataclass
class Measured:
    """What was measured of a contestant.

    Attributes:
      program: what was known before it ran.
      losses: of its first steps, nats per token; each before its update.
      seconds: of a step, the mean of each round.
      cpu_seconds: that all its threads worked, or looked out for work, in a step of each round.
      peak_bytes: the most that weights and steps held: of an accelerator's memory, or of the
        process beyond what libraries and compiler hold; None if that is not told.
    """

    program: Program
    losses: list[float]
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def step_seconds(self) -> float:
        """The median round's."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class LoraFigures:
    """What came of a load with one compute dtype.

    Attributes:
      settings: what was measured.
      measured: of each contestant that worked.
      left_out: contestants that could not be measured, such as for want of memory, and why.
    """

    settings: TrainSettings
    measured: dict[Contestant, Measured]
    left_out: dict[Contestant, str]

    def ratio(self, one: Contestant, other: Contestant) -> float | None:
        """Step time of one / other, the median of the rounds' own; None unless both worked."""
        if one not in self.measured or other not in self.measured:
            return None
        both = zip(self.measured[one].seconds, self.measured[other].seconds, strict=True)
        return statistics.median(ours / its for ours, its in both)

    @property
    def flops_ratio(self) -> float | None:
        """Of the compiled programs, LoRA / all weights; about 2/3 where the layers dominate."""
        flops = [
            self.measured[name].program.flops for name in ("lora", "full") if name in self.measured
        ]
        return flops[0] / flops[1] if len(flops) == 2 and flops[0] and flops[1] else None

    def loss_difference(self, other: Contestant) -> float | None:
        """The largest between the LoRA step's first losses and another's, nats per token.

        All weights start where base and adapter do, but go elsewhere: one loss is compared.
        """
        if "lora" not in self.measured or other not in self.measured:
            return None
        count = 1 if other == "full" else COMPARED_STEPS
        both = zip(self.measured["lora"].losses, self.measured[other].losses, strict=True)
        return max(abs(ours - its) for ours, its in list(both)[:count])

    def to_json(self) -> dict[str, Any]:
        """Everything, each round included."""
        return {
            "dtype": self.settings.dtype,
            "contestants": {name: dataclasses.asdict(of) for name, of in self.measured.items()},
            "lora / full": self.ratio("lora", "full"),
            "peft / lora": self.ratio("peft", "lora"),
            "flops, lora / full": self.flops_ratio,
            "largest difference of losses": {
                name: self.loss_difference(name) for name in self.measured if name != "lora"
            },
            "left_out": self.left_out,
        }


def measure_lora(
    names: Sequence[Contestant],
    settings: TrainSettings,
    *,
    steps: int,
    rounds: int,
    threads: int,
    report: Callable[[str], None] = lambda _: None,
) -> LoraFigures:
    """Measures the contestants that are installed, by turns.

    Args:
      names: the contestants.
      settings: the run, with an adapter; data and base are random.
      steps: measured steps a round.
      rounds: how often each is measured.
      threads: CPU cores for each.
      report: told what is being done.

    Raises:
      UserError: if no contestant is left.
    """
    measured: dict[Contestant, Measured] = {}

    def told(name: Contestant, doing: str) -> None:
        report(f"{TITLES[name]} in {settings.dtype}: {doing}")

    missing = {name: missing_packages(name) for name in names}
    with Contestants(missing, lambda name: _worker(name, threads), _FORGIVEN, told) as all_of_them:
        working, call = all_of_them.working, all_of_them.call
        for name in list(working):
            opened = call(name, "compiling, first steps", _open, name, settings, COMPARED_STEPS)
            if opened is not None:
                measured[name] = Measured(*opened)
        for number in range(1, rounds + 1):
            for name in list(working):
                turn = call(name, f"round {number} of {rounds}", _time, steps)
                if turn is not None:
                    measured[name].seconds.append(turn[0])
                    measured[name].cpu_seconds.append(turn[1])
        for name in list(working):
            measured[name].peak_bytes = call(name, "memory", _peak_bytes)
        measured = {name: measured[name] for name in working}
    return LoraFigures(settings, measured, all_of_them.left_out)


def _worker(name: Contestant, threads: int) -> Worker:
    # JAX leaves a GPU to the others where it only draws the weights.
    return Worker(threads, device="cpu" if name == "peft" else None)


# The rest runs in the process of a contestant.

_trainer: Trainer | None = None
_resident_before: int | None = None


def _open(name: Contestant, settings: TrainSettings, steps: int) -> tuple[Program, list[float]]:
    """Makes the contestant ready; what is known of it, and the losses of its first steps."""
    global _trainer, _resident_before
    if name == "peft":
        from gpt2_jax.benchmarks.lora_peft import PeftTrainer

        _trainer = PeftTrainer(settings)
    else:
        _trainer = OurTrainer(settings, train_all=name == "full")
    _resident_before = resident_bytes()
    _trainer.load()
    resident_bytes()  # gives back what only loading took
    if not reset_peak():
        _resident_before = None
    return _trainer.program, _trainer.steps(steps)


def _time(steps: int) -> tuple[float, float]:
    """Seconds of a step, and CPU seconds."""
    assert _trainer is not None
    start, cpu_start = time.perf_counter(), time.process_time()
    _trainer.steps(steps)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds / steps, cpu_seconds / steps


def _peak_bytes() -> int | None:
    assert _trainer is not None
    if _trainer.program.device != "cpu":
        return _trainer.device_peak_bytes()
    peak = peak_resident_bytes()
    if peak is None or _resident_before is None:
        return None
    return max(0, peak - _resident_before)  # a tiny model may take less than was given back
