"""Training steps of several contestants by turns: same weights, same batch.

Every contestant has a process of its own, which sleeps while another is measured; a round measures
each once, so that whatever else the machine does hits all alike.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping

from gpt2_jax.benchmarks.contestants import Contestants
from gpt2_jax.benchmarks.trainers import (
    MakeTrainer,
    Name,
    Program,
    open_trainer,
    peak_bytes,
    time_steps,
)
from gpt2_jax.training.settings import TrainSettings

# The second loss depends on the first update: on gradients, clipping and AdamW.
COMPARED_STEPS = 2


@dataclasses.dataclass
class Measured:
    """What was measured of a contestant.

    Attributes:
      program: what was known before it was measured.
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


def measure_steps(
    contestants: Contestants[Name],
    make: MakeTrainer[Name],
    settings: TrainSettings,
    *,
    steps: int,
    rounds: int,
    before_round: Callable[[int], None] = lambda _: None,
) -> dict[Name, Measured]:
    """Measures all contestants by turns.

    Args:
      contestants: a context that was entered.
      make: makes the contestant of a name.
      settings: the run; its data and weights are random.
      steps: measured steps a round.
      rounds: how often each is measured.
      before_round: told the round's number, from 1, before its first turn.

    Returns:
      What was measured of those that work; why others don't, `contestants.left_out` tells.
    """
    measured: dict[Name, Measured] = {}
    working, call = contestants.working, contestants.call
    for name in list(working):
        doing = "compiling, first steps"
        opened = call(name, doing, open_trainer, make, name, settings, COMPARED_STEPS)
        if opened is not None:
            measured[name] = Measured(*opened)
    for number in range(1, rounds + 1):
        before_round(number)
        for name in list(working):
            turn = call(name, f"round {number} of {rounds}", time_steps, steps)
            if turn is not None:
                measured[name].seconds.append(turn[0])
                measured[name].cpu_seconds.append(turn[1])
    for name in list(working):
        measured[name].peak_bytes = call(name, "memory", peak_bytes)
    return {name: measured[name] for name in working}


def time_ratio(measured: Mapping[Name, Measured], one: Name, other: Name) -> float | None:
    """Step time of one / other, the median of the rounds' own; None unless both worked."""
    if one not in measured or other not in measured:
        return None
    both = zip(measured[one].seconds, measured[other].seconds, strict=True)
    return statistics.median(ours / its for ours, its in both)


def loss_difference(
    measured: Mapping[Name, Measured], one: Name, other: Name, steps: int = COMPARED_STEPS
) -> float | None:
    """The largest between the losses of their first steps, nats per token; None unless both ran."""
    if one not in measured or other not in measured:
        return None
    both = zip(measured[one].losses, measured[other].losses, strict=True)
    return max(abs(ours - its) for ours, its in list(both)[:steps])
