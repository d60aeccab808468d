"""Our training step against other people's: same weights, same batch, by turns.

A plain Flax step, the PyTorch reference and Hugging Face's GPT-2, as they are and compiled; and
the speed at which the device multiplies matrices, measured between them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpt2_jax.benchmarks.contest import SETTLE_SECONDS
from gpt2_jax.benchmarks.contestants import Contestants
from gpt2_jax.benchmarks.jax_trainers import OurTrainer
from gpt2_jax.benchmarks.matmul_peak import MatmulPeak, matmul_peak
from gpt2_jax.benchmarks.step_contest import Measured, loss_difference, measure_steps, time_ratio
from gpt2_jax.benchmarks.train_load import (
    ON_PYTORCH,
    TITLES,
    Contestant,
    KeepMemory,
    Peer,
    missing_packages,
)
from gpt2_jax.benchmarks.trainers import Trainer
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.throughput import flops_per_token, peak_flops


@dataclasses.dataclass(frozen=True)
class TrainFigures:
    """What came of a load with one compute dtype.

    Attributes:
      settings: what was measured.
      measured: of each contestant that worked.
      peaks: what the device reached in matrix products, before each round.
      left_out: contestants that could not be measured, such as for want of memory, and why.
    """

    settings: TrainSettings
    measured: dict[Contestant, Measured]
    peaks: list[MatmulPeak]
    left_out: dict[Contestant, str]

    def tokens_per_second(self, name: Contestant) -> float:
        """In the median round."""
        return self.settings.data.tokens_per_step / self.measured[name].step_seconds

    def faster(self, other: Contestant) -> float | None:
        """How many times as fast as another ours is, the median of the rounds' own."""
        return time_ratio(self.measured, other, "ours")

    def loss_difference(self, other: Contestant) -> float | None:
        """The largest between our first losses and another's, nats per token."""
        return loss_difference(self.measured, "ours", other)

    @property
    def best_pytorch(self) -> Contestant | None:
        """The fastest in the median round."""
        worked = [name for name in ON_PYTORCH if name in self.measured]
        return max(worked, key=self.tokens_per_second, default=None)

    def share_of_matmul(self, name: Contestant) -> float | None:
        """Model FLOPs as a share of what matrix products reached, the median of the rounds' own.

        None on another device than JAX's, whose products were measured.
        """
        of = self.measured[name]
        if of.program.device != self.peaks[0].platform:
            return None
        return statistics.median(
            self._step_flops / seconds / peak.flops
            for seconds, peak in zip(of.seconds, self.peaks, strict=True)
        )

    def mfu(self, name: Contestant) -> float | None:
        """Model FLOPs as a share of the vendor's figure, None for devices without one."""
        of, device = self.measured[name], self.peaks[0]
        peak = peak_flops(device.device_kind, self.settings.dtype)
        if peak is None or of.program.device != device.platform:
            return None
        return self._step_flops / of.step_seconds / peak

    @property
    def _step_flops(self) -> float:
        data = self.settings.data
        return data.tokens_per_step * flops_per_token(self.settings.model, data.sequence_length)

    def to_json(self) -> dict[str, Any]:
        """Everything, each round included."""
        return {
            "dtype": self.settings.dtype,
            "contestants": {
                name: {
                    **dataclasses.asdict(of),
                    "step_seconds": of.step_seconds,
                    "tokens_per_second": self.tokens_per_second(name),
                    "ours_is_faster_by": self.faster(name),
                    "share_of_matmul": self.share_of_matmul(name),
                    "mfu": self.mfu(name),
                    "largest difference of losses": self.loss_difference(name),
                }
                for name, of in self.measured.items()
            },
            "matmul_flops": [peak.flops for peak in self.peaks],
            "best_pytorch": self.best_pytorch,
            "left_out": self.left_out,
        }


def measure_train(
    peers: Sequence[Peer],
    settings: TrainSettings,
    *,
    steps: int,
    rounds: int,
    threads: int,
    keep_memory: KeepMemory = "ours",
    report: Callable[[str], None] = lambda _: None,
) -> TrainFigures:
    """Measures ours and the peers that are installed, by turns.

    Args:
      peers: who else takes part.
      settings: the run; data and weights are random.
      steps: measured steps a round.
      rounds: how often each is measured.
      threads: CPU cores for each.
      keep_memory: who allocates memory as training scripts do, see `gpt2_jax.allocator`.
      report: told what is being done.
    """
    names: list[Contestant] = ["ours", *peers]
    peaks: list[MatmulPeak] = []

    def told(name: Contestant, doing: str) -> None:
        report(f"{TITLES[name]} in {settings.dtype}: {doing}")

    missing = {name: missing_packages(name) for name in names}
    # Failures of others leave them out; ours are bugs.
    forgiven: dict[Contestant, tuple[type[Exception], ...]] = {
        name: () if name == "ours" else (Exception,) for name in names
    }

    def worker(name: Contestant) -> Worker:
        keeps = keep_memory == "all" or (keep_memory == "ours" and name == "ours")
        # JAX leaves a GPU to the others where it only draws the weights.
        return Worker(threads, "cpu" if name in ON_PYTORCH else None, keep_memory=keeps)

    contestants = Contestants(missing, worker, forgiven, told)
    with contestants, Worker(threads) as device:

        def before_round(number: int) -> None:
            report(f"matrix products in {settings.dtype}: round {number} of {rounds}")
            time.sleep(SETTLE_SECONDS)
            peaks.append(device.run(matmul_peak, settings.dtype))

        measured = measure_steps(
            contestants, _make, settings, steps=steps, rounds=rounds, before_round=before_round
        )
    return TrainFigures(settings, measured, peaks, contestants.left_out)


def _make(name: Contestant, settings: TrainSettings) -> Trainer:
    """The contestant, in its process."""
    if name == "ours":
        return OurTrainer(settings)
    if name == "plain":
        from gpt2_jax.benchmarks.plain_flax import PlainTrainer

        return PlainTrainer(settings)
    from gpt2_jax.benchmarks.torch_trainers import HuggingFaceTrainer, ReferenceTrainer

    trainer = ReferenceTrainer if name.startswith("reference") else HuggingFaceTrainer
    return trainer(settings, compiled=name.endswith("-compiled"))
