"""The training loop against the bare jitted step: what does everything around it cost?"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.data.batches import Windows, training_batches
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.loop import train
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.metrics import read_metrics
from gpt2_jax.training.settings import TrainSettings

# The first steps still warm up caches and threads.
WARM_UP = 3


def loop_against_step(settings: TrainSettings, steps: int, rounds: int) -> dict[str, Any]:
    """Measures both by turns, on random tokens.

    The loop reads and shuffles shards, puts batches on the devices, writes metrics.jsonl and
    shows progress; its validation and its last checkpoint lie outside the measured steps.

    Args:
      settings: the run to measure.
      steps: measured steps a round.
      rounds: how often each is measured.

    Returns:
      "step" and "loop" (tokens per second, the median round), "ratio" (loop / step, the median
      of the rounds' own), "rounds" (all figures).
    """
    measured = [
        {"step": _bare_step(settings, steps), "loop": _loop(settings, steps)} for _ in range(rounds)
    ]
    return {
        "step": statistics.median(figures["step"] for figures in measured),
        "loop": statistics.median(figures["loop"] for figures in measured),
        "ratio": statistics.median(figures["loop"] / figures["step"] for figures in measured),
        "rounds": measured,
    }


def _windows(settings: TrainSettings) -> Windows:
    T, rows = settings.data.sequence_length, 4 * settings.data.batch_size
    shard = np.random.default_rng(0).integers(0, settings.model.vocab_size, rows * T + 1)
    return Windows([shard.astype(np.uint16)], T)


def _bare_step(settings: TrainSettings, steps: int) -> float:
    """Tokens per second of the step alone, on one batch that is already there."""
    engine = make_engine(settings, make_layout(settings))
    key = jax.random.key(settings.seed)
    batches = training_batches(_windows(settings), settings.data.batch_size, settings.seed)
    tokens_NBT = engine.layout.load_batch(batches, 0)
    state = engine.first_state(key)
    for _ in range(WARM_UP):
        state, _ = engine.step(state, tokens_NBT, key)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state, _ = engine.step(state, tokens_NBT, key)
    jax.block_until_ready(state)
    return steps * settings.data.tokens_per_step / (time.perf_counter() - start)


def _loop(settings: TrainSettings, steps: int) -> float:
    """Tokens per second of `train`, from its own record."""
    windows = _windows(settings)
    batches = training_batches(windows, settings.data.batch_size, settings.seed)
    with tempfile.TemporaryDirectory() as scratch:
        run = dataclasses.replace(
            settings,
            run_dir=scratch,
            steps=WARM_UP + steps,
            checkpoint_every=WARM_UP + steps,
            validation=dataclasses.replace(settings.validation, every=WARM_UP + steps),
        )
        train(run, batches, np.stack([windows[0]]))
        records = read_metrics(Path(scratch) / "metrics.jsonl")
    speeds = [record["tokens_per_second"] for record in records if "loss" in record]
    return statistics.harmonic_mean(speeds[WARM_UP:])
