"""A LoRA step against training all weights and against PEFT: same weights, same batch, by turns."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gpt2_jax.benchmarks.contestants import Contestants
from gpt2_jax.benchmarks.jax_trainers import OurTrainer
from gpt2_jax.benchmarks.lora_load import TITLES, Contestant, missing_packages
from gpt2_jax.benchmarks.step_contest import (
    COMPARED_STEPS,
    Measured,
    loss_difference,
    measure_steps,
    time_ratio,
)
from gpt2_jax.benchmarks.trainers import Trainer
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.training.settings import TrainSettings

# What leaves a contestant out; the rest are bugs of ours. Where memory is short, that is a result.
_FORGIVEN: dict[Contestant, tuple[type[Exception], ...]] = {
    "lora": (),
    "full": (RuntimeError,),
    "peft": (Exception,),
}


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
        return time_ratio(self.measured, one, other)

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
        steps = 1 if other == "full" else COMPARED_STEPS
        return loss_difference(self.measured, "lora", other, steps)

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

    def told(name: Contestant, doing: str) -> None:
        report(f"{TITLES[name]} in {settings.dtype}: {doing}")

    missing = {name: missing_packages(name) for name in names}
    with Contestants(missing, lambda name: _worker(name, threads), _FORGIVEN, told) as all_of_them:
        measured = measure_steps(all_of_them, _make, settings, steps=steps, rounds=rounds)
    return LoraFigures(settings, measured, all_of_them.left_out)


def _worker(name: Contestant, threads: int) -> Worker:
    # JAX leaves a GPU to the others where it only draws the weights.
    return Worker(threads, "cpu" if name == "peft" else None, keep_memory=name != "peft")


def _make(name: Contestant, settings: TrainSettings) -> Trainer:
    """The contestant, in its process."""
    if name == "peft":
        from gpt2_jax.benchmarks.lora_peft import PeftTrainer

        return PeftTrainer(settings)
    if name == "lora":
        return OurTrainer(settings)
    return OurTrainer(dataclasses.replace(settings, lora=None), merged=settings.lora)
