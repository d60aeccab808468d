"""How fast HellaSwag is scored: ours, PyTorch and lm-evaluation-harness, by turns.

Every contestant has a process of its own, which sleeps while another is measured; a round measures
each once, so that whatever else the machine does hits all alike. All score the same items with the
same weights, and must find the same losses.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.benchmarks.contestants import Contestants
from gpt2_jax.benchmarks.hellaswag_scorers import (
    PROTOCOL,
    TITLES,
    Contestant,
    Dtype,
    EndingScorer,
    Task,
    missing_packages,
    open_scorer,
)
from gpt2_jax.benchmarks.model_files import random_params
from gpt2_jax.benchmarks.worker import Worker
from gpt2_jax.config import config_for_size
from gpt2_jax.evaluation.hellaswag import question
from gpt2_jax.evaluation.hellaswag_items import Item
from gpt2_jax.evaluation.rows import PREDICTIONS_STEP, Question, make_batches
from gpt2_jax.interop.export import export_model
from gpt2_jax.interop.tokenizer_files import gpt2_files
from gpt2_jax.sources import load_source

# Failures of others leave them out; ours are bugs.
_FORGIVEN: dict[Contestant, tuple[type[Exception], ...]] = {
    "ours": (),
    "torch": (Exception,),
    "harness": (Exception,),
}


@dataclasses.dataclass
class Measured:
    """What was measured of a contestant.

    Attributes:
      device: where it ran.
      batch_size: rows of a batch, None where there is no batch.
      sums_NE: the endings' losses.
      seconds: for all items, in each round.
    """

    device: str
    batch_size: int | None
    sums_NE: np.ndarray
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def items_per_second(self) -> float:
        """In the median round."""
        return len(self.sums_NE) / statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class HellaSwagFigures:
    """What came of some items in one dtype, for the contestants that worked."""

    dtype: Dtype
    measured: dict[Contestant, Measured]
    left_out: dict[Contestant, str]

    def ratio(self, other: Contestant) -> float | None:
        """How many times as fast ours is, the median of the rounds' own."""
        if "ours" not in self.measured or other not in self.measured:
            return None
        both = zip(self.measured["ours"].seconds, self.measured[other].seconds, strict=True)
        return statistics.median(its / ours for ours, its in both)

    def difference(self, other: Contestant) -> float | None:
        """The largest between our loss of an ending and another's, nats."""
        if "ours" not in self.measured or other not in self.measured:
            return None
        ours, its = self.measured["ours"].sums_NE, self.measured[other].sums_NE
        return float(np.abs(ours - its).max())

    def to_json(self) -> dict[str, Any]:
        """Every round, without the losses."""
        return {
            "dtype": self.dtype,
            "contestants": {
                name: {
                    "device": of.device,
                    "batch_size": of.batch_size,
                    "seconds": of.seconds,
                    "items_per_second": of.items_per_second,
                    "ours_is_faster_by": self.ratio(name),
                    "largest_difference": self.difference(name),
                }
                for name, of in self.measured.items()
            },
            "left_out": self.left_out,
        }


@dataclasses.dataclass(frozen=True)
class Padding:
    """Tokens of a set of items: needed, and computed because rows have few lengths.

    Attributes:
      texts: of all texts, each read by itself.
      rows: of the rows, in which endings share their context.
      computed: of the padded rows.
      computed_texts: of the padded texts, were each a row.
      predictions: where the output head is needed.
      computed_predictions: where it is computed.
    """

    texts: int
    rows: int
    computed: int
    computed_texts: int
    predictions: int
    computed_predictions: int


def padding(items: Sequence[Item], n_positions: int, batch_size: int) -> Padding:
    """Counts tokens; nothing is scored."""
    questions = [question(item, PROTOCOL) for item in items]
    alone = [Question(context, (ending,)) for context, endings in questions for ending in endings]
    shared, single = (make_batches(some, n_positions, batch_size) for some in (questions, alone))
    return Padding(
        sum(len(row.tokens) for batch in single for row in batch.rows),
        sum(len(row.tokens) for batch in shared for row in batch.rows),
        sum(batch.tokens_BT.size for batch in shared),
        sum(batch.tokens_BT.size for batch in single),
        sum(len(row.place) for batch in shared for row in batch.rows),
        sum(batch.chunks * PREDICTIONS_STEP * batch_size for batch in shared),
    )


def measure_hellaswag(
    names: Sequence[Contestant],
    items: Sequence[Item],
    *,
    source: str | None,
    model: str | None,
    dtype: Dtype,
    batch_sizes: Sequence[int],
    rounds: int,
    threads: int,
    report: Callable[[str], None] = lambda _: None,
) -> HellaSwagFigures:
    """Measures the contestants that are installed, by turns.

    Args:
      names: the contestants.
      items: what to score.
      source: the model, as `load_source` takes it; None for random weights.
      model: size of pretrained or random weights.
      dtype: compute dtype; in PyTorch that of the weights, too.
      batch_sizes: each contestant takes what is fastest.
      rounds: how often each is measured.
      threads: CPU cores for each.
      report: told what is being done.

    Raises:
      UserError: if there is no such model, or no contestant is left.
    """
    measured: dict[Contestant, Measured] = {}

    def told(name: Contestant, doing: str) -> None:
        report(f"{TITLES[name]} in {dtype}: {doing}")

    missing = {name: missing_packages(name) for name in names}
    all_of_them = Contestants(missing, lambda _: Worker(threads), _FORGIVEN, told)
    with tempfile.TemporaryDirectory() as scratch, all_of_them:
        directory = Path(scratch) / "model"
        _write_model(directory, source, model)
        task = Task(directory, tuple(items), dtype, tuple(batch_sizes))
        working, call = all_of_them.working, all_of_them.call
        for name in list(working):
            opened = call(name, "loading, compiling, choosing a batch size", _open, name, task)
            if opened is not None:
                measured[name] = Measured(*opened)
        for number in range(1, rounds + 1):
            for name in list(working):
                seconds = call(name, f"round {number} of {rounds}", _time, task.items)
                if seconds is not None:
                    measured[name].seconds.append(seconds)
        measured = {name: measured[name] for name in working}
    return HellaSwagFigures(dtype, measured, all_of_them.left_out)


def _write_model(directory: Path, source: str | None, model: str | None) -> None:
    if source is None:
        config = config_for_size(model or "gpt2")
        params = random_params(config)
    else:
        params, config = load_source(source, model=model)
    export_model(directory, params, config, files=gpt2_files(config.n_positions))


# The rest runs in the process of a contestant.

_scorer: EndingScorer | None = None


def _open(name: Contestant, task: Task) -> tuple[str, int | None, np.ndarray]:
    """Makes the contestant ready: device, batch size, and what it finds."""
    global _scorer
    _scorer = open_scorer(name, task)
    return _scorer.device, _scorer.batch_size, _scorer.score(task.items)


def _time(items: Sequence[Item]) -> float:
    assert _scorer is not None
    start = time.perf_counter()
    _scorer.score(items)
    return time.perf_counter() - start
