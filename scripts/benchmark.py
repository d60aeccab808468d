"""Measures speed and memory: python scripts/benchmark.py train --config configs/demo.py."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt2_jax.cli import parse_flags_over_config, run
from gpt2_jax.config import check_positive_int
from gpt2_jax.errors import UserError
from gpt2_jax.files import write_text
from gpt2_jax.training.config_files import load_config_file
from gpt2_jax.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measures a run, whose data need not be there; every setting of the config is also a flag."""

    config: Path
    """the run to measure, one of configs/*.py or your own"""
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    what: tyro.conf.Positional[Literal["train", "memory"]] = "train"
    """train: tokens per second of the training loop against the bare jitted step;
    memory: what the compiled step asks of each device"""
    measured_steps: int = 30
    """train: steps in a round"""
    rounds: int = 3
    """train: how often each is measured, by turns"""
    output: Path | None = None
    """also write the figures to this file, as JSON"""


def main() -> None:
    """Measures and prints."""
    flags = parse_flags_over_config(Flags, load_config_file)
    for name in ("measured_steps", "rounds"):
        check_positive_int(name, getattr(flags, name))

    # Only now the slow imports, so that --help and mistakes answer at once.
    import jax

    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    figures = _train(flags, device) if flags.what == "train" else _memory(flags, device)
    if flags.output is not None:
        text = json.dumps({"device": device, "config": str(flags.config), **figures}, indent=2)
        try:
            write_text(flags.output, text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {flags.output}: {error.strerror}") from None


def _train(flags: Flags, device: str) -> dict[str, Any]:
    from gpt2_jax.benchmarks.loop import loop_against_step

    figures = loop_against_step(flags.settings, flags.measured_steps, flags.rounds)
    rounds = f"{flags.rounds} rounds of {flags.measured_steps} steps, medians"
    print(f"{flags.config.name} on {device}, {rounds}")
    print(f"bare step      {figures['step']:12,.0f} tokens/s")
    print(f"training loop  {figures['loop']:12,.0f} tokens/s")
    print(f"loop / step    {figures['ratio']:12.3f}")
    return figures


def _memory(flags: Flags, device: str) -> dict[str, Any]:
    from gpt2_jax.benchmarks.memory import step_memory

    figures = step_memory(flags.settings)
    print(f"{flags.config.name} on {device}, gigabytes of each device")
    for name, size in figures.items():
        print(f"{name:24}{size / 1e9:8.2f}")
    return figures


if __name__ == "__main__":
    run(main)
