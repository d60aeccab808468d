"""Measures speed: python scripts/benchmark.py train --config configs/demo.py."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import tyro

from gpt2_jax.cli import parse_flags, run
from gpt2_jax.config import check_positive_int
from gpt2_jax.files import write_text
from gpt2_jax.training.config_files import load_config_file


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compares, within one run, what should be equally fast or is claimed to be faster."""

    what: tyro.conf.Positional[Literal["train"]]
    """train: the training loop against the bare jitted step"""
    config: Path
    """the run to measure, one of configs/*.py or your own; its data are not read"""
    steps: int = 30
    """measured steps a round"""
    rounds: int = 3
    """how often each is measured, by turns"""
    output: Path | None = None
    """also write the figures to this file, as JSON"""


def main() -> None:
    """Measures and prints."""
    flags = parse_flags(Flags)
    for name in ("steps", "rounds"):
        check_positive_int(name, getattr(flags, name))
    settings = load_config_file(flags.config)

    # Only now the slow imports, so that --help and mistakes answer at once.
    import jax

    from gpt2_jax.benchmarks.loop import loop_against_step

    result = loop_against_step(settings, flags.steps, flags.rounds)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{flags.config.name} on {device}, {flags.rounds} rounds of {flags.steps} steps, medians")
    print(f"bare step      {result['step']:12,.0f} tokens/s")
    print(f"training loop  {result['loop']:12,.0f} tokens/s")
    print(f"loop / step    {result['ratio']:12.3f}")
    if flags.output is not None:
        figures = {"device": device, "config": str(flags.config), "steps": flags.steps, **result}
        write_text(flags.output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
